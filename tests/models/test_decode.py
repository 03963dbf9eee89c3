"""Photos as real folders hold them: each becomes an upright RGB image, or one named error."""

import io

import numpy as np
import pytest
from hostile_photos import BLUE, GOOD, HOSTILE, RED, WHITE, encoded, photo, png_header
from PIL import Image

from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.photo_errors import PHOTO_ERRORS, PhotoError


def refusal(data: bytes) -> PhotoError:
    with pytest.raises(PhotoError) as error:
        decode(data, 224)
    return error.value


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_photo_gets_its_class(name: str):
    data, error_class = HOSTILE[name]
    assert refusal(data).error_class == error_class


def test_there_is_a_hostile_photo_of_every_class():
    assert {error_class for _, error_class in HOSTILE.values()} == set(PHOTO_ERRORS)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_photo_is_decoded(name: str):
    image = decode(GOOD[name], 240)
    assert image.mode == "RGB"
    assert sorted(image.size) == ([160, 240] if name == "large" else [48, 64])


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
def test_the_message_says_what_is_wrong(name: str, message: str):
    assert str(refusal(HOSTILE[name][0])) == message


def test_the_message_of_a_damaged_photo_has_that_of_pillow():
    message = str(refusal(HOSTILE["half-jpeg"][0]))
    assert message.startswith("the photo ends early or is damaged: ")


def test_postscript_starts_no_ghostscript(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    refusal(HOSTILE["postscript"][0])
    assert not (tmp_path / "started").exists()


def test_flipped_bytes_raise_nothing_else():
    rng = np.random.default_rng(1)
    results = set()
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        data = encoded(photo(), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for offset in rng.integers(0, len(data), 12):
                damaged[offset] = rng.integers(256)
            try:
                results.add(decode(bytes(damaged), 32).mode)
            except PhotoError as error:
                results.add(error.error_class)
    assert {"RGB", "truncated"} <= results <= {"RGB", *PHOTO_ERRORS}


def test_a_hundred_megapixels_may_be_declared():
    assert refusal(png_header(10_000, 10_000)).error_class == "truncated"


def reencoded(
    image: Image.Image,
    kind: str,
    max_side: int = 224,
    **options: object,
) -> Image.Image:
    return decode(encoded(image, kind, **options), max_side)


def halves(
    left_color: object, right_color: object, mode: str = "RGB", size: tuple[int, int] = (16, 8)
) -> Image.Image:
    image = Image.new(mode, size, left_color)  # type: ignore[arg-type]
    image.paste(right_color, (size[0] // 2, 0, *size))  # type: ignore[arg-type]
    return image


def half_colors(image: Image.Image) -> np.ndarray:
    """The colors in the middle of the left and the right half: int (2, 3)."""
    row = np.asarray(image, int)[image.height // 2]
    return row[[image.width // 4, image.width * 3 // 4]]


def assert_half_colors(
    image: Image.Image, left_color: object, right_color: object, tolerance: int = 0
) -> None:
    np.testing.assert_allclose(half_colors(image), [left_color, right_color], atol=tolerance)


def test_cmyk_becomes_rgb():
    cmyk = halves(RED, WHITE).convert("CMYK")
    image = reencoded(cmyk, "JPEG", quality=100)
    assert image.mode == "RGB"
    assert image.size == (16, 8)
    assert_half_colors(image, RED, WHITE, tolerance=4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pixels_become_white(kind: str):
    image = halves((*RED, 255), (*BLUE, 0), "RGBA")
    assert_half_colors(reencoded(image, kind, lossless=True), RED, WHITE)


def test_half_transparent_pixels_become_half_white():
    image = halves((*RED, 128), (*BLUE, 255), "RGBA")
    assert_half_colors(reencoded(image, "PNG"), (255, 127, 127), BLUE)


def test_transparent_pixels_leave_no_edge_in_a_smaller_image():
    image = halves((*RED, 255), (0, 0, 0, 0), "RGBA", (640, 320))
    row = np.asarray(reencoded(image, "PNG", 64))[16]
    # The invisible black would darken the edge. Red and white both have full red.
    assert row[:, 0].min() >= 254


def test_a_transparent_palette_entry_becomes_white():
    image = halves(0, 1, "P")
    image.putpalette([*RED, *BLUE])
    assert_half_colors(reencoded(image, "PNG", transparency=1), RED, WHITE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("max_side", [320, 64])
def test_a_sideways_photo_is_turned_upright(kind: str, max_side: int):
    upright = halves(RED, BLUE, size=(320, 160)).transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    image = reencoded(sideways, kind, max_side, exif=exif)
    assert image.size == (max_side // 2, max_side)
    turned_back = image.transpose(Image.Transpose.ROTATE_90)
    assert_half_colors(turned_back, RED, BLUE, tolerance=8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind: str):
    image = reencoded(
        halves(RED, WHITE),
        kind,
        save_all=True,
        append_images=[halves(BLUE, WHITE)],
        duration=100,
        lossless=True,
    )
    assert_half_colors(image, RED, WHITE, tolerance=2)


def test_sixteen_bits_keep_their_shades():
    shades = np.array([[0, 128 * 257, 65_535]], np.uint16)
    gray = Image.fromarray(np.repeat(shades, 8, axis=0).repeat(8, axis=1))
    image = np.asarray(reencoded(gray, "PNG"))
    assert image[4, [4, 12, 20]].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_ends_as_rgb(mode: str):
    image = halves("black", "white").convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = halves(0, 65_535, mode)
    decoded = reencoded(image, "PNG")
    assert decoded.mode == "RGB"
    assert decoded.size == (16, 8)
    assert_half_colors(decoded, (0, 0, 0), WHITE)


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
):
    assert reencoded(halves(RED, BLUE, size=size), kind, 100).size == small


def test_the_shortcut_for_large_jpegs_changes_no_pixel_much():
    smooth = photo(20, 15).resize((2_000, 1_500), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    plain = Image.open(io.BytesIO(data)).convert("RGB").resize((672, 504))
    difference = np.asarray(decode(data, 672), int) - np.asarray(plain, int)
    assert np.abs(difference).mean() < 1


def test_heic_needs_its_extra(monkeypatch):
    heif = pytest.importorskip("pillow_heif", reason="the extra heic isn't installed")
    buffer = io.BytesIO()
    heif.from_pillow(halves(RED, BLUE, size=(64, 32))).save(buffer, quality=95)
    data = buffer.getvalue()
    assert_half_colors(decode(data, 224), RED, BLUE, tolerance=8)
    assert refusal(data[:300]).error_class == "truncated"
    monkeypatch.setattr("vlm4rec_spark.models.photos.decode._can_read_heif", lambda: ())
    error = refusal(data)
    assert error.error_class == "unsupported"
    assert str(error) == "a HEIC photo, which needs: pip install 'vlm4rec_spark[heic]'"
