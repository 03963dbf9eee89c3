"""`vlm4rec status` and what `vlm4rec maintain` did, as tables in the terminal. Reads, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime

from pyspark.sql import functions as F
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from vlm4rec_spark.pipeline import STAGES, Pipeline, StageResult, maintain
from vlm4rec_spark.storage import schemas


def show(pipeline: Pipeline, console: Console) -> None:
    """What the tables hold, what the last run of each stage did, and which index is in force."""
    console.print(_tables(pipeline))
    console.print(_runs(pipeline))
    console.print(_indexes(pipeline))


def show_maintenance(outcome: StageResult, console: Console) -> None:
    """What housekeeping did, from the figures that it left in `runs`."""
    details = outcome.details
    grid = _grid("What was done", ("table", "retention"), ("files before", "files after", "freed"))
    for name in schemas.TABLES:
        if name in details:
            did = json.loads(details[name])
            kept = did["retention"].removeprefix("interval ")
            grid.add_row(
                name,
                kept,
                f"{did['files_before']:,}",
                f"{did['files_after']:,}",
                _size(did["bytes_freed"]),
            )
    console.print(grid)
    removed = json.loads(details["index_removed"])
    console.print(
        f"index versions: {len(removed)} removed ({_size(int(details['index_bytes_freed']))}), "
        f"{details['index_kept']} kept",
        highlight=False,
        soft_wrap=True,
    )
    if leftovers := json.loads(details["leftovers"]):
        console.print(
            f"left by killed runs, removed: {', '.join(leftovers)}", highlight=False, soft_wrap=True
        )


def _tables(pipeline: Pipeline) -> Table:
    title = f"Tables at {pipeline.tables.location}"
    grid = _grid(title, ("table", "last change (UTC)"), ("rows", "version", "size", "on disk"))
    for table in schemas.TABLES.values():
        found = pipeline.tables.footprint(table)
        if found is None:
            grid.add_row(table.name, "not there yet", style="dim")
            continue
        rows = pipeline.tables.read(table).count()
        grid.add_row(
            table.name,
            _time(found.changed_at),
            f"{rows:,}",
            str(found.version),
            _size(found.bytes),
            _size(found.on_disk),
        )
    return grid


def _runs(pipeline: Pipeline) -> Table:
    """The newest run of each stage, in the order of the stages."""
    grid = _grid(
        "Last runs", ("stage", "started (UTC)", "status"), ("ok", "failed", "skipped", "seconds")
    )
    names = ("status", "rows_ok", "rows_failed", "rows_skipped", "seconds")
    newest = F.max_by(
        F.struct(F.unix_micros("started_at").alias("at"), *names), F.struct("started_at", "run_id")
    )
    found = pipeline.tables.read(schemas.RUNS).groupBy("stage").agg(newest.alias("run")).collect()
    runs = {row["stage"]: row["run"] for row in found}
    for stage in [*STAGES, *sorted(runs.keys() - set(STAGES))]:
        if stage not in runs:
            grid.add_row(stage, "not yet", style="dim")
            continue
        run = runs[stage]
        at = _time(datetime.fromtimestamp(run["at"] / 1e6, UTC))
        counts = (f"{run[name]:,}" for name in names[1:4])
        style = {"failed": "red", "unchanged": "dim"}.get(run["status"], "")
        grid.add_row(
            stage,
            at,
            f"[{style}]{run['status']}[/]" if style else run["status"],
            *counts,
            f"{run['seconds']:.1f}",
        )
    return grid


def _indexes(pipeline: Pipeline) -> Table:
    title = f"Index versions in {pipeline.config.index.folder}"
    grid = _grid(title, ("index", "in force for"), ("written (UTC)", "size"))
    for index in maintain.indexes(pipeline.context):
        if index.version is None:
            grid.add_row(index.index_id, index.in_force_for, "[red]gone[/]", "")
            continue
        at = _time(datetime.fromtimestamp(index.version.written, UTC))
        grid.add_row(
            index.index_id,
            index.in_force_for or "-",
            at if index.version.whole else "half-built",
            _size(index.version.bytes),
            style="" if index.in_force_for else "dim",
        )
    if not grid.rows:
        grid.add_row("none yet", style="dim")
    return grid


def _grid(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in left:
        grid.add_column(name)
    for name in right:
        grid.add_column(name, justify="right")
    return grid


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


def _size(count: int | None) -> str:
    return "?" if count is None else decimal(count)
