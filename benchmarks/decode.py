"""Photos decoded and resized per second and core: this project's `decode` against plain Pillow.

    .venv/bin/python benchmarks/decode.py [--seconds 20]

Plain Pillow is open, convert("RGB") and resize to the same size, with its defaults. Eight photos of
2,000 pixels are drawn here, as JPEGs and as PNGs. The two take turns on one thread, each with all
photos, and alternate in who goes first. Time is the processor time of that thread, so other load on
the machine affects both alike. The figure is the median ratio of the turns. Above 1, `decode` is
faster.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.models.photos.decode import decode

SIZE = (2_000, 1_500)
PHOTOS = 8
MAX_SIDE = 672
"""The default of caption.model.max_side."""
# Quality as cameras and shops use it. Pillow's own default is 75.
OPTIONS = {"JPEG": {"quality": 90}, "PNG": {}}
KEYS = {"JPEG": "vs_pillow", "PNG": "vs_pillow_png"}


class Turn(NamedTuple):
    """Seconds for all photos."""

    decode: float
    pillow: float


def photo(seed: int) -> Image.Image:
    """A photo-like image, 0.6 MB as a JPEG: detail of every size, weaker the finer, and edges."""
    rng = np.random.default_rng(seed)
    scene = np.full((SIZE[1], SIZE[0], 3), 128, np.float32)
    for octave in range(1, 12):  # to single pixels
        shape = (3 * 2**octave // 4, 2**octave, 3)
        noise = Image.fromarray(rng.normal(128, 60, shape).clip(0, 255).astype(np.uint8))
        scene += (np.asarray(noise.resize(SIZE), np.float32) - 128) / octave
    image = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        start = rng.integers(0, (SIZE[0] - 400, SIZE[1] - 400))
        end = start + rng.integers(100, 400, 2)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        color = tuple(rng.integers(0, 256, 3).tolist())
        shape((*start.tolist(), *end.tolist()), fill=color)
    return image


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **OPTIONS[kind])
    return buffer.getvalue()


def by_decode(data: bytes) -> Image.Image:
    return decode(data, MAX_SIDE)


def by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize((MAX_SIDE, round(MAX_SIDE * image.height / image.width)))


def seconds_for(decoder: Callable[[bytes], Image.Image], photos: Sequence[bytes]) -> float:
    start = time.thread_time()
    for data in photos:
        decoder(data)
    return time.thread_time() - start


def measure(photos: Sequence[bytes], seconds: float) -> list[Turn]:
    # This also warms both up.
    assert all(by_decode(data).size == by_pillow(data).size for data in photos)
    turns: list[Turn] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(turns) < 2:
        order = (by_decode, by_pillow) if len(turns) % 2 else (by_pillow, by_decode)
        times = {decoder: seconds_for(decoder, photos) for decoder in order}
        turns.append(Turn(times[by_decode], times[by_pillow]))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long each kind of file is measured"
    )
    options = parser.parse_args()
    images = [photo(seed) for seed in range(PHOTOS)]
    result: dict[str, float] = {}
    title = f"{SIZE[0]:,} × {SIZE[1]:,} pixels to {MAX_SIDE}, one thread"
    table = Table(title=title, title_justify="left")
    for name in ("file", "MB", "photos/s", "plain Pillow", "ratio", "turns"):
        table.add_column(name, justify="left" if name == "file" else "right")
    for kind, key in KEYS.items():
        photos = [encoded(image, kind) for image in images]
        turns = measure(photos, options.seconds)
        result[key] = round(median(turn.pillow / turn.decode for turn in turns), 2)
        table.add_row(
            kind,
            f"{sum(map(len, photos)) / PHOTOS / 1e6:.1f}",
            f"{PHOTOS / median(turn.decode for turn in turns):.1f}",
            f"{PHOTOS / median(turn.pillow for turn in turns):.1f}",
            f"{result[key]:.2f}",
            f"{len(turns)}",
        )
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
