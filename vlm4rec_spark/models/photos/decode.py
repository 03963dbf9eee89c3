"""Photo bytes to an upright RGB image, or a named error. Knows Pillow; knows no models or files."""

import io
import warnings
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm4rec_spark.models.photos.photo_errors import PhotoError

MAX_PIXELS = 100_000_000
"""Larger photos are refused before they are decoded: 100 megapixels are 300 MB of RGB."""
MIN_SIDE = 8
"""Pixels. Smaller images are tracking pixels or bullets, and show nothing to a model."""
_BLANK_RANGE = 8
"""Of 255. A photo is blank if the pixels of each channel lie within this range."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "ICO")
"""Formats of photos. Pillow reads forty more, and for one of them, EPS, it starts Ghostscript."""
_MAGIC_BYTES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"GIF8",
    b"RIFF",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
)
"""A file that begins with these but can't be identified is a damaged photo."""
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


def decode(data: bytes, max_side: int) -> Image.Image:
    """Decode a photo: first frame, EXIF rotation applied, alpha laid on white, RGB.

    The longer side of the result is at most `max_side` pixels. A JPEG is decoded no larger than
    that needs. HEIC needs the extra `heic`. Raises PhotoError.
    """
    if not data:
        raise PhotoError("empty", "the photo has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS + _can_read_heif()) as image:
                _check_size(image)
                photo = _resized(image, max_side)
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Image.DecompressionBombError as bomb:
        raise PhotoError("too_large", str(bomb)) from None
    except (PhotoError, MemoryError):
        raise
    except Exception as damage:  # Pillow's decoders raise a dozen kinds
        if "too large" in str(damage):  # a compressed PNG comment beyond Pillow's limit
            raise PhotoError("too_large", str(damage)) from None
        raise PhotoError("truncated", f"the photo ends early or is damaged: {damage}") from None
    ranges = [lightest - darkest for darkest, lightest in photo.getextrema()]  # type: ignore[misc]
    if max(ranges) <= _BLANK_RANGE:
        raise PhotoError("blank", "the photo has one color all over")
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


def _resized(image: Image.Image, max_side: int) -> Image.Image:
    """Upright and RGB. Resized first, since the steps after it cost time and memory per pixel."""
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
    # A photo with unreadable EXIF data is still a photo.
    with suppress(Exception):
        photo.info["exif"] = source.getexif().tobytes()
        photo = ImageOps.exif_transpose(photo)
    photo.info.clear()
    return photo


@cache
def _can_read_heif() -> tuple[str, ...]:
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener(thumbnails=False)
    return ("HEIF",)


def _unidentified(data: bytes) -> PhotoError:
    """The error for bytes that Pillow can't identify."""
    start = data[:1_024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    container_brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if container_brand in _HEIC_BRANDS and not _can_read_heif():
        return PhotoError(
            "unsupported", "a HEIC photo, which needs: pip install 'vlm4rec_spark[heic]'"
        )
    if container_brand in _HEIC_BRANDS + _AVIF_BRANDS or data.startswith(_MAGIC_BYTES):
        return PhotoError("truncated", "the photo ends early or is damaged: it can't be opened")
    if start.startswith((b"%!ps", b"%pdf")):
        return PhotoError("unsupported", "a PostScript or PDF file, not a photo")
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!--")) and b"<svg" in start):
        return PhotoError("svg", "an SVG drawing, not a photo")
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--", b"<script")):
        return PhotoError("html_page", "an HTML page, not a photo")
    if start.startswith(b"<?xml"):
        return PhotoError("not_an_image", "XML, not a photo")
    return PhotoError("not_an_image", "unknown bytes, not a photo")
