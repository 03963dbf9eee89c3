"""Time and memory of every stage as items and users grow: synthetic shops through the ordinary pipeline.

    .venv/bin/python benchmarks/pipeline.py [--items 1000,10000,100000] [--users 10000,100000,1000000] [--plot FILE]

Items grow at the fewest users and users at the fewest items, so that each slope is of one of them. Photos are 8 px
PNGs and the captioner is the fake; everything else is what a shop gets: Parquet files, MiniLM, ScaNN from 20,000 items
on, Delta. Each shop has a driver of its own (local[*]), whose memory is watched: its JVM and
Python together, and the largest Python worker with its model's process. The slope of a stage is that of log(seconds)
over log(items or users) by least squares.
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

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
Sizes = tuple[int, int]


def make(folder: Path, items: int, users: int) -> None:
    """catalogue.parquet with photos, and a log in parts of a million events; popularity is Zipf's (exponent 1)."""
    rng = np.random.default_rng([items, users])
    ids = np.array([f"item-{n:07d}" for n in range(items)])
    colours = rng.integers(0, 256, (items, 3), dtype=np.uint8)
    columns = {
        "item_id": ids,
        "title": [f"Product {n}" for n in range(items)],
        "photo": [_png(c) for c in colours],
    }
    pq.write_table(pa.table(columns), folder / "catalogue.parquet")
    share = 1 / np.arange(1, items + 1)
    edges = np.cumsum(share) / share.sum()
    (folder / "log").mkdir()
    begin = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp())
    for part, first in enumerate(range(0, users * EVENTS_PER_USER, 1_000_000)):
        places = (
            np.arange(first, min(users * EVENTS_PER_USER, first + 1_000_000)) // EVENTS_PER_USER
        )
        chosen = np.minimum(np.searchsorted(edges, rng.random(len(places))), items - 1)
        seconds = begin + rng.integers(0, 150 * 86_400, len(places))
        log = {
            "user_id": np.char.add("user-", places.astype(str)),
            "item_id": ids[chosen],
            "event_type": rng.choice(["view", "cart", "purchase"], len(places), p=[0.8, 0.1, 0.1]),
            "event_time": seconds.astype(str),
        }
        pq.write_table(pa.table(log), folder / "log" / f"{part:04d}.parquet")


def _png(colour: np.ndarray) -> bytes:
    out = io.BytesIO()
    image = Image.new("RGB", (8, 8), tuple(map(int, colour)))
    image.putpixel((0, 0), (255, 255, 255))  # a photo of one colour all over shows nothing
    image.save(out, "PNG")
    return out.getvalue()


def run_one(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each stage on the shop in `folder`."""
    quiet()
    places = [
        f"tables={folder}/tables",
        f"index.folder={folder}/index",
        f"report.path={folder}/report.html",
        f"ingest.items.path=['{folder}/catalogue.parquet']",
        "ingest.items.format=parquet",
        "ingest.photos.bytes_column=photo",
        f"ingest.interactions.path=['{folder}/log']",
        "ingest.interactions.format=parquet",
    ]
    config = load([], [*places, "caption.model.backend=fake", "spark.driver_memory=6g"])
    spark = session(config.spark)
    spark.sparkContext.setLogLevel("FATAL")
    silence = Reporter(lambda run_id, stage: None, lambda line: None, lambda *_: nullcontext())
    pipeline = Pipeline(spark, config, silence)
    found = {}
    for stage in STAGES:
        with peaks() as peak:
            (outcome,) = pipeline.run([stage])
        found[stage] = {"seconds": outcome.seconds, **peak}
        print(f"  {stage}: {outcome.seconds:,.1f} s", file=sys.stderr, flush=True)
    spark.stop()
    return found


def slope(sizes: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def show(found: dict[Sizes, dict[str, dict[str, float]]], console: Console) -> None:
    table = Table(title="Seconds (driver GB, largest worker GB)", title_justify="left")
    table.add_column("stage")
    for items, users in found:
        table.add_column(f"{items:,} items\n{users:,} users", justify="right")
    for stage in STAGES:
        table.add_row(
            stage,
            *(
                "{seconds:,.1f} ({driver_gb:.1f}, {worker_gb:.1f})".format(**each[stage])
                for each in found.values()
            ),
        )
    console.print(table)


def plot(sweeps: dict[str, tuple[list[int], dict[str, list[float]]]], file: Path) -> None:
    """Seconds per stage over sizes, both logarithmic: a panel for items and one for users, a line for each stage."""
    with matplotlib.rc_context(charts.STYLE | {"figure.facecolor": "white"}):
        figure = Figure(figsize=(4.6 * len(sweeps), 4.2), layout="constrained")
        for axes, (name, (sizes, by_stage)) in zip(
            figure.subplots(1, len(sweeps)), sweeps.items(), strict=True
        ):
            axes.spines[["top", "right"]].set_visible(False)
            for place, (stage, seconds) in enumerate(by_stage.items()):
                colour = matplotlib.colormaps["tab10"](place % 10)
                axes.loglog(sizes, seconds, "o-", color=colour, markersize=3, linewidth=1.2)
                axes.annotate(
                    stage,
                    (sizes[-1], seconds[-1]),
                    (5, 0),
                    textcoords="offset points",
                    color=colour,
                    size=8,
                    va="center",
                )
            axes.set_xlabel(name)
            axes.set_ylabel("seconds")
            axes.margins(x=0.22)
            axes.grid(color=charts.RULE, linewidth=0.6)
        figure.savefig(file)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--items", default="1000,10000,100000")
    options.add_argument("--users", default="10000,100000,1000000")
    options.add_argument("--plot", type=Path, default=Path("pipeline.svg"))
    options.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        print(json.dumps(run_one(given.one)))
        return
    console = Console(width=160)
    items, users = ([int(size) for size in text.split(",")] for text in (given.items, given.users))
    shops = [(items[0], many) for many in users] + [(many, users[0]) for many in items[1:]]
    found: dict[Sizes, dict[str, dict[str, float]]] = {}
    for shop in shops:
        print(f"{shop[0]:,} items, {shop[1]:,} users", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), *shop)
            command = [sys.executable, __file__, "--one", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[shop] = json.loads(done.stdout.splitlines()[-1])
    show(found, console)
    by_users = {
        stage: [found[items[0], many][stage]["seconds"] for many in users] for stage in STAGES
    }
    by_items = {
        stage: [found[many, users[0]][stage]["seconds"] for many in items] for stage in STAGES
    }
    slopes = Table(title="Slopes", title_justify="left")
    for name in ("stage", "in users", "in items"):
        slopes.add_column(name, justify="left" if name == "stage" else "right")
    for stage in STAGES:
        slopes.add_row(
            stage, f"{slope(users, by_users[stage]):.2f}", f"{slope(items, by_items[stage]):.2f}"
        )
    console.print(slopes)
    plot({"users": (users, by_users), "items": (items, by_items)}, given.plot)
    console.print(f"plot: {given.plot}")
    everything = [each[stage] for each in found.values() for stage in STAGES]
    result = {
        "slope_users": round(max(slope(users, seconds) for seconds in by_users.values()), 3),
        "slope_items": round(max(slope(items, seconds) for seconds in by_items.values()), 3),
        "peak_driver_gb": round(max(each["driver_gb"] for each in everything), 2),
        "peak_worker_gb": round(max(each["worker_gb"] for each in everything), 2),
    }
    assert all(map(math.isfinite, result.values()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
