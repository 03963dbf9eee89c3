"""Vision encoders: unit vectors that don't depend on the batch, near for like photos; a wrong name is said early."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
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


def drawn(seed: int, **other: str) -> Image.Image:
    return draw(SHIRT | other, np.random.default_rng(seed))


PHOTOS = [
    drawn(1),
    drawn(2),
    drawn(3, kind="lamp", colour="blue", pattern="plain"),
    Image.new("RGB", (40, 90)),
]


def model_folder(name: str, folder: Path) -> str:
    """A small model of random weights of a kind that people name, or the name of one that is packaged."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    if name == "clip":
        words = small | {"vocab_size": 50, "max_position_embeddings": 16}
        CLIPModel(
            CLIPConfig(vision_config=small, text_config=words, projection_dim=24)
        ).save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)
    elif name == "vit":
        ViTModel(ViTConfig(**small)).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder) if name in ("clip", "vit") else name


@pytest.fixture(scope="module", params=["packaged", "fake", "clip", "vit"])
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return load_vision(model_folder(request.param, tmp_path_factory.mktemp("vision")), "main")


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(vision: Vision) -> None:
    together = vision.embed(PHOTOS)
    assert (together.dtype, len(together)) == (np.float32, len(PHOTOS))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for place, photo in enumerate(PHOTOS):
        np.testing.assert_allclose(vision.embed([photo])[0], together[place], atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-4


@cache
def packaged() -> Vision:
    return load_vision("packaged", "main")


def test_the_packaged_one_sees_what_is_alike() -> None:
    shirt, other_shirt, lamp, _ = packaged().embed(PHOTOS)
    assert shirt.shape == (384,)
    assert shirt @ other_shirt > shirt @ lamp + 0.2


def test_more_photos_than_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm4rec_spark.models.encoding.vision_encoder._TOGETHER", 3)
    np.testing.assert_allclose(
        packaged().embed(PHOTOS * 2)[4:], packaged().embed(PHOTOS), atol=1e-5
    )


def test_ids_name_the_encoder_and_a_wrong_one_is_said_early(tmp_path: Path) -> None:
    assert vision_id("fake", "main") == "fake-4x4@1"
    name, _, digest = vision_id("packaged", "main").partition("@")
    assert (name, len(digest)) == ("packaged", 12)
    with pytest.raises(
        UsageError, match=rf"^embed\.vision: there is no model folder {tmp_path}/gone\."
    ):
        vision_id(str(tmp_path / "gone"), "main")
