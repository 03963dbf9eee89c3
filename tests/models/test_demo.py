"""The demo's shop and its captioner: the same seed gives the same bytes, and the captions come from the photos."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.demo.drawing import ATTRIBUTES, SIZE, draw, parse, sentence
from vlm4rec_spark.models.captioners.transformers import TransformersCaptioner
from vlm4rec_spark.models.prompts import load_prompt

MODEL = Path(catalogue.__file__).parent / "model"
LOOKED_AT = ("kind", "colour", "pattern", "material")
SHIRT = {"kind": "shirt", "colour": "red", "pattern": "striped", "material": "cotton", "style": "sporty"}
FRESH_SEED = 9_000_000
"""Neither the training nor its held-out renderings nor the shop come near these seeds."""


@cache
def captioner() -> TransformersCaptioner:
    return TransformersCaptioner(str(MODEL), "main", max_new_tokens=40)


@cache
def fresh(count: int) -> list[tuple[dict[str, str], Image.Image]]:
    drawn = []
    for number in range(count):
        rng = np.random.default_rng(FRESH_SEED + number)
        attributes = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        drawn.append((attributes, draw(attributes, rng)))
    return drawn


def captions(photos: list[Image.Image], batch: int, prompt: str | None = None) -> list[str]:
    prompt = prompt or load_prompt("describe.1").text
    parts = [photos[start : start + batch] for start in range(0, len(photos), batch)]
    return [answer.text for part in parts for answer in captioner().caption(part, [prompt] * len(part))]


@cache
def sixty() -> list[str]:
    """The captions of the fresh photos, in batches of 20."""
    return captions([photo for _, photo in fresh(60)], batch=20)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_sentence_names_every_attribute():
    assert sentence(SHIRT) == "A red striped cotton shirt in a sporty style, for training and weekends."
    for name, values in ATTRIBUTES.items():
        for value in values:
            assert parse(sentence(SHIRT | {name: value})) == SHIRT | {name: value}


def test_attributes_that_a_caption_leaves_out_are_missing():
    assert parse("A blue thing made of wool.") == {"colour": "blue", "material": "wool"}
    assert parse("") == {}


def test_the_same_generator_draws_the_same_photo():
    first, again, other = (draw(SHIRT, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first.size, first.mode) == ((SIZE, SIZE), "RGB")
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_same_seed_writes_the_same_shop(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        catalogue.write(tmp_path / name, seed=seed, items=40, users=12)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_titles_brands_and_categories_say_nothing_about_the_look(tmp_path):
    catalogue.write(tmp_path, items=40, users=12)
    rows = pd.read_csv(tmp_path / "catalogue.csv", dtype=str, keep_default_na=False)
    assert [parse(" ".join(row)) for row in rows[["title", "brand", "category"]].to_numpy()] == [{}] * len(rows)


def test_the_model_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in MODEL.glob("*.safetensors")) <= 12_000_000


def test_captions_come_from_the_photos():
    truth = [attributes for attributes, _ in fresh(60)]
    found = [parse(text) for text in sixty()]
    right = {name: np.mean([f.get(name) == t[name] for f, t in zip(found, truth, strict=True)]) for name in LOOKED_AT}
    assert min(right.values()) >= 0.9, right


def test_a_blank_photo_tells_the_model_nothing():
    blank = parse(captions([Image.new("RGB", (SIZE, SIZE), (160, 160, 160))], batch=1)[0])
    agree = [np.mean([blank.get(name) == attributes[name] for attributes, _ in fresh(60)]) for name in LOOKED_AT]
    assert np.mean(agree) < 0.35  # chance is .125, .125, .2 and .25


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_caption_does_not_depend_on_its_batch(batch):
    photos = [photo for _, photo in fresh(60)][: max(batch, 6)]
    assert captions(photos, batch) == sixty()[: len(photos)]


def test_prompts_of_other_lengths_in_the_batch_change_nothing():
    photos = [photo for _, photo in fresh(60)][:3]
    prompts = ["Describe it.", "What is shown here? " * 8, load_prompt("describe.1").text]
    mixed = [answer.text for answer in captioner().caption(photos, prompts)]
    alone = [captioner().caption([photo], [prompt])[0].text for photo, prompt in zip(photos, prompts, strict=True)]
    assert mixed == alone


def test_a_prompt_that_names_attributes_does_not_decide_the_caption():
    photos = [photo for _, photo in fresh(60)][:20]
    led = captions(photos, 20, "Is this a red striped cotton shirt in a sporty style?")
    same = np.mean([parse(a).get("colour") == parse(b).get("colour") for a, b in zip(led, sixty()[:20], strict=True)])
    assert same >= 0.9
