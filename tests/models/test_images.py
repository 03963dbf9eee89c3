"""Photos as real folders hold them: each is an upright RGB image, or one of four named errors."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm4rec_spark.models.images import PhotoError, decode

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Noise: it can't be compressed away, so that a cut file really lacks pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares its size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(PhotoError) as refused:
        decode(data, 224)
    return refused.value.error_class, str(refused.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "an HTML page, not a photo"),
        (b"\n  <HTML><head></head></HTML>", "an HTML page, not a photo"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "XML or SVG, not a photo"),
        (b'<?xml version="1.0"?><svg/>', "XML or SVG, not a photo"),
        (b"\x00" * 100, "unknown bytes, not a photo"),
        (b"\xff", "unknown bytes, not a photo"),
    ],
    ids=["html", "html in capitals", "svg", "xml", "zeros", "one byte"],
)
def test_what_is_no_photo_is_called_by_its_name(data: bytes, message: str) -> None:
    assert refusal(data) == ("not_an_image", message)


def test_no_bytes_are_empty() -> None:
    assert refusal(b"") == ("empty", "the photo has no bytes")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_half_a_file_is_truncated(kind: str) -> None:
    data = encoded(photo(), kind)
    error_class, message = refusal(data[: len(data) // 2])
    assert error_class == "truncated"
    assert message.startswith("the photo ends early or is damaged: ")


def test_flipped_bytes_never_raise_anything_else() -> None:
    rng, outcomes = np.random.default_rng(1), set()
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        data = encoded(photo(), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 12):
                damaged[place] = rng.integers(256)
            try:
                outcomes.add(decode(bytes(damaged), 32).mode)
            except PhotoError as refused:
                outcomes.add(refused.error_class)
    assert {"RGB", "truncated"} <= outcomes <= {"RGB", "truncated", "not_an_image", "too_large"}


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (10_001, 10_000)])
def test_a_huge_declared_size_is_refused_before_any_pixel_is_read(width: int, height: int) -> None:
    assert refusal(png_header(width, height))[0] == "too_large"


def test_a_hundred_megapixels_may_be_declared() -> None:
    assert refusal(png_header(10_000, 10_000))[0] == "truncated"


def test_cmyk_becomes_rgb() -> None:
    image = decode(encoded(Image.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG", quality=100), 224)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(image, int) - RED).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_lies_on_white(kind: str) -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*BLUE, 0))
    shown = decode(encoded(image, kind, lossless=True), 224)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_half_transparent_is_half_white() -> None:
    image = decode(encoded(Image.new("RGBA", (1, 1), (*RED, 128)), "PNG"), 224)
    assert image.getpixel((0, 0)) == (255, 127, 127)


def test_a_transparent_palette_entry_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    shown = decode(encoded(image, "PNG", transparency=1), 224)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_a_photo_taken_sideways_stands_upright() -> None:
    upright = Image.new("RGB", (16, 32), RED)
    upright.paste(BLUE, (0, 16, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif), 224)
    assert (image.size, image.getpixel((8, 4)), image.getpixel((8, 28))) == ((16, 32), RED, BLUE)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    data = encoded(first, kind, save_all=True, append_images=[second], duration=100, lossless=True)
    assert np.abs(np.asarray(decode(data, 224), int) - RED).max() <= 2


def test_sixteen_bits_keep_their_shades() -> None:
    grey = Image.fromarray(np.array([[0, 128 * 257, 65_535]], np.uint16))
    image = decode(encoded(grey, "PNG"), 224)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_ends_as_rgb(mode: str) -> None:
    image = Image.new("I;16", (5, 4), 65_535) if mode == "I;16" else Image.new("RGB", (5, 4), "white").convert(mode)
    shown = decode(encoded(image, "PNG"), 224)
    assert (shown.mode, shown.size, shown.getpixel((4, 3))) == ("RGB", (5, 4), WHITE)


@pytest.mark.parametrize(
    ("size", "shown"), [((400, 200), (100, 50)), ((200, 400), (50, 100)), ((30, 20), (30, 20)), ((5_000, 2), (100, 1))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_longer_side_is_bounded_and_nothing_is_enlarged(
    kind: str, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert decode(encoded(Image.new("RGB", size, RED), kind), 100).size == shown
