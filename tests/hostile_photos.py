"""Photos as real folders hold them: GOOD ones of every kind, and HOSTILE ones with their errors."""

import gzip
import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

RED = (255, 0, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)


def encoded(
    image: Image.Image,
    kind: str,
    **options: object,
) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_color(color: object, side: int = 8) -> bytes:
    """A PNG of this color with one white pixel: without it, the photo would be blank."""
    image = Image.new("RGB", (side, side), color)  # type: ignore[arg-type]
    image.putpixel((0, 0), WHITE)
    return encoded(image, "PNG")


def photo(
    width: int = 64,
    height: int = 48,
    seed: int = 0,
) -> Image.Image:
    """Noise: it can't be compressed, so that a truncated file really lacks pixels."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(
    width: int,
    height: int,
    comment: bytes = b"",
) -> bytes:
    """A PNG that declares a size and has no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + comment + chunk(b"IDAT", b"")


def _compressed_comment() -> bytes:
    """A PNG comment of 100 MB in 100 kB."""
    return chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(b" " * 100_000_000))


def _jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose frame header declares a wrong size."""
    data = encoded(photo(), "JPEG")
    start = data.index(b"\xff\xc0")
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def _half(kind: str, **options: object) -> bytes:
    data = encoded(photo(), kind, **options)
    return data[: len(data) // 2]


def _overwritten(
    data: bytes,
    start: int,
    new: bytes,
) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def _zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", encoded(photo(), "JPEG"))
    return buffer.getvalue()


_KINDS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "JPEG2000")
_PNG = encoded(photo(), "PNG")
_GIF = encoded(photo(), "GIF")
_BMP = encoded(photo(), "BMP")

_BY_CLASS: dict[str, dict[str, bytes]] = {
    "empty": {
        "empty": b"",
    },
    "html_page": {
        "not-found": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "capitals": b"\n  <HTML><head></head></HTML>",
        "comment-first": b"<!-- cached --><html></html>",
        "byte-order-mark": b"\xef\xbb\xbf<html></html>",
        "script": b"<script>location='/login'</script>",
    },
    "svg": {
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "drawing-declared": b'<?xml version="1.0"?><svg/>',
        "drawing-commented": b"<!-- Inkscape --><svg/>",
    },
    "not_an_image": {
        "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "json": b'{"error": "forbidden"}',
        "text": b"photo to follow",
        "zeros": b"\x00" * 100,
        "one-byte": b"\xff",
        "gzip": gzip.compress(encoded(photo(), "JPEG")),
        "zip": _zipped(),
        "pickle": pickle.dumps({"photo": 1}),
        "program": b"MZ\x90\x00\x03" + b"\x00" * 200,
        "film": b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom",
    },
    "unsupported": {
        "pdf": b"%PDF-1.7\n1 0 obj\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n",
        "lab": encoded(Image.new("LAB", (16, 16)), "TIFF"),
        "floats": encoded(Image.new("F", (16, 16)), "TIFF"),
    },
    "truncated": {
        **{f"half-{kind.lower()}": _half(kind) for kind in _KINDS},
        "half-progressive": _half("JPEG", progressive=True),
        "jpeg-header-only": _jpeg_of_size(64, 48)[:300],
        "png-header-only": png_header(640, 480),
        "png-pixels-damaged": _overwritten(_PNG, len(_PNG) // 2, b"\x00" * 50),
    },
    "too_large": {
        "bomb-png": png_header(20_000, 20_000),
        "bomb-just": png_header(10_001, 10_000),
        "bomb-jpeg": _jpeg_of_size(65_500, 65_500),
        "bomb-gif": _overwritten(_GIF, 6, struct.pack("<HH", 65_535, 65_535)),
        "bomb-bmp": _overwritten(_BMP, 18, struct.pack("<ii", 100_000, 100_000)),
        "bomb-text": png_header(64, 48, _compressed_comment()),
    },
    "too_small": {
        "pixel-gif": encoded(Image.new("P", (1, 1)), "GIF"),
        "pixel-png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "pixel-jpeg": encoded(Image.new("RGB", (1, 1)), "JPEG"),
        "hairline": encoded(photo(5_000, 2), "PNG"),
    },
    "blank": {
        "white": encoded(Image.new("RGB", (640, 480), WHITE), "JPEG"),
        "black": encoded(Image.new("1", (64, 48)), "PNG"),
        "transparent": encoded(Image.new("RGBA", (64, 48), (*RED, 0)), "PNG"),
        "grey-16-bits": encoded(Image.new("I;16", (64, 48), 30_000), "PNG"),
        "cyan": encoded(Image.new("CMYK", (64, 48), (255, 0, 0, 0)), "JPEG"),
    },
}

HOSTILE = {
    name: (data, error_class)
    for error_class, photos in _BY_CLASS.items()
    for name, data in photos.items()
}
"""Bytes and error class by name."""


def _sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


_PHOTO = photo()
_SECOND = photo(seed=1)
_FRAMES = {"save_all": True, "append_images": [_SECOND], "duration": 100}
_HALF_TRANSPARENT = Image.merge("RGBA", (*_PHOTO.split(), _PHOTO.getchannel("R")))
_SIXTEEN_BITS = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21)

GOOD: dict[str, bytes] = {
    **{kind.lower(): encoded(_PHOTO, kind) for kind in _KINDS},
    "progressive": encoded(_PHOTO, "JPEG", progressive=True),
    "cmyk": encoded(_PHOTO.convert("CMYK"), "JPEG"),
    "grey": encoded(_PHOTO.convert("L"), "JPEG"),
    "sideways": encoded(_PHOTO, "JPEG", exif=_sideways()),
    "broken-exif": encoded(_PHOTO, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00"),
    "half-transparent": encoded(_HALF_TRANSPARENT, "PNG"),
    "palette": encoded(_PHOTO.convert("P"), "PNG"),
    "one-bit": encoded(_PHOTO.convert("1"), "PNG"),
    "grey-alpha": encoded(_PHOTO.convert("LA"), "PNG"),
    "sixteen-bits": encoded(_SIXTEEN_BITS, "PNG"),
    "animated-gif": encoded(_PHOTO, "GIF", **_FRAMES),
    "animated-png": encoded(_PHOTO, "PNG", **_FRAMES),
    "animated-webp": encoded(_PHOTO, "WEBP", **_FRAMES),
    "stereo": encoded(_PHOTO, "MPO", save_all=True, append_images=[_SECOND]),
    "large": encoded(photo(3_000, 2_000), "JPEG", quality=30),
}
