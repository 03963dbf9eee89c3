"""Photos to unit vectors: what a vision encoder sees, without any words. Knows encoders; neither items nor tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image, Resampling

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.captioner import PACKAGED_MODEL
from vlm4rec_spark.models.model_id import pinned_id

_TOGETHER = 32
_FAKE_SIDE = 4


class Vision(Protocol):
    def embed(self, photos: Sequence[Image]) -> np.ndarray:
        """RGB photos to a float32 array (photos, dimension); every row has length 1, whatever the others are."""
        ...


def vision_id(name: str, revision: str) -> str:
    """Encoder at revision, without loading it. Raises UsageError when its folder isn't there."""
    if name == "fake":
        return f"fake-{_FAKE_SIDE}x{_FAKE_SIDE}@1"
    return pinned_id("embed.vision", _source(name), revision)


def load_vision(name: str, revision: str) -> Vision:
    """`packaged` (the packaged captioner's tower), `fake`, or a folder or hub name of a vision model or captioner."""
    return FakeVision() if name == "fake" else TransformersVision(_source(name), revision)


def _source(name: str) -> str:
    return str(PACKAGED_MODEL) if name == "packaged" else name


class TransformersVision:
    """Of a model that describes photos the vision tower, pooled over its places; of one that was trained to hold photos
    against texts (CLIP, SigLIP) its photo features; of another vision model its pooled output."""

    def __init__(self, source: str, revision: str):
        try:
            import torch
            from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModel
            from transformers import AutoModelForImageTextToText as Describing
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The vision encoder needs: pip install 'vlm4rec_spark[local]'"
            ) from missing
        from vlm4rec_spark.models.captioning.backends.transformers import load_processor

        self.torch = torch
        self.device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        processor, _ = load_processor(source, revision)
        self.processor = getattr(processor, "image_processor", processor)
        describes = (
            type(AutoConfig.from_pretrained(source, revision=revision))
            in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        )
        kind: Any = Describing if describes else AutoModel
        model = kind.from_pretrained(
            source, revision=revision, dtype=torch.float32, use_safetensors=True
        )
        if describes and not hasattr(model.model, "vision_tower"):
            raise UsageError(
                f"embed.vision: {source} has no vision tower that can be used alone. Name a vision model, "
                "such as google/siglip-base-patch16-224."
            )
        self.model = (model.model.vision_tower if describes else model).to(self.device).eval()
        self.describes = describes

    def embed(self, photos: Sequence[Image]) -> np.ndarray:
        found = []
        for first in range(0, len(photos), _TOGETHER):
            pixels = self.processor(
                images=list(photos[first : first + _TOGETHER]), return_tensors="pt"
            )
            with self.torch.inference_mode():
                found.append(
                    self._features(pixels["pixel_values"].to(self.device)).float().cpu().numpy()
                )
        vectors = np.concatenate(found)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _features(self, pixels: Any) -> Any:
        if self.describes:
            return self.model(pixels, output_hidden_states=True).hidden_states[-1].mean(1)
        if hasattr(self.model, "get_image_features"):
            seen = self.model.get_image_features(pixel_values=pixels)
            return seen if self.torch.is_tensor(seen) else seen.pooler_output
        seen = self.model(pixels)
        pooled = getattr(seen, "pooler_output", None)
        return (seen.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1)


class FakeVision:
    """The mean colours of sixteen parts of the photo. Deterministic."""

    def embed(self, photos: Sequence[Image]) -> np.ndarray:
        small = [
            np.asarray(photo.resize((_FAKE_SIDE, _FAKE_SIDE), Resampling.BOX), np.float32)
            for photo in photos
        ]
        # The constant keeps a black photo from being the zero vector.
        vectors = np.stack(small).reshape(len(photos), -1) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
