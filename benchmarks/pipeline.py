"""Time and memory of every stage as items and users grow, on synthetic shops.

    .venv/bin/python benchmarks/pipeline.py [--items 1000,10000] [--users 10000,100000] [--plot SVG]

Items grow at the smallest number of users, and users at the smallest number of items, so that each
slope is of one of them. Photos are 8 px PNGs and the captioner is the fake. All else is as in a
real shop: Parquet files, MiniLM, ScaNN from 20,000 items on, Delta. Every shop has a driver of its
own (local[*]), whose memory is measured: its JVM and Python together, and the largest Python worker
with its model's process. The slope of a stage is that of log(seconds) over log(items or users) by
least squares.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from memory import peaks
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.pipeline import STAGES, Pipeline, Reporter
from vlm4rec_spark.report import charts
from vlm4rec_spark.spark.session import session

EVENTS_PER_USER = 8
LOG_PART = 1_000_000
StageFigures = dict[str, dict[str, float]]
"""By stage: seconds and peak memory."""


class Shop(NamedTuple):
    items: int
    users: int


def make(folder: Path, shop: Shop) -> None:
    """catalogue.parquet with photos, and a log in parts; popularity is Zipf's (exponent 1)."""
    rng = np.random.default_rng([shop.items, shop.users])
    ids = np.array([f"item-{n:07d}" for n in range(shop.items)])
    colours = rng.integers(0, 256, (shop.items, 3), dtype=np.uint8)
    columns = {
        "item_id": ids,
        "title": [f"Product {n}" for n in range(shop.items)],
        "photo": [_png(colour) for colour in colours],
    }
    pq.write_table(pa.table(columns), folder / "catalogue.parquet")
    share = 1 / np.arange(1, shop.items + 1)
    edges = np.cumsum(share) / share.sum()
    (folder / "log").mkdir()
    events = shop.users * EVENTS_PER_USER
    for part, first in enumerate(range(0, events, LOG_PART)):
        users = np.arange(first, min(events, first + LOG_PART)) // EVENTS_PER_USER
        log = _log(users, ids, edges, rng)
        pq.write_table(log, folder / "log" / f"{part:04d}.parquet")


def _log(
    users: np.ndarray, ids: np.ndarray, edges: np.ndarray, rng: np.random.Generator
) -> pa.Table:
    """An event of each user; `edges` are the items' cumulative shares."""
    start = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp())
    items = np.minimum(np.searchsorted(edges, rng.random(len(users))), len(ids) - 1)
    seconds = start + rng.integers(0, 150 * 86_400, len(users))
    columns = {
        "user_id": np.char.add("user-", users.astype(str)),
        "item_id": ids[items],
        "event_type": rng.choice(["view", "cart", "purchase"], len(users), p=[0.8, 0.1, 0.1]),
        "event_time": seconds.astype(str),
    }
    return pa.table(columns)


def _png(colour: np.ndarray) -> bytes:
    out = io.BytesIO()
    image = Image.new("RGB", (8, 8), tuple(map(int, colour)))
    image.putpixel((0, 0), (255, 255, 255))  # a photo of one colour all over shows nothing
    image.save(out, "PNG")
    return out.getvalue()


def run_one(folder: Path) -> StageFigures:
    quiet()
    settings = [
        f"tables={folder}/tables",
        f"index.folder={folder}/index",
        f"report.path={folder}/report.html",
        f"ingest.items.path=['{folder}/catalogue.parquet']",
        "ingest.items.format=parquet",
        "ingest.photos.bytes_column=photo",
        f"ingest.interactions.path=['{folder}/log']",
        "ingest.interactions.format=parquet",
    ]
    config = load([], [*settings, "caption.model.backend=fake", "spark.driver_memory=6g"])
    spark = session(config.spark)
    spark.sparkContext.setLogLevel("FATAL")
    silence = Reporter(lambda run_id, stage: None, lambda line: None, lambda *_: nullcontext())
    pipeline = Pipeline(spark, config, silence)
    figures = {}
    for stage in STAGES:
        with peaks() as peak:
            (result,) = pipeline.run([stage])
        figures[stage] = {"seconds": result.seconds, **peak}
        print(f"  {stage}: {result.seconds:,.1f} s", file=sys.stderr, flush=True)
    spark.stop()
    return figures


