"""Photos as real folders hold them: each is an upright RGB image, or one named error."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hostile_photos import BLUE, GOOD, HOSTILE, RED, WHITE, encoded, photo, png_header
from PIL import Image

from vlm4rec_spark.models.photos.decode import PHOTO_ERRORS, PhotoError, decode


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(PhotoError) as refused:
        decode(data, 224)
    return refused.value.error_class, str(refused.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_photo_gets_its_class(name: str) -> None:
    data, error_class = HOSTILE[name]
    assert refusal(data)[0] == error_class


def test_there_is_a_hostile_photo_of_every_class() -> None:
    assert {error_class for _, error_class in HOSTILE.values()} == set(PHOTO_ERRORS)


@pytest.mark.parametrize("name", GOOD)
def test_each_good_photo_is_seen(name: str) -> None:
    image = decode(GOOD[name], 240)
    assert (image.mode, sorted(image.size)) == ("RGB", [160, 240] if name == "large" else [48, 64])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "the photo has no bytes"),
        ("not-found", "an HTML page, not a photo"),
        ("drawing", "an SVG drawing, not a photo"),
        ("zeros", "unknown bytes, not a photo"),
        ("postscript", "a PostScript or PDF file, not a photo"),
        ("bomb-just", "10001 x 10000 pixels, at most 100,000,000"),
        ("hairline", "5000 x 2 pixels, at least 8 x 8"),
        ("white", "the photo has one color all over"),
    ],
)
def test_the_message_says_what_is_wrong(name: str, message: str) -> None:
    assert refusal(HOSTILE[name][0])[1] == message


def test_a_damaged_photo_says_so_with_what_pillow_found() -> None:
    assert refusal(HOSTILE["half-jpeg"][0])[1].startswith("the photo ends early or is damaged: ")


def test_postscript_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    refusal(HOSTILE["postscript"][0])
    assert not (tmp_path / "started").exists()


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
    assert {"RGB", "truncated"} <= outcomes <= {"RGB", *PHOTO_ERRORS}


def test_a_hundred_megapixels_may_be_declared() -> None:
    assert refusal(png_header(10_000, 10_000))[0] == "truncated"


def halves(
    left: object, right: object, mode: str = "RGB", size: tuple[int, int] = (16, 8)
) -> Image.Image:
    image = Image.new(mode, size, left)  # type: ignore[arg-type]
    image.paste(right, (size[0] // 2, 0, *size))  # type: ignore[arg-type]
    return image


def shown(image: Image.Image) -> list[tuple[int, ...]]:
    """The middles of its halves."""
    return [image.getpixel((image.width * part // 4, image.height // 2)) for part in (1, 3)]  # type: ignore[misc]


def test_cmyk_becomes_rgb() -> None:
    image = decode(encoded(halves(RED, WHITE).convert("CMYK"), "JPEG", quality=100), 224)
    assert (image.mode, image.size) == ("RGB", (16, 8))
    assert np.abs(np.array(shown(image)) - [RED, WHITE]).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_lies_on_white(kind: str) -> None:
    image = halves((*RED, 255), (*BLUE, 0), "RGBA")
    assert shown(decode(encoded(image, kind, lossless=True), 224)) == [RED, WHITE]


def test_half_transparent_is_half_white() -> None:
    image = halves((*RED, 128), (*BLUE, 255), "RGBA")
    assert shown(decode(encoded(image, "PNG"), 224)) == [(255, 127, 127), BLUE]


def test_what_is_transparent_leaves_no_rim_where_it_is_made_smaller() -> None:
    image = halves((*RED, 255), (0, 0, 0, 0), "RGBA", (640, 320))
    row = np.asarray(decode(encoded(image, "PNG"), 64))[16]
    # Black that nobody sees would darken the edge; red on white has red everywhere.
    assert row[:, 0].min() >= 254


def test_a_transparent_palette_entry_lies_on_white() -> None:
    image = halves(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    assert shown(decode(encoded(image, "PNG", transparency=1), 224)) == [RED, WHITE]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("max_side", [320, 64])
def test_a_photo_taken_sideways_stands_upright(kind: str, max_side: int) -> None:
    upright = halves(RED, BLUE, size=(320, 160)).transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode(encoded(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif), max_side)
    assert image.size == (max_side // 2, max_side)
    middles = [image.getpixel((image.width // 2, image.height * part // 4)) for part in (1, 3)]
    assert np.abs(np.array(middles) - [RED, BLUE]).max() <= 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    first, second = halves(RED, WHITE), halves(BLUE, WHITE)
    data = encoded(first, kind, save_all=True, append_images=[second], duration=100, lossless=True)
    assert np.abs(np.array(shown(decode(data, 224))) - [RED, WHITE]).max() <= 2


def test_sixteen_bits_keep_their_shades() -> None:
    grey = Image.fromarray(
        np.repeat(np.array([[0, 128 * 257, 65_535]], np.uint16), 8, axis=0).repeat(8, axis=1)
    )
    image = decode(encoded(grey, "PNG"), 224)
    assert [image.getpixel((4 + 8 * part, 4)) for part in range(3)] == [
        (0,) * 3,
        (128,) * 3,
        (255,) * 3,
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_ends_as_rgb(mode: str) -> None:
    sixteen = halves(0, 65_535, "I;16")
    image = sixteen if mode == "I;16" else halves("black", "white").convert(mode)
    found = decode(encoded(image, "PNG"), 224)
    assert (found.mode, found.size, shown(found)) == ("RGB", (16, 8), [(0, 0, 0), WHITE])


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((400, 200), (100, 50)),
        ((200, 400), (50, 100)),
        ((30, 20), (30, 20)),
        ((5_000, 8), (100, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_longer_side_is_bounded_and_nothing_is_enlarged(
    kind: str, size: tuple[int, int], small: tuple[int, int]
) -> None:
    assert decode(encoded(halves(RED, BLUE, size=size), kind), 100).size == small


def test_a_large_jpeg_is_what_it_would_be_without_the_shorter_way() -> None:
    smooth = photo(20, 15).resize((2_000, 1_500), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    plain = Image.open(io.BytesIO(data)).convert("RGB").resize((672, 504))
    assert np.abs(np.asarray(decode(data, 672), int) - np.asarray(plain, int)).mean() < 1


def test_heic_takes_its_extra_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra heic isn't installed")
    data = io.BytesIO()
    heif.from_pillow(halves(RED, BLUE, size=(64, 32))).save(data, quality=95)
    assert np.abs(np.array(shown(decode(data.getvalue(), 224))) - [RED, BLUE]).max() <= 8
    assert refusal(data.getvalue()[:300])[0] == "truncated"
    monkeypatch.setattr(decode, "_heif", lambda: ())
    assert refusal(data.getvalue()) == (
        "unsupported",
        "a HEIC photo, which needs: pip install 'vlm4rec_spark[heic]'",
    )
