"""Vision encoders: unit vectors that don't depend on the batch; a wrong name is refused early."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from vlm4rec_spark.demo.drawing import draw
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.encoding.vision_encoder import Vision, load_vision, vision_id

SHIRT = {
    "kind": "shirt",
    "colour": "red",
    "pattern": "striped",
    "material": "cotton",
    "style": "sporty",
}


def drawn(seed: int, **changes: str) -> Image.Image:
    return draw(SHIRT | changes, np.random.default_rng(seed))


PHOTOS = [
    drawn(1),
    drawn(2),
    drawn(3, kind="lamp", colour="blue", pattern="plain"),
    Image.new("RGB", (40, 90)),
]


def model_folder(name: str, folder: Path) -> str:
    """The name of a packaged model, or a folder with a small model of random weights."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    square = {"height": 32, "width": 32}
    torch.manual_seed(0)
    if name == "clip":
        words = small | {"vocab_size": 50, "max_position_embeddings": 16}
        config = CLIPConfig(vision_config=small, text_config=words, projection_dim=24)
        model = CLIPModel(config)
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    elif name == "vit":
        model = ViTModel(ViTConfig(**small))
        processor = ViTImageProcessor(size=square)
    else:
        return name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["packaged", "fake", "clip", "vit"])
def vision(request, tmp_path_factory) -> Vision:
    return load_vision(model_folder(request.param, tmp_path_factory.mktemp("vision")), "main")


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(vision):
    vectors = vision.embed(PHOTOS)
    assert vectors.dtype == np.float32
    assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    one_by_one = np.concatenate([vision.embed([photo]) for photo in PHOTOS])
    assert_allclose(one_by_one, vectors, atol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-4


@cache
def packaged() -> Vision:
    return load_vision("packaged", "main")


def test_the_packaged_encoder_finds_similar_photos():
    shirt, other_shirt, lamp, _ = packaged().embed(PHOTOS)
    assert shirt.shape == (384,)
    assert shirt @ other_shirt > shirt @ lamp + 0.2


def test_more_photos_than_a_batch(monkeypatch):
    monkeypatch.setattr("vlm4rec_spark.models.encoding.vision_encoder._BATCH_SIZE", 3)
    vectors = packaged().embed(PHOTOS * 2)
    assert_allclose(vectors[4:], packaged().embed(PHOTOS), atol=1e-5)


def test_ids_name_the_encoder_and_a_missing_folder_is_refused(tmp_path):
    assert vision_id("fake", "main") == "fake-4x4@1"
    name, _, digest = vision_id("packaged", "main").partition("@")
    assert name == "packaged"
    assert len(digest) == 12
    message = rf"^embed\.vision: there is no model folder {tmp_path}/gone\."
    with pytest.raises(UsageError, match=message):
        vision_id(str(tmp_path / "gone"), "main")
