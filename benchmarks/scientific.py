"""Leave-one-out on real data: Amazon Industrial & Scientific through the ordinary stages.

    .venv/bin/python benchmarks/scientific.py [FOLDER]

FOLDER holds Scientific.{train,valid,test}.inter, Scientific.text, Scientific.item2index and a csv
of captions that another model made from the photos. Every user is tested on the last item, against
all items, with the history masked. `tune` chooses profiles and blend by the items before the last
ones. It prints three tables. The first has all items, with the arms that need no caption. The
second has the same with the tuned settings. The third has the items with a caption.
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
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet, tune_table
from vlm4rec_spark.config import load
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.storage import schemas

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "scientific"
PLAIN = (
    "profiles.event_weights={interaction: 1.0}",
    "profiles.half_life_days=null",
    "profiles.last_n=100000",
    "representation=title",
    "evaluate.splits=[leave_one_out]",
)
BASELINES = (
    "evaluate.arms=[random, popularity, cooccurrence, als, title, title/recency_position, "
    "title/max_similarity, title/multi_taste, blend]"
)
CAPTIONED = "evaluate.arms=[random, popularity, title, caption, title_caption]"
TUNED = ("evaluate.splits=[leave_one_out]", "evaluate.arms=[popularity, content, blend]")
METRICS = ("recall", "ndcg", "mrr")


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


Scores = dict[tuple[str, str], Estimate]
"""By arm and metric."""


class Results(NamedTuple):
    everything: Scores
    tuned: Scores
    captioned: Scores


def convert(folder: Path, out: Path) -> None:
    """Write items.csv and events.csv. The data has an order but no times: event n gets hour n."""
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
            for hour, item in enumerate([*history.split(), last]):
                time = start + timedelta(hours=hour)
                writer.writerow([user, asin[item], "interaction", time.isoformat()])


def evaluated(pipeline: Pipeline) -> Scores:
    """The scores over all users at k = 10."""
    pipeline.run(["evaluate"])
    rows = pipeline.tables.read(schemas.METRICS)
    lists = (rows["split"] == "leave_one_out") & (rows["slice"] == "all") & (rows["k"] == 10)
    of_run = rows.where((rows["run_id"] == pipeline.run_id) & lists)
    return {
        (row["arm"], row["metric"]): Estimate(row["value"], row["low"], row["high"])
        for row in of_run.collect()
    }


def show(
    title: str,
    scores: Scores,
    console: Console,
) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    for metric in METRICS:
        table.add_column(f"{metric}@10", justify="right", no_wrap=True)
    for arm in dict.fromkeys(arm for arm, _ in scores):
        cells = ["{:.4f} [{:.4f}, {:.4f}]".format(*scores[arm, metric]) for metric in METRICS]
        table.add_row(arm, *cells)
    console.print(table)


def run(
    folder: Path,
    out: Path,
    console: Console,
) -> Results:
    """Convert, ingest, import captions, tune and evaluate; files go to `out`."""
    convert(folder, out)
    paths = [
        f"tables={out / 'tables'}",
        f"ingest.items.path=['{out / 'items.csv'}']",
        f"ingest.interactions.path=['{out / 'events.csv'}']",
    ]
    config = load([], [*paths, *PLAIN, BASELINES])
    spark = session(config.spark)
    spark.sparkContext.setLogLevel("FATAL")
    reporter = Reporter(
        stage=lambda run_id, stage: None,
        info=partial(console.print, style="dim"),
        progress=lambda *_: nullcontext(),
    )
    pipeline = Pipeline(spark, config, reporter)
    pipeline.run(["ingest"])
    captions = (str(folder / "qwen25vl3b_captions.csv"),)
    columns = {"item_id": "asin", "text": "description"}
    pipeline.import_captions(Source(path=captions, columns=columns))
    pipeline.run(["embed"])
    tuned_file = out / "tuned.yaml"
    tuned = pipeline.tune(["title"], "ndcg")
    tune_table.write(tuned, tuned_file)
    tune_table.show(tuned, console)
    results = Results(
        evaluated(pipeline),
        evaluated(Pipeline(spark, load([tuned_file], [*paths, *TUNED]), reporter)),
        evaluated(Pipeline(spark, load([], [*paths, *PLAIN, CAPTIONED]), reporter)),
    )
    print("".join(line for line in tuned_file.open() if not line.startswith("#")))
    spark.stop()
    return results


def summary(results: Results) -> dict[str, float]:
    """The figures to compare between versions, as one flat record."""
    lines = [
        (f"{arm}_mean_recall@10", results.everything[arm, "recall"]) for arm in ("random", "title")
    ]
    lines += [
        (f"{arm}_recall@10", results.everything[arm, "recall"])
        for arm in ("popularity", "cooccurrence", "als")
    ]
    lines += [
        (f"captioned_items_{arm}_recall@10", results.captioned[arm, "recall"])
        for arm in ("popularity", "title", "caption", "title_caption")
    ]
    lines += [
        (f"{arm}_{metric}@10", results.tuned[arm, metric])
        for arm in ("content", "blend")
        for metric in ("recall", "ndcg")
    ]
    return {name: round(estimate.value, 4) for name, estimate in lines}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not folder.is_dir():
        sys.exit(f"{folder} doesn't exist. Name the data folder: benchmarks/scientific.py FOLDER")
    console = Console(width=110)
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        results = run(folder, Path(temporary), console)
    show("All items", results.everything, console)
    show("All items, settings tuned on validation items", results.tuned, console)
    show("Items with a caption", results.captioned, console)
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
