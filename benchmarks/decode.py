"""Photos decoded and made small per second and core: this project's `decode` beside plain Pillow.

    .venv/bin/python benchmarks/decode.py [--seconds 20]

Plain Pillow is open, convert("RGB"), resize to the same size, with its defaults. Eight distinct photos of 2,000 pixels
are drawn here, as JPEGs and as PNGs. The two take turns on one thread, all photos in each turn and the first turn given
to the one and to the other, and time is that thread's processor time; so what else the machine does hits both alike.
The figure is the median of the turns' ratios, above 1 where `decode` is the quicker.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.models.photos.decode import decode

SIZE = (2_000, 1_500)
PHOTOS = 8
MAX_SIDE = 672
"""The default of caption.model.max_side."""
# Quality as cameras and shops have it; Pillow's own default is 75.
OPTIONS = {"JPEG": {"quality": 90}, "PNG": {}}


def photo(seed: int) -> Image.Image:
    """Detail of every size, weaker the finer it is, as in photographs (0.6 MB as a JPEG), and sharp edges before it."""
    rng = np.random.default_rng(seed)
    scene = np.full((SIZE[1], SIZE[0], 3), 128, np.float32)
    for octave in range(1, 12):  # to single pixels
        grain = (
            rng.normal(128, 60, (3 * 2**octave // 4, 2**octave, 3)).clip(0, 255).astype(np.uint8)
        )
        scene += (np.asarray(Image.fromarray(grain).resize(SIZE), np.float32) - 128) / octave
    image = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        near = rng.integers(0, (SIZE[0] - 400, SIZE[1] - 400))
        far = near + rng.integers(100, 400, 2)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((*near.tolist(), *far.tolist()), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **OPTIONS[kind])
    return out.getvalue()


def ours(data: bytes) -> Image.Image:
    return decode(data, MAX_SIDE)


def plain(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize((MAX_SIDE, round(MAX_SIDE * image.height / image.width)))


def took(way: Callable[[bytes], Image.Image], photos: Sequence[bytes]) -> float:
    began = time.thread_time()
    for data in photos:
        way(data)
    return time.thread_time() - began


def measure(photos: Sequence[bytes], seconds: float) -> list[tuple[float, float]]:
    """Seconds that each turn over all photos took, ours and plain Pillow's."""
    assert all(ours(data).size == plain(data).size for data in photos)  # and both are warm
    turns, began = list[tuple[float, float]](), time.perf_counter()
    while time.perf_counter() - began < seconds or len(turns) < 2:
        ways = (ours, plain) if len(turns) % 2 else (plain, ours)
        times = {way: took(way, photos) for way in ways}
        turns.append((times[ours], times[plain]))
    return turns


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--seconds", type=float, default=20, help="how long each kind of file is measured"
    )
    given = options.parse_args()
    images, result = [photo(seed) for seed in range(PHOTOS)], dict[str, float]()
    table = Table(
        title=f"{SIZE[0]:,} × {SIZE[1]:,} pixels to {MAX_SIDE}, one thread", title_justify="left"
    )
    for name in ("file", "MB", "photos/s", "plain Pillow", "ratio", "turns"):
        table.add_column(name, justify="left" if name == "file" else "right")
    for kind, key in (("JPEG", "vs_pillow"), ("PNG", "vs_pillow_png")):
        photos = [encoded(image, kind) for image in images]
        turns = measure(photos, given.seconds)
        mine, theirs = (PHOTOS / median(times) for times in zip(*turns, strict=True))
        result[key] = round(median(other / own for own, other in turns), 2)
        table.add_row(
            kind,
            f"{sum(map(len, photos)) / PHOTOS / 1e6:.1f}",
            f"{mine:.1f}",
            f"{theirs:.1f}",
            f"{result[key]:.2f}",
            f"{len(turns)}",
        )
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
