"""Runs stages for the command line: session, progress, and the summary at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import plan_table, quiet, show, status, tune_table
from vlm4rec_spark.cli.reporter import OURS, speak
from vlm4rec_spark.config import Config, load
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.evaluation.tune import Metric
from vlm4rec_spark.pipeline import STAGES, Pipeline, Reporter, StageResult
from vlm4rec_spark.report.data import figures
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark import progress
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.storage import schemas


def run_stages(
    name: str,
    files: Sequence[Path],
    assignments: Sequence[str],
    debug: bool,
    retry: str | None = None,
) -> None:
    """Run the stage `name`, or all of them for `run`. `retry`: failed captions to try again, as in `Run`."""
    with _pipeline(load(files, assignments), debug) as (pipeline, console):
        pipeline.context.retry = retry
        _run(pipeline, STAGES if name == "run" else (name,), console)


def run_evaluate(
    files: Sequence[Path], assignments: Sequence[str], debug: bool, as_json: bool
) -> None:
    """Run `evaluate`; with `as_json` print its figures."""
    with _pipeline(load(files, assignments), debug) as (pipeline, console):
        _run(pipeline, ("evaluate",), console)
        if as_json:
            print(json.dumps(_evaluation(pipeline)))


def run_plan(
    files: Sequence[Path], assignments: Sequence[str], debug: bool, as_json: bool, retry: str | None
) -> None:
    """Run `plan`."""
    with _pipeline(load(files, assignments), debug) as (pipeline, _):
        pipeline.context.retry = retry
        planned = pipeline.plan()
        if as_json:
            print(json.dumps(asdict(planned)))
        else:
            plan_table.show(planned, pipeline.config.caption, Console())


def run_import(
    path: str,
    kind: str,
    columns: Sequence[str],
    files: Sequence[Path],
    assignments: Sequence[str],
    debug: bool,
) -> None:
    """Run `import-captions`."""
    pairs = dict(column.partition("=")[::2] for column in columns)
    if wrong := [column for column in columns if "=" not in column]:
        raise UsageError(
            f"--column {wrong[0]}: write it as ours=theirs, such as --column text=description."
        )
    if kind not in ("csv", "json", "parquet", "delta"):
        raise UsageError(f"--format {kind}: it is csv, json, parquet or delta.")
    source = Source(path=(path,), format=kind, columns=pairs)
    with _pipeline(load(files, assignments), debug) as (pipeline, console):
        _show([pipeline.import_captions(source)], console)


def run_demo(
    out: Path, seed: int, items: int, users: int, assignments: Sequence[str], debug: bool
) -> None:
    """Make the shop, run every stage on it, and say where the report is."""
    from vlm4rec_spark.demo import catalogue

    raw = out / "raw"
    config = load(
        [Path("demo.yaml")],
        [*_demo_places(out, raw), f"evaluate.cut={catalogue.CUT}", *assignments],
    )
    if not (raw / "truth.parquet").exists():
        OURS.info(
            "drawing a shop of %s items and %s users into %s", f"{items:,}", f"{users:,}", raw
        )
        catalogue.write(raw, seed, items, users)
    with _pipeline(config, debug) as (pipeline, console):
        with pipeline.lease():
            _add_oracle(pipeline, raw / "truth.parquet")
        _run(pipeline, STAGES, console)


def run_tune(
    out: Path,
    representations: Sequence[str],
    metric: Metric,
    files: Sequence[Path],
    assignments: Sequence[str],
    debug: bool,
) -> None:
    """Run `tune`."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.absolute().parent} isn't there.")
    with _pipeline(load(files, assignments), debug) as (pipeline, console):
        found = pipeline.tune(representations or [pipeline.config.representation], metric)
        tune_table.write(found, out)
        tune_table.show(found, console)
        console.print(
            f"settings: {out.resolve()}. Use them: --config {out}", soft_wrap=True, highlight=False
        )


def run_status(files: Sequence[Path], assignments: Sequence[str], debug: bool) -> None:
    """Run `status`."""
    with _pipeline(load(files, assignments), debug) as (pipeline, _):
        status.show(pipeline, Console())


def run_show(
    kind: Literal["user", "item"],
    id_: str,
    files: Sequence[Path],
    assignments: Sequence[str],
    debug: bool,
) -> None:
    """Run `show user` or `show item`."""
    with _pipeline(load(files, assignments), debug) as (pipeline, _):
        (show.user if kind == "user" else show.item)(pipeline, id_, Console())


def run_maintain(files: Sequence[Path], assignments: Sequence[str], debug: bool) -> None:
    """Run `maintain`."""
    with _pipeline(load(files, assignments), debug) as (pipeline, console):
        outcome = pipeline.maintain()
        _say(outcome)
        if pipeline.config.log != "json":
            status.show_maintenance(outcome, console)


def _demo_places(out: Path, raw: Path) -> list[str]:
    return [
        f"tables={out / 'tables'}",
        f"index.folder={out / 'index'}",
        f"report.path={out / 'report.html'}",
        f"ingest.items.path=['{raw / 'catalogue.csv'}']",
        f"ingest.interactions.path=['{raw / 'events-*.csv.gz'}']",
        f"ingest.users.path=['{raw / 'users.csv'}']",
        f"ingest.identities.path=['{raw / 'identities.csv'}']",
        f"ingest.photos.folder={raw / 'photos'}",
    ]


