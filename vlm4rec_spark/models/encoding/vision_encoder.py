"""Photos to unit vectors, without any text. Knows encoders; knows no items and no tables."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy import ndarray
from PIL.Image import Image, Resampling

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.captioner import PACKAGED_MODEL
from vlm4rec_spark.models.model_id import pinned_id

_BATCH_SIZE = 32
_FAKE_SIDE = 4


class Vision(Protocol):
    def embed(self, photos: Sequence[Image]) -> ndarray:
        """RGB photos to a float32 array (photos, dimension); every row has length 1.

        A row doesn't depend on the other photos.
        """


def vision_id(name: str, revision: str) -> str:
    """Encoder at revision, without loading it. Raises UsageError if its folder is missing."""
    if name == "fake":
        return f"fake-{_FAKE_SIDE}x{_FAKE_SIDE}@1"
    return pinned_id("embed.vision", _source(name), revision)


def load_vision(name: str, revision: str) -> Vision:
    """`packaged` is the vision tower of the packaged captioner, `fake` is FakeVision.

    Any other name is the folder or hub name of a vision model or a captioner.
    """
    return FakeVision() if name == "fake" else TransformersVision(_source(name), revision)


def _source(name: str) -> str:
    return str(PACKAGED_MODEL) if name == "packaged" else name


class TransformersVision:
    """A vision model of the transformers library.

    A captioner gives its vision tower's output, averaged over all patches. A model trained on pairs
    of photo and text (CLIP, SigLIP) gives its image features. Others give their pooled output.
    """

    def __init__(self, source: str, revision: str):
        try:
            import torch
            from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModel
            from transformers import AutoModelForImageTextToText as AutoCaptioner
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The vision encoder needs: pip install 'vlm4rec_spark[local]'"
            ) from missing
        from vlm4rec_spark.models.captioning.backends.transformers import (
            best_device,
            load_processor,
        )

        self.torch = torch
        self.device = best_device()
        processor, _ = load_processor(source, revision)
        self.processor = getattr(processor, "image_processor", processor)
        config = AutoConfig.from_pretrained(source, revision=revision)
        self.is_captioner = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto_class: Any = AutoCaptioner if self.is_captioner else AutoModel
        model = auto_class.from_pretrained(
            source, revision=revision, dtype=torch.float32, use_safetensors=True
        )
        if self.is_captioner:
            if not hasattr(model.model, "vision_tower"):
                raise UsageError(
                    f"embed.vision: {source} has no vision tower that can be used alone. "
                    "Name a vision model, such as google/siglip-base-patch16-224."
                )
            model = model.model.vision_tower
        self.model = model.to(self.device).eval()

    def embed(self, photos: Sequence[Image]) -> ndarray:
        features = []
        for first in range(0, len(photos), _BATCH_SIZE):
            batch = list(photos[first : first + _BATCH_SIZE])
            inputs = self.processor(images=batch, return_tensors="pt")
            with self.torch.inference_mode():
                output = self._features(inputs["pixel_values"].to(self.device))
                features.append(output.float().cpu().numpy())
        vectors = np.concatenate(features)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _features(self, pixels: Any) -> Any:
        if self.is_captioner:
            return self.model(pixels, output_hidden_states=True).hidden_states[-1].mean(1)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels)
            return output if self.torch.is_tensor(output) else output.pooler_output
        output = self.model(pixels)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1)


class FakeVision:
    """The mean colors of sixteen parts of the photo. Deterministic."""

    def embed(self, photos: Sequence[Image]) -> ndarray:
        size = (_FAKE_SIDE, _FAKE_SIDE)
        thumbnails = [
            np.asarray(photo.resize(size, Resampling.BOX), np.float32) for photo in photos
        ]
        # The constant keeps a black photo from being the zero vector.
        vectors = np.stack(thumbnails).reshape(len(photos), -1) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
