"""`vlm4rec status` and the result of `vlm4rec maintain`, as tables in the terminal. Read-only."""

from collections.abc import Mapping
from datetime import UTC, datetime

from pyspark.sql import Row
from pyspark.sql import functions as F
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from vlm4rec_spark.cli.table_style import new_table
from vlm4rec_spark.pipeline import STAGES, Pipeline, StageResult, maintain
from vlm4rec_spark.storage import maintenance, schemas

_COUNTS = ("rows_ok", "rows_failed", "rows_skipped")


def show(pipeline: Pipeline, console: Console) -> None:
    """The size of all tables, the last run of each stage, and which index is in use."""
    console.print(_tables(pipeline))
    console.print(_runs(pipeline))
    console.print(_indexes(pipeline))


def show_maintenance(result: StageResult, console: Console) -> None:
    """The details of the result: files and bytes per table, index versions, leftovers."""
    details = result.details
    console.print(_maintained_tables(details))
    removed = details["index_removed"].split()
    freed = _size(int(details["index_bytes_freed"]))
    lines = [f"index versions: {len(removed)} removed ({freed}), {details['index_kept']} kept"]
    if leftovers := details["leftovers"].split():
        lines.append(f"removed after killed runs: {', '.join(leftovers)}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _maintained_tables(details: Mapping[str, str]) -> Table:
    title = "Maintained tables"
    grid = new_table(title, ("table", "retention"), ("files before", "files after", "freed"))
    for name in schemas.TABLES:
        if f"{name}.files_before" in details:
            freed = details[f"{name}.bytes_freed"]
            grid.add_row(
                name,
                details[f"{name}.retention"].removeprefix("interval "),
                f"{int(details[f'{name}.files_before']):,}",
                f"{int(details[f'{name}.files_after']):,}",
                _size(int(freed) if freed else None),
            )
    return grid


def _tables(pipeline: Pipeline) -> Table:
    title = f"Tables at {pipeline.tables.location}"
    grid = new_table(title, ("table", "last change (UTC)"), ("rows", "version", "size", "on disk"))
    for table in schemas.TABLES.values():
        footprint = maintenance.footprint(pipeline.tables, table)
        if footprint is None:
            grid.add_row(table.name, "not there yet", style="dim")
            continue
        rows = pipeline.tables.read(table).count()
        grid.add_row(
            table.name,
            _time(footprint.changed_at),
            f"{rows:,}",
            str(footprint.version),
            _size(footprint.bytes),
            _size(footprint.on_disk),
        )
    return grid


def _runs(pipeline: Pipeline) -> Table:
    """The last run of each stage, in the order of the stages."""
    columns = ("ok", "failed", "skipped", "seconds")
    grid = new_table("Last runs", ("stage", "started (UTC)", "status"), columns)
    runs = _last_runs(pipeline)
    for stage in [*STAGES, *sorted(runs.keys() - set(STAGES))]:
        if stage not in runs:
            grid.add_row(stage, "not yet", style="dim")
            continue
        run = runs[stage]
        started_at = _time(datetime.fromtimestamp(run["at"] / 1e6, UTC))
        style = {"failed": "red", "unchanged": "dim"}.get(run["status"])
        status = f"[{style}]{run['status']}[/]" if style else run["status"]
        counts = [f"{run[name]:,}" for name in _COUNTS]
        grid.add_row(stage, started_at, status, *counts, f"{run['seconds']:.1f}")
    return grid


def _last_runs(pipeline: Pipeline) -> dict[str, Row]:
    runs = pipeline.tables.read(schemas.RUNS).withColumn("at", F.unix_micros("started_at"))
    last = F.max_by(F.struct("*"), F.struct("started_at", "run_id"))
    rows = runs.groupBy("stage").agg(last).collect()
    return dict(rows)


def _indexes(pipeline: Pipeline) -> Table:
    title = f"Index versions in {pipeline.config.index.folder}"
    grid = new_table(title, ("index", "used for"), ("written (UTC)", "size"))
    for index in maintain.indexes(pipeline.context):
        if index.version is None:
            grid.add_row(index.index_id, index.used_for, "[red]gone[/]", "")
            continue
        written_at = _time(datetime.fromtimestamp(index.version.written, UTC))
        grid.add_row(
            index.index_id,
            index.used_for or "-",
            written_at if index.version.whole else "half-built",
            _size(index.version.bytes),
            style="" if index.used_for else "dim",
        )
    if not grid.rows:
        grid.add_row("none yet", style="dim")
    return grid


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


def _size(count: int | None) -> str:
    return "?" if count is None else decimal(count)