def _add_oracle(pipeline: Pipeline, truth: Path) -> None:
    """The true attributes as vectors, so that the evaluation shows what could be had: one 1 per attribute."""
    import pandas as pd

    table = pd.read_parquet(truth).sort_values("item_id", ignore_index=True)
    vectors = pd.get_dummies(table.drop(columns="item_id")).to_numpy(float)
    vectors /= (vectors**2).sum(axis=1, keepdims=True) ** 0.5
    rows = [
        (item, "oracle", "truth", "-", False, [float(x) for x in vector])
        for item, vector in zip(table["item_id"], vectors, strict=True)
    ]
    frame = pipeline.spark.createDataFrame(rows, schemas.EMBEDDINGS.schema)
    pipeline.tables.upsert(schemas.EMBEDDINGS, frame)


@contextmanager
def _pipeline(config: Config, debug: bool) -> Iterator[tuple[Pipeline, Console]]:
    console = Console(stderr=True)
    if not debug:
        quiet()
    with console.status("starting Spark") if console.is_terminal else _nothing():
        spark = session(config.spark)
    spark.sparkContext.setLogLevel("WARN" if debug else "FATAL")
    pipeline = Pipeline(
        spark,
        config,
        Reporter(
            stage=lambda run_id, stage: speak(config.log == "json", run_id=run_id, stage=stage),
            info=OURS.info,
            progress=partial(
                progress.watch, spark, None if config.log == "json" else console, OURS.info
            ),
        ),
    )
    yield pipeline, console


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _run(pipeline: Pipeline, stages: Sequence[str], console: Console) -> None:
    outcomes: list[StageResult] = []

    def done(outcome: StageResult) -> None:
        outcomes.append(outcome)
        _say(outcome)

    pipeline.run(stages, done)
    if pipeline.config.log == "json":
        return
    _show(outcomes, console)
    if "report" in stages:
        _show_report(pipeline, console)
    if "evaluate" in stages:
        _headline(pipeline, console)


def _say(outcome: StageResult) -> None:
    figures = {
        "rows_in": outcome.rows_in,
        "rows_ok": outcome.ok,
        "rows_failed": outcome.failed,
        "rows_skipped": outcome.skipped,
        "seconds": round(outcome.seconds, 1),
        **outcome.details,
    }
    did = "unchanged, nothing to do" if outcome.status == "unchanged" else "done"
    OURS.info("%s: %s, %.1f s", outcome.stage, did, outcome.seconds, extra={"figures": figures})


def _show(outcomes: Sequence[StageResult], console: Console) -> None:
    table = Table(title="What was done", title_justify="left")
    table.add_column("stage")
    table.add_column("status")
    for name in ("rows in", "ok", "failed", "skipped", "seconds"):
        table.add_column(name, justify="right")
    for o in outcomes:
        counts = (f"{n:,}" for n in (o.rows_in, o.ok, o.failed, o.skipped))
        table.add_row(o.stage, o.status, *counts, f"{o.seconds:.1f}")
    console.print(table)


def _show_report(pipeline: Pipeline, console: Console) -> None:
    console.print(
        f"report: {Path(pipeline.config.report.path).resolve()}", soft_wrap=True, highlight=False
    )


def _evaluation(pipeline: Pipeline) -> dict[str, object]:
    """The figures of the last evaluation, and what they rest on."""
    run_id = pipeline.last_good()["evaluate"]["run_id"]
    runs = pipeline.tables.read(schemas.RUNS)
    run = runs.where((runs["run_id"] == run_id) & (runs["stage"] == "evaluate")).first()
    assert run is not None
    rows = pipeline.tables.read(schemas.METRICS)
    rows = rows.where(rows["run_id"] == run_id).drop("run_id")
    found = rows.orderBy("split", "arm", "metric", "k", "slice").collect()
    details = {name: figures(text) or text for name, text in sorted(run["details"].items())}
    return {
        "run_id": run_id,
        "versions": run["versions"],
        "config": json.loads(run["config"])["evaluate"],
        "details": details,
        "metrics": [row.asDict() for row in found],
    }


def _headline(pipeline: Pipeline, console: Console) -> None:
    """The latest evaluation, all users, as a table."""
    rows, last = pipeline.tables.read(schemas.METRICS), pipeline.last_good()["evaluate"]
    # What was found of captions is no score of an arm, and stands in the report.
    k, metrics = pipeline.config.evaluate.k, ("recall", "ndcg")
    lists = (rows["slice"] == "all") & (rows["split"] != "captions") & (rows["k"] == k)
    rows = rows.where((rows["run_id"] == last["run_id"]) & lists & rows["metric"].isin(*metrics))
    found = {
        (row["split"], row["arm"], row["metric"]): row for row in rows.orderBy("split").collect()
    }
    for split in dict.fromkeys(split for split, _, _ in found):
        table = Table(
            title=f"{split} split, mean over users with 95 % interval", title_justify="left"
        )
        table.add_column("arm", no_wrap=True)
        for metric in metrics:
            table.add_column(f"{metric}@{k}", justify="right", no_wrap=True)
        for arm in pipeline.config.evaluate.arms:
            cells = [found[split, arm, metric] for metric in metrics]
            table.add_row(arm, *(_cell(row["value"], row["low"], row["high"]) for row in cells))
        console.print(table)


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "too few users"
    # Two of these and the arm's name are what 80 columns hold.
    at, first, last = (f"{number:.3f}".removeprefix("0") for number in (value, low, high))
    return f"{at} [{first}, {last}]"