def measure(shop: Shop) -> StageFigures:
    """Of this shop, in a process of its own."""
    print(f"{shop.items:,} items, {shop.users:,} users", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), shop)
        command = [sys.executable, __file__, "--one", folder]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


class Sweep(NamedTuple):
    """Seconds by stage at every size."""

    sizes: list[int]
    seconds: dict[str, list[float]]

    @classmethod
    def of(
        cls,
        sizes: list[int],
        figures: list[StageFigures],
    ) -> Sweep:
        return cls(sizes, {stage: [row[stage]["seconds"] for row in figures] for stage in STAGES})

    def slope(self, stage: str) -> float:
        return float(np.polyfit(np.log(self.sizes), np.log(self.seconds[stage]), 1)[0])

    def max_slope(self) -> float:
        return round(max(map(self.slope, STAGES)), 3)


def show(
    by_shop: dict[Shop, StageFigures],
    by_users: Sweep,
    by_items: Sweep,
) -> None:
    table = Table(title="Seconds (driver GB, largest worker GB)", title_justify="left")
    table.add_column("stage")
    for shop in by_shop:
        table.add_column(f"{shop.items:,} items\n{shop.users:,} users", justify="right")
    slopes = Table(title="Slopes", title_justify="left")
    slopes.add_column("stage")
    slopes.add_column("in users", justify="right")
    slopes.add_column("in items", justify="right")
    words = "{seconds:,.1f} ({driver_gb:.1f}, {worker_gb:.1f})"
    for stage in STAGES:
        table.add_row(stage, *(words.format(**figures[stage]) for figures in by_shop.values()))
        slopes.add_row(stage, f"{by_users.slope(stage):.2f}", f"{by_items.slope(stage):.2f}")
    console = Console(width=160)
    console.print(table)
    console.print(slopes)


def plot(sweeps: dict[str, Sweep], file: Path) -> None:
    """Seconds per stage over sizes, both logarithmic: a panel per sweep, a line per stage."""
    with matplotlib.rc_context(charts.STYLE | {"figure.facecolor": "white"}):
        figure = Figure(figsize=(4.6 * len(sweeps), 4.2), layout="constrained")
        panels = figure.subplots(1, len(sweeps))
        for axes, (name, sweep) in zip(panels, sweeps.items(), strict=True):
            _panel(axes, sweep)
            axes.set_xlabel(name)
        figure.savefig(file)


def _panel(axes: Axes, sweep: Sweep) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for number, (stage, seconds) in enumerate(sweep.seconds.items()):
        color = matplotlib.colormaps["tab10"](number % 10)
        axes.loglog(sweep.sizes, seconds, "o-", color=color, markersize=3, linewidth=1.2)
        axes.annotate(
            stage,
            (sweep.sizes[-1], seconds[-1]),
            (5, 0),
            textcoords="offset points",
            color=color,
            size=8,
            va="center",
        )
    axes.set_ylabel("seconds")
    axes.margins(x=0.22)
    axes.grid(color=charts.RULE, linewidth=0.6)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=_sizes, default="1000,10000,100000")
    parser.add_argument("--users", type=_sizes, default="10000,100000,1000000")
    parser.add_argument("--plot", type=Path, default=Path("pipeline.svg"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one)))
        return
    print(json.dumps(compare(options.items, options.users, options.plot)))


def compare(
    items: list[int],
    users: list[int],
    plot_file: Path,
) -> dict[str, float]:
    """Measure all shops and show them; the figures that have bounds."""
    user_shops = [Shop(items[0], size) for size in users]
    item_shops = [Shop(size, users[0]) for size in items]
    by_shop = {shop: measure(shop) for shop in dict.fromkeys(user_shops + item_shops)}
    by_users = Sweep.of(users, [by_shop[shop] for shop in user_shops])
    by_items = Sweep.of(items, [by_shop[shop] for shop in item_shops])
    show(by_shop, by_users, by_items)
    plot({"users": by_users, "items": by_items}, plot_file)
    print(f"plot: {plot_file}", file=sys.stderr)
    rows = [figures[stage] for figures in by_shop.values() for stage in STAGES]
    result = {
        "slope_users": by_users.max_slope(),
        "slope_items": by_items.max_slope(),
        "peak_driver_gb": round(max(row["driver_gb"] for row in rows), 2),
        "peak_worker_gb": round(max(row["worker_gb"] for row in rows), 2),
    }
    assert all(map(math.isfinite, result.values()))
    return result


if __name__ == "__main__":
    main()
