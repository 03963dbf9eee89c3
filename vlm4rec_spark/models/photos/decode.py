"""Photo bytes to an upright RGB image, or a named error. Knows Pillow; knows neither models nor where photos lie."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Larger photos are refused before they are decoded: 100 megapixels are 300 MB of RGB."""
MIN_SIDE = 8
"""Pixels. What is smaller is a tracking pixel or a bullet, and no model sees anything in it."""
_FLAT = 8
"""Of 255: a photo whose lightest and darkest pixels are no further apart, in any channel, shows nothing."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "ICO")
"""Photos come in these. Pillow knows forty more, and for one of them, EPS, it starts Ghostscript."""
_BEGINNINGS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"GIF8",
    b"RIFF",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
)
"""What opens with these and can't be identified was a photo once."""
_HEIC, _AVIF = (
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    (b"avif", b"avis"),
)

PHOTO_ERRORS = (
    "empty",
    "not_an_image",
    "html_page",
    "svg",
    "unsupported",
    "truncated",
    "too_large",
    "too_small",
    "blank",
)
"""The classes: no bytes; bytes of no known kind; a web page or a drawing under a photo's name; a kind that this
machine can't read; damaged or cut off; more than MAX_PIXELS; a side under MIN_SIDE; one colour all over."""


class PhotoError(Exception):
    """A photo that can't be used. `error_class` is one of PHOTO_ERRORS."""

    def __init__(self, error_class: str, message: str):
        super().__init__(message)
        self.error_class = error_class


def decode(data: bytes, max_side: int) -> Image.Image:
    """Decode a photo: first frame, EXIF rotation applied, alpha laid on white, RGB.

    The longer side of the result is at most `max_side` pixels; a JPEG is decoded no larger than that needs. HEIC takes
    the extra `heic`. Raises PhotoError.
    """
    if not data:
        raise PhotoError("empty", "the photo has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS + _heif()) as image:
                _check_size(image)
                photo = _small(image, max_side)
    except UnidentifiedImageError:
        raise PhotoError(*_what_else(data)) from None
    except Image.DecompressionBombError as bomb:
        raise PhotoError("too_large", str(bomb)) from None
    except (PhotoError, MemoryError):
        raise
    except Exception as damage:  # Pillow's decoders raise a dozen kinds
        if "too large" in str(damage):  # a comment in a PNG that unpacks to more than Pillow takes
            raise PhotoError("too_large", str(damage)) from None
        raise PhotoError("truncated", f"the photo ends early or is damaged: {damage}") from None
    if all(lightest - darkest <= _FLAT for darkest, lightest in photo.getextrema()):  # type: ignore[misc]
        raise PhotoError("blank", "the photo is of one colour all over")
    return photo


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise PhotoError(
            "too_large", f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,}"
        )
    if min(image.size) < MIN_SIDE:
        raise PhotoError(
            "too_small", f"{image.width} x {image.height} pixels, at least {MIN_SIDE} x {MIN_SIDE}"
        )


def _small(image: Image.Image, max_side: int) -> Image.Image:
    """At most so large, upright and RGB. Made small first: what comes after costs memory and time by the pixel."""
    ratio = min(1.0, max_side / max(image.size))
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    image.draft("RGB", size)
    source = image
    if image.mode.startswith("I"):
        # 16 bits per pixel: Pillow's own conversion cuts every shade above 255 to white.
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8))
    elif image.mode in ("F", "LAB"):
        raise PhotoError("unsupported", f"pixels of mode {image.mode}; convert the photo to RGB")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _upright(image.convert("RGB"), source)


def _upright(photo: Image.Image, source: Image.Image) -> Image.Image:
    # A photo whose EXIF can't be read is a photo still.
    with suppress(Exception):
        photo.info["exif"] = source.getexif().tobytes()
        photo = ImageOps.exif_transpose(photo)
    photo.info.clear()
    return photo


@cache
def _heif() -> tuple[str, ...]:
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener(thumbnails=False)
    return ("HEIF",)


def _what_else(data: bytes) -> tuple[str, str]:
    """Class and message for what is no photo."""
    start = data[:1_024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _HEIC and not _heif():
        return "unsupported", "a HEIC photo, which needs: pip install 'vlm4rec_spark[heic]'"
    if brand in _HEIC + _AVIF or data.startswith(_BEGINNINGS):
        return "truncated", "the photo ends early or is damaged: nothing can be made out"
    if start.startswith((b"%!ps", b"%pdf")):
        return "unsupported", "a PostScript or PDF file, not a photo"
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!--")) and b"<svg" in start):
        return "svg", "an SVG drawing, not a photo"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--", b"<script")):
        return "html_page", "an HTML page, not a photo"
    if start.startswith(b"<?xml"):
        return "not_an_image", "XML, not a photo"
    return "not_an_image", "unknown bytes, not a photo"
