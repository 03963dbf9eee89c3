"""Photo bytes to an upright RGB image, or a named error. Knows Pillow; knows neither models nor where photos lie."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Larger photos are refused before they are decoded: 100 megapixels are 300 MB of RGB."""


PHOTO_ERRORS = ("empty", "not_an_image", "truncated", "too_large")


class PhotoError(Exception):
    """A photo that can't be used. `error_class` is one of PHOTO_ERRORS."""

    def __init__(self, error_class: str, message: str):
        super().__init__(message)
        self.error_class = error_class


def decode(data: bytes, max_side: int) -> Image.Image:
    """Decode a photo of any format Pillow knows: first frame, EXIF rotation applied, alpha laid on white, RGB.

    The longer side of the result is at most `max_side` pixels. Raises PhotoError.
    """
    if not data:
        raise PhotoError("empty", "the photo has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PhotoError("too_large", f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,}")
                image.draft("RGB", (max_side, max_side))
                upright = ImageOps.exif_transpose(image)
                rgb = _on_white(upright)
    except UnidentifiedImageError:
        raise PhotoError("not_an_image", f"{_looks_like(data)}, not a photo") from None
    except Image.DecompressionBombError as bomb:
        raise PhotoError("too_large", str(bomb)) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as damage:
        raise PhotoError("truncated", f"the photo ends early or is damaged: {damage}") from None
    rgb.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits per pixel: Pillow's own conversion cuts every shade above 255 to white.
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _looks_like(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"<svg", b"<?xml")):
        return "XML or SVG"
    return "unknown bytes"
