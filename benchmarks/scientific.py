"""Leave-one-out on real data: Amazon Industrial & Scientific through the ordinary stages.

    .venv/bin/python benchmarks/scientific.py [FOLDER]

FOLDER holds Scientific.{train,valid,test}.inter, Scientific.text, Scientific.item2index and a csv of captions made
from the photos by another model. Every user is judged on the last item, against all items, with the history masked.
`tune` chooses profiles and blend by the items before the last ones. Then three tables: all items, the arms that need no
caption; the same with the settings that were chosen; and the items that have a caption.
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

from vlm4rec_spark.cli import quiet, tune_table
from vlm4rec_spark.config import load
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.storage import schemas

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "scientific"


def convert(folder: Path, out: Path) -> None:
    """Write items.csv and events.csv; the data has an order but no times, so an event's place becomes its hour."""
    with (folder / "Scientific.item2index").open() as lines:
        asin = {index: item for item, index in (line.split() for line in lines)}
    with (
        (folder / "Scientific.text").open() as lines,
        (out / "items.csv").open("w", newline="") as target,
    ):
        writer = csv.writer(target)
        writer.writerow(["item_id", "title"])
        next(lines)
        writer.writerows(line.rstrip("\n").split("\t", 1) for line in lines)
    start = datetime(2020, 1, 1, tzinfo=UTC)
    with (
        (folder / "Scientific.test.inter").open() as lines,
        (out / "events.csv").open("w", newline="") as target,
    ):
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
    lists = (rows["split"] == "leave_one_out") & (rows["slice"] == "all") & (rows["k"] == 10)
    rows = rows.where((rows["run_id"] == pipeline.run_id) & lists).collect()
    return {(row["arm"], row["metric"]): (row["value"], row["low"], row["high"]) for row in rows}


def show(
    title: str, found: dict[tuple[str, str], tuple[float, float, float]], console: Console
) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    metrics = ("recall", "ndcg", "mrr")
    for metric in metrics:
        table.add_column(f"{metric}@10", justify="right", no_wrap=True)
    for arm in dict.fromkeys(arm for arm, _ in found):
        table.add_row(
            arm, *("{:.4f} [{:.4f}, {:.4f}]".format(*found[arm, metric]) for metric in metrics)
        )
    console.print(table)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not folder.is_dir():
        sys.exit(
            f"{folder} isn't there. Name the folder of the data: benchmarks/scientific.py FOLDER"
        )
    console = Console(width=110)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        convert(folder, out)
        places = [
            f"tables={out / 'tables'}",
            f"ingest.items.path=['{out / 'items.csv'}']",
            f"ingest.interactions.path=['{out / 'events.csv'}']",
        ]
        plain = [
            "profiles.event_weights={interaction: 1.0}",
            "profiles.half_life_days=null",
            "profiles.last_n=100000",
            "representation=title",
            "evaluate.splits=[leave_one_out]",
        ]
        shapes = "title, title/recency_position, title/max_similarity, title/multi_taste"
        config = load(
            [],
            [
                *places,
                *plain,
                f"evaluate.arms=[random, popularity, cooccurrence, als, {shapes}, blend]",
            ],
        )
        spark = session(config.spark)
        spark.sparkContext.setLogLevel("FATAL")
        say = partial(console.print, style="dim")
        reporter = Reporter(
            stage=lambda run_id, stage: None, info=say, progress=lambda *_: nullcontext()
        )
        pipeline = Pipeline(spark, config, reporter)
        pipeline.run(["ingest"])
        texts = str(folder / "qwen25vl3b_captions.csv")
        pipeline.import_captions(
            Source(path=(texts,), columns={"item_id": "asin", "text": "description"})
        )
        pipeline.run(["embed"])
        settings = out / "tuned.yaml"
        found = pipeline.tune(["title"], "ndcg")
        tune_table.write(found, settings)
        tune_table.show(found, console)
        everything = evaluated(pipeline)
        arms = "evaluate.arms=[popularity, content, blend]"
        chosen = evaluated(
            Pipeline(
                spark,
                load([settings], [*places, "evaluate.splits=[leave_one_out]", arms]),
                reporter,
            )
        )
        arms = "evaluate.arms=[random, popularity, title, caption, title_caption]"
        captioned = evaluated(Pipeline(spark, load([], [*places, *plain, arms]), reporter))
        print("".join(line for line in settings.open() if not line.startswith("#")))
        spark.stop()
    show("All items", everything, console)
    show("All items, settings chosen on validation items", chosen, console)
    show("Items with a caption", captioned, console)
    result = {
        f"{arm}_mean_recall@10": round(everything[arm, "recall"][0], 4)
        for arm in ("random", "title")
    }
    result |= {
        f"{arm}_recall@10": round(everything[arm, "recall"][0], 4)
        for arm in ("popularity", "cooccurrence", "als")
    }
    result |= {
        f"captioned_items_{arm}_recall@10": round(captioned[arm, "recall"][0], 4)
        for arm in ("popularity", "title", "caption", "title_caption")
    }
    for arm in ("content", "blend"):
        result |= {
            f"{arm}_{metric}@10": round(chosen[arm, metric][0], 4) for metric in ("recall", "ndcg")
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
