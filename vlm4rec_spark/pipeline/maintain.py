"""Maintain: small files joined, old ones deleted, old index versions gone. No row of any table changes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.storage import index_versions as stage
from vlm4rec_spark.storage import schemas


@dataclass(frozen=True)
class Index:
    """An index version: what it is in force for (nothing: empty), and its folder (None: it is gone)."""

    index_id: str
    in_force_for: str
    version: stage.Version | None


def check(context: RunContext) -> None:
    """Raise UsageError for too short a retention, RunError where no table is."""
    context.tables.check_retention(context.config.maintain.retention_hours)
    context.tables.prepare()
    if not any(map(context.tables.exists, schemas.TABLES.values())):
        raise RunError(
            f"There are no tables at {context.tables.location} yet. Check --set tables=…, or run the stages."
        )


def maintain(context: RunContext, result: StageResult) -> None:
    """Each table in its own commits, so that a killed run leaves nothing half-done; figures per table to `details`."""
    hours = context.config.maintain.retention_hours
    leftovers = context.tables.clear_leftovers(stage.REST // 3600)
    result.details = {"retention_hours": str(hours), "leftovers": json.dumps(leftovers)} | _prune(
        context
    )
    freed = 0
    for table in filter(context.tables.exists, schemas.TABLES.values()):
        before, after = context.tables.optimize(table)
        bytes_freed = context.tables.vacuum(table, hours)
        freed += bytes_freed or 0
        result.details[table.name] = json.dumps(
            {
                "files_before": before,
                "files_after": after,
                "bytes_freed": bytes_freed,
                "retention": context.tables.retention(table),
            }
        )
        if (before, bytes_freed) == (after, 0):
            result.skipped += 1
        else:
            result.ok += 1
    result.details["bytes_freed"] = str(freed)


def indexes(context: RunContext) -> list[Index]:
    """Those in force first, then the latest."""
    there = {
        version.index_id: version for version in stage.versions(Path(context.config.index.folder))
    }
    force = _in_force(context)
    idle = sorted(there.keys() - force.keys(), key=lambda index_id: -there[index_id].written)
    return [
        Index(index_id, force.get(index_id, ""), there.get(index_id))
        for index_id in [*force, *idle]
    ]


def _in_force(context: RunContext) -> dict[str, str]:
    """By index id what for: of each representation the one that was built last, and what lists were last made with."""
    latest = F.max_by(F.col("details")["index_id"], F.struct("started_at", "run_id"))
    built = (
        _index_runs(context)
        .groupBy(F.col("details")["representation"].alias("of"))
        .agg(latest.alias("index_id"))
    )
    found: dict[str, str] = {}
    for row in built.orderBy("of").collect():
        found[row["index_id"]] = ", ".join(filter(None, (found.get(row["index_id"]), row["of"])))
    lists = context.tables.read(schemas.RECOMMENDATIONS).select(
        F.max_by("index_id", "generated_at").alias("index_id")
    )
    for row in lists.where("index_id IS NOT NULL").collect():
        found[row["index_id"]] = ", ".join(filter(None, (found.get(row["index_id"]), "the lists")))
    return found


def _prune(context: RunContext) -> dict[str, str]:
    settings = context.config.maintain
    last = F.max(F.unix_micros("started_at") / 1e6)
    ids = (
        _index_runs(context)
        .groupBy(F.col("details")["index_id"].alias("index_id"))
        .agg(last.alias("at"))
        .collect()
    )
    there = stage.versions(Path(context.config.index.folder))
    named = {row["index_id"]: row["at"] for row in ids}
    removed = stage.prunable(there, _in_force(context), named, settings.index_versions, time.time())
    for version in removed:
        stage.remove(version)
    return {
        "index_removed": json.dumps([version.index_id for version in removed]),
        "index_kept": str(len(there) - len(removed)),
        "index_bytes_freed": str(sum(version.bytes for version in removed)),
    }


def _index_runs(context: RunContext) -> DataFrame:
    return context.tables.read(schemas.RUNS).where(
        (F.col("stage") == "index") & (F.col("status") == "ok")
    )
