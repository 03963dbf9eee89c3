"""Maintain: joins small files, deletes old ones and old index versions. Changes no row."""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.pipeline.context import RunContext, StageResult, grouped
from vlm4rec_spark.storage import index_versions, layout, maintenance, schemas
from vlm4rec_spark.storage.index_versions import IndexVersion


@dataclass(frozen=True)
class KnownIndex:
    """An index: what it is used for (nothing: empty), and its files (None: they are gone)."""

    index_id: str
    used_for: str
    version: IndexVersion | None


def check(context: RunContext) -> None:
    """Raise UsageError for too short a retention, RunError where no table exists."""
    maintenance.check_retention(context.spark, context.config.maintain.retention_hours)
    layout.check(context.tables)
    if not any(map(context.tables.exists, schemas.TABLES.values())):
        raise RunError(
            f"There are no tables at {context.tables.location} yet. Check --set tables=…, or run "
            "the stages."
        )


def maintain(context: RunContext, result: StageResult) -> None:
    """Each table in its own commits, so that a killed run leaves nothing half-done.

    Figures of a table are in the details, such as `items.files_before`.
    """
    hours = context.config.maintain.retention_hours
    leftovers = maintenance.clear_leftovers(
        context.tables,
        index_versions.SECONDS_UNTOUCHED // 3600,
    )
    result.details = {"retention_hours": str(hours), "leftovers": " ".join(leftovers)}
    result.details |= _prune(context)
    total_freed = 0
    for table in filter(context.tables.exists, schemas.TABLES.values()):
        before, after = maintenance.optimize(context.tables, table)
        bytes_freed = maintenance.vacuum(context.tables, table, hours)
        total_freed += bytes_freed or 0
        figures = {
            "files_before": before,
            "files_after": after,
            "bytes_freed": "" if bytes_freed is None else bytes_freed,
            "retention": maintenance.retention(context.tables, table),
        }
        result.details |= grouped(table.name, figures)
        if before == after and bytes_freed == 0:
            result.skipped += 1
        else:
            result.ok += 1
    result.details["bytes_freed"] = str(total_freed)


def indexes(context: RunContext) -> list[KnownIndex]:
    """Those in use first, then the others, latest first."""
    folder = Path(context.config.index.folder)
    versions = {version.index_id: version for version in index_versions.versions(folder)}
    in_use = _in_use(context)
    idle = sorted(
        versions.keys() - in_use.keys(),
        key=lambda index_id: -versions[index_id].written,
    )
    return [
        KnownIndex(index_id, in_use.get(index_id, ""), versions.get(index_id))
        for index_id in [*in_use, *idle]
    ]


def _in_use(context: RunContext) -> dict[str, str]:
    """By index id what it is used for: a representation, and the lists as they are."""
    uses = defaultdict(list)
    state = context.states().get("index")
    if state and state.output.index_id and state.output.representation:
        uses[state.output.index_id].append(state.output.representation)
    lists = context.tables.read(schemas.RECOMMENDATIONS)
    index_id = F.max_by("index_id", "generated_at")
    latest = lists.select(index_id.alias("index_id"))
    for row in latest.where("index_id IS NOT NULL").collect():
        uses[row["index_id"]].append("the lists")
    return {index_id: ", ".join(names) for index_id, names in uses.items()}


def _prune(context: RunContext) -> dict[str, str]:
    """Delete index versions that may go; returns the details."""
    versions = index_versions.versions(Path(context.config.index.folder))
    removed = index_versions.prunable(
        versions,
        _in_use(context),
        _built_at(context),
        context.config.maintain.index_versions,
        time.time(),
    )
    for version in removed:
        index_versions.remove(version)
    return {
        "index_removed": " ".join(version.index_id for version in removed),
        "index_kept": str(len(versions) - len(removed)),
        "index_bytes_freed": str(sum(version.bytes for version in removed)),
    }


def _built_at(context: RunContext) -> dict[str, float]:
    """When a run of these tables last built each index, in seconds since 1970."""
    started_at = F.max(F.unix_micros("started_at") / 1e6)
    runs = context.tables.read(schemas.RUNS)
    index_runs = runs.where("stage = 'index' AND status = 'ok'")
    index_id = F.col("details")["index_id"]
    by_index = index_runs.groupBy(index_id.alias("index_id"))
    rows = by_index.agg(started_at.alias("started_at")).collect()
    return {row["index_id"]: row["started_at"] for row in rows}
