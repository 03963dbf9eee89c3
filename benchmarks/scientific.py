"""Leave-one-out on real data: Amazon Industrial & Scientific through the ordinary stages.

    .venv/bin/python benchmarks/scientific.py [FOLDER]

FOLDER holds Scientific.{train,valid,test}.inter, Scientific.text, Scientific.item2index and a csv of captions made
from the photos by another model. Every user is judged on the last item, against all items, with the history masked.
Three tables: all items for the arms that need no caption, and those that have one, by the plain mean of the history;
and by profiles in which an item weighs .95 of the one after it: titles by the mean and by the nearest item of the
history, what is found together with the history, and both. Decays and shares were chosen on validation items.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlm4rec_spark import schemas
from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.pipeline import Pipeline, Voice
from vlm4rec_spark.session import session
from vlm4rec_spark.sources import Source

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "scientific"


def convert(folder: Path, out: Path) -> None:
    """Write items.csv and events.csv; the data has an order but no times, so an event's place becomes its hour."""
    with (folder / "Scientific.item2index").open() as lines:
        asin = {index: item for item, index in (line.split() for line in lines)}
    with (folder / "Scientific.text").open() as lines, (out / "items.csv").open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["item_id", "title"])
        next(lines)
        writer.writerows(line.rstrip("\n").split("\t", 1) for line in lines)
    start = datetime(2020, 1, 1, tzinfo=UTC)
    with (folder / "Scientific.test.inter").open() as lines, (out / "events.csv").open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["user_id", "item_id", "event_type", "event_time"])
        next(lines)
        for line in lines:
            user, history, last = line.rstrip("\n").split("\t")
            for place, item in enumerate([*history.split(), last]):
                at = start + timedelta(hours=place)
                writer.writerow([user, asin[item], "interaction", at.isoformat()])


def evaluated(pipeline: Pipeline) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Value and interval of (arm, metric) over all users."""
    pipeline.run(["evaluate"])
    rows = pipeline.tables.read(schemas.METRICS)
    lists = (rows["split"] == "leave_one_out") & (rows["slice"] == "all")
    rows = rows.where((rows["run_id"] == pipeline.run_id) & lists).collect()
    return {(row["arm"], row["metric"]): (row["value"], row["low"], row["high"]) for row in rows}


def show(title: str, found: dict[tuple[str, str], tuple[float, float, float]], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    metrics = ("recall", "ndcg", "hit_rate")
    for metric in metrics:
        table.add_column(f"{metric}@10", justify="right", no_wrap=True)
    for arm in dict.fromkeys(arm for arm, _ in found):
        table.add_row(arm, *("{:.4f} [{:.4f}, {:.4f}]".format(*found[arm, metric]) for metric in metrics))
    console.print(table)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not folder.is_dir():
        sys.exit(f"{folder} isn't there. Name the folder of the data: benchmarks/scientific.py FOLDER")
    console = Console(width=110)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        convert(folder, out)
        places = [f"tables={out / 'tables'}", f"ingest.items.path=['{out / 'items.csv'}']",
                  f"ingest.interactions.path=['{out / 'events.csv'}']"]  # fmt: skip
        plain = ["profiles.event_weights={interaction: 1.0}", "profiles.half_life_days=null", "profiles.last_n=100000",
                 "evaluate.splits=[leave_one_out]"]  # fmt: skip
        config = load([], [*places, *plain, "evaluate.arms=[random, popularity, title]"])
        spark = session(config.spark)
        spark.sparkContext.setLogLevel("FATAL")
        say = partial(console.print, style="dim")
        voice = Voice(enter=lambda run_id, stage: None, say=say, watch=lambda *_: nullcontext())
        pipeline = Pipeline(spark, config, voice)
        pipeline.run(["ingest"])
        texts = str(folder / "qwen25vl3b_captions.csv")
        pipeline.import_captions(Source(path=(texts,), columns={"item_id": "asin", "text": "description"}))
        pipeline.run(["embed"])
        everything = evaluated(pipeline)
        arms = "evaluate.arms=[random, popularity, title, caption, title_caption]"
        captioned = evaluated(Pipeline(spark, load([], [*places, *plain, arms]), voice))
        recent = ["representation=title", "profiles.shape=max_similarity", "profiles.position_decay=0.95",
                  "evaluate.arms=[popularity, title, title/max_similarity, cooccurrence, blend]"]  # fmt: skip
        shaped = evaluated(Pipeline(spark, load([], [*places, *plain, *recent]), voice))
        spark.stop()
    show("All items", everything, console)
    show("Items with a caption", captioned, console)
    show("All items, the latest weigh most", shaped, console)
    result = {f"{arm}_mean_recall@10": round(everything[arm, "recall"][0], 4) for arm in ("random", "title")}
    result["popularity_recall@10"] = round(everything["popularity", "recall"][0], 4)
    result |= {f"captioned_items_{arm}_recall@10": round(captioned[arm, "recall"][0], 4)
               for arm in ("popularity", "title", "caption", "title_caption")}  # fmt: skip
    for name, arm in (("content", "title/max_similarity"), ("blend", "blend"), ("cooccurrence", "cooccurrence")):
        result |= {f"{name}_{metric}@10": round(shaped[arm, metric][0], 4) for metric in ("recall", "ndcg")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
