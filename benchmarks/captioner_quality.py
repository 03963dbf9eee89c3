"""How good the packaged captioner is, on photos that it never saw, and how quick.

    .venv/bin/python benchmarks/captioner_quality.py [--model FOLDER] [--data FOLDER]

Captions of studio photos, snapshots and renderings, read by `extract_attributes`, beside those of a blank photo, the
commonest class, and a linear probe on features of EfficientNet-Lite0. Then the stage's rate on two cores, the seconds
to a cold worker's first caption, and the wheel's size. A quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from captioner_data import (
    CLASSES,
    DATA,
    SNAPSHOT_KINDS,
    TEST_SEED,
    clothing_photos,
    fashion,
    renderings,
    snapshots,
)
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.demo.drawing import ATTRIBUTES
from vlm4rec_spark.models.captioning.caption_template import attribute_values, extract_attributes
from vlm4rec_spark.models.captioning.captioner import PACKAGED_MODEL
from vlm4rec_spark.models.photos.decode import PhotoError, decode
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.training.measure import Share, blank, describe, shares
from vlm4rec_spark.training.teacher import Teacher

NAMES = {"kind": "article_type", "colour": "colour", "audience": "gender", "use": "usage"}
PROBED, RENDERED, STAGED = 8_000, 1_000, 3_000
SEED = 0
FIRST = """
import io, sys, time
import torch, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
from vlm4rec_spark.models.captioning.captioner import ModelSettings, Request, caption_all, load_captioner
began = time.monotonic()
captioner = load_captioner(ModelSettings(model=sys.argv[1]))
photo = Image.effect_noise((600, 800), 40).convert("RGB")
caption_all(captioner, [Request("first", photo, "Describe it.")])
print(time.monotonic() - began)
"""


def pictures(photos: Sequence[bytes]) -> list[Image.Image]:
    return [picture(photo) for photo in photos]


def picture(photo: bytes) -> Image.Image:
    try:
        return decode(photo, 672)
    except PhotoError:  # a few studio photos show nothing
        return blank()


def features(photos: Sequence[bytes], say: Callable[[str], None]) -> torch.Tensor:
    """(n, 1280) of EfficientNet-Lite0."""
    teacher, found = Teacher("cpu"), []
    for first in range(0, len(photos), 64):
        resized = [
            np.asarray(photo.resize((160, 160))) for photo in pictures(photos[first : first + 64])
        ]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found.append(teacher.features(pixels))
        if first // 64 % 25 == 0:
            say(f"features of {first:,} of {len(photos):,} photos")
    return torch.cat(found)


def probe(known: torch.Tensor, labels: pd.Series, asked: torch.Tensor, truth: pd.Series) -> float:
    """Share that softmax regression on the features gets right, where label and truth are known."""
    codes, values = pd.factorize(labels)
    there, classes = torch.from_numpy(codes >= 0), torch.from_numpy(codes)
    mean, spread = known.mean(0), known.std(0) + 1e-6
    x, y = ((known - mean) / spread)[there], classes[there]
    torch.manual_seed(SEED)
    linear = torch.nn.Linear(x.shape[1], len(values))
    optimiser = torch.optim.AdamW(linear.parameters(), 3e-3, weight_decay=0.3)
    for _ in range(200):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(linear(x), y, label_smoothing=0.05).backward()
        optimiser.step()
    with torch.no_grad():
        guessed = pd.Series(values[linear((asked - mean) / spread).argmax(1).numpy()], truth.index)
    return float((guessed == truth)[truth.notna()].mean())


def studio(
    model: Path, data: Path, say: Callable[[str], None]
) -> tuple[dict[str, Share], dict[str, float]]:
    """Shares of the test photos' captions, and the probe's, by attribute."""
    rows = fashion(data / "fashion")
    test, train = rows[rows["test"]], rows[~rows["test"]].sample(PROBED, random_state=SEED)
    truth = [known(row) for row in test[list(NAMES)].to_dict("records")]
    values = attribute_values(known(row) for row in rows[list(NAMES)].to_dict("records"))
    # A snapshot's word for a kind of clothing is an answer too, a wrong one.
    values["kind"] = sorted({*values["kind"], *SNAPSHOT_KINDS.values()})
    said = describe(
        model, [blank(), *pictures(test["image"])], lambda done: say(f"captions: {done:,}")
    )
    seen, asked = features(train["image"].tolist(), say), features(test["image"].tolist(), say)
    probed = {name: probe(seen, train[name], asked, test[name]) for name in NAMES}
    return shares(said[1:], said[0], truth, values), probed


def known(row: dict) -> dict[str, str]:
    return {name: value for name, value in row.items() if isinstance(value, str)}


def people(
    model: Path, data: Path, say: Callable[[str], None]
) -> tuple[int, float, float, float, float]:
    """Photos of clothing-photos, and the share of them in which the class is right: of captions, of a blank photo's, of
    the commonest class, and of the probe."""
    rows, train = clothing_photos(data / "clothing-photos"), snapshots(data / "clothing-labelled")
    words = {
        "kind": sorted(
            {*SNAPSHOT_KINDS.values(), *(word for each in CLASSES.values() for word in each)}
        )
    }
    nothing, *said = describe(model, [blank(), *pictures(rows["image"])])
    kinds = [extract_attributes(text, words).get("kind") for text in said]
    right = np.mean(
        [kind in CLASSES[name] for kind, name in zip(kinds, rows["class_name"], strict=True)]
    )
    unseen = np.mean(
        [
            extract_attributes(nothing, words).get("kind") in CLASSES[name]
            for name in rows["class_name"]
        ]
    )
    names = {kind: name for name, each in CLASSES.items() for kind in each}
    seen, asked = features(train["image"].tolist(), say), features(rows["image"].tolist(), say)
    probed = probe(seen, train["kind"].map(names), asked, rows["class_name"])
    return (
        len(rows),
        float(right),
        float(unseen),
        rows["class_name"].value_counts(normalize=True).iloc[0],
        probed,
    )


def drawn(model: Path) -> dict[str, Share]:
    rows = renderings(RENDERED, TEST_SEED)
    said = describe(model, [blank(), *pictures(rows["image"])])
    values = {name: list(each) for name, each in ATTRIBUTES.items()}
    return shares(said[1:], said[0], rows[list(ATTRIBUTES)].to_dict("records"), values)


def staged(model: Path, data: Path, folder: Path) -> float:
    """Photos per second of the caption stage, tables and commits included, on two cores."""
    rows = fashion(data / "fashion").drop_duplicates("image").sample(STAGED, random_state=SEED)
    rows[["item_id", "title", "image"]].to_parquet(folder / "items.parquet")
    config = load(
        [],
        [
            f"tables={folder / 'tables'}",
            "spark.master=local[2]",
            "ingest.items.format=parquet",
            f"ingest.items.path=['{folder / 'items.parquet'}']",
            "ingest.photos.bytes_column=image",
            f"caption.model.model={model}",
        ],
    )
    spark = session(config.spark)
    spark.sparkContext.setLogLevel("FATAL")
    outcomes = []
    reporter = Reporter(
        stage=lambda run_id, stage: None, info=lambda text: None, progress=lambda *_: nullcontext()
    )
    Pipeline(spark, config, reporter).run(["ingest", "caption"], outcomes.append)
    spark.stop()
    return outcomes[-1].ok / outcomes[-1].seconds


def first_caption(model: Path) -> float:
    """Seconds from a new process, its imports done, to its first caption."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(model)], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def wheel_mb(folder: Path) -> float:
    # Of a copy, since building leaves files behind.
    left = shutil.ignore_patterns(".*", "build", "demo-output", "*.egg-info", "__pycache__")
    copy = shutil.copytree(Path(__file__).resolve().parents[1], folder / "project", ignore=left)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(copy),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl")).stat().st_size / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", type=Path, default=PACKAGED_MODEL)
    options.add_argument("--data", type=Path, default=DATA)
    given = options.parse_args()
    if not given.data.is_dir():
        sys.exit(f"{given.data} isn't there. Name the folder of the data: --data FOLDER")
    quiet()
    console, began = Console(width=110), time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:4.0f} s  {text}", style="dim")

    table = Table(title="Right, in generated captions", title_justify="left")
    for name in (
        "photos",
        "attribute",
        "of them",
        "captions",
        "blank photo",
        "commonest",
        "linear probe",
    ):
        table.add_column(name, justify="left" if name in ("photos", "attribute") else "right")

    def row(photos: str, name: str, count: int, *figures: float) -> None:
        table.add_row(photos, name, f"{count:,}", *(f"{figure:.3f}" for figure in figures))

    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        result["photos_per_s"] = round(staged(given.model, given.data, Path(place)), 1)
    say(f"stage: {result['photos_per_s']} photos/s")
    found, probed = studio(given.model, given.data, say)
    for name, key in NAMES.items():
        share = found[name]
        row("studio", key, share.photos, share.right, share.blank, share.majority, probed[name])
        result |= {
            key: round(share.right, 4),
            f"{key}_blank": round(share.blank, 4),
            f"{key}_majority": round(share.majority, 4),
            f"{key}_probe": round(probed[name], 4),
        }
    count, *figures = people(given.model, given.data, say)
    row("snapshots", "class", count, *figures)
    for key, figure in zip(("", "_blank", "_majority", "_probe"), figures, strict=True):
        result[f"clothing_photos{key}"] = round(figure, 4)
    shown = drawn(given.model)
    for name, share in shown.items():
        row("renderings", name, share.photos, share.right, share.blank, share.majority)
        result[f"rendering_{name}"] = round(share.right, 4)
    result["first_caption_s"] = round(first_caption(given.model), 2)
    with tempfile.TemporaryDirectory() as place:
        result["wheel_mb"] = round(wheel_mb(Path(place)), 1)
    console.print(table)
    console.print(
        f"stage {result['photos_per_s']} photos/s on two cores, first caption of a cold worker after "
        f"{result['first_caption_s']} s, wheel {result['wheel_mb']} MB"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
