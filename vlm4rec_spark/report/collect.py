"""Delta tables to `ReportData`: counts, runs, rejected rows and metrics here, what has photos in `exhibits.py`.

Knows tables and limits; knows no HTML. Every choice is by hash or order, so that equal tables give equal values.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F

from vlm4rec_spark.report.caption_audit_section import AuditExamples
from vlm4rec_spark.report.data import (
    Metric,
    Rejection,
    ReportData,
    ReportSettings,
    SourceSummary,
    StageRun,
    figures,
)
from vlm4rec_spark.report.samples import ChosenApart, ChosenCaptions, ChosenStock, ChosenUsers
from vlm4rec_spark.report.thumbnails import Album
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_ORDER = (
    "ingest",
    "import_captions",
    "caption",
    "embed",
    "index",
    "profiles",
    "recommend",
    "publish",
    "evaluate",
)
_RUNS_PER_STAGE = 50
_REASONS = 40
_EXAMPLE_LENGTH = 240
_METRICS = 20_000


def collect(tables: Tables, settings: ReportSettings) -> ReportData:
    """Read what the page shows. A table that isn't there counts as empty."""
    history = _history(tables)
    counts = {
        table.name: tables.read(table).count()
        for table in (
            schemas.ITEMS,
            schemas.PHOTOS,
            schemas.INTERACTIONS,
            schemas.CAPTIONS,
            schemas.RECOMMENDATIONS,
        )
    }
    # Not its own earlier runs: what it says of the other stages, it can't know of itself.
    runs = [stage_runs[0] for stage, stage_runs in history.items() if stage != "report"]
    stock = ChosenStock(tables, counts["photos"])
    captions = ChosenCaptions(tables, settings.photos, history.get("caption", ()))
    users = ChosenUsers(tables, settings.users)
    evaluated = next(iter(history.get("evaluate", ())), None)
    audit = AuditExamples(evaluated)
    apart = ChosenApart(evaluated)
    by_place = [*stock.places, *captions.places, *audit.places]
    album = Album(tables, by_place, [*users.items, *apart.items])
    return ReportData(
        counts=counts,
        runs=tuple(sorted(runs, key=_along_the_way)),
        sources=_sources(history.get("ingest", ())),
        rejections=_rejections(tables),
        stock=stock.shown(album),
        captions=captions.shown(album),
        audit=audit.shown(album),
        users=users.shown(album),
        metrics=_metrics(tables, evaluated),
        apart=apart.shown(album),
    )


def _history(tables: Tables) -> dict[str, list[StageRun]]:
    """Each stage's good runs, latest first; the first one says whether a later run failed."""
    nth = F.row_number().over(Window.partitionBy("stage").orderBy(F.desc("started_at"), "run_id"))
    rows = (
        tables.read(schemas.RUNS)
        .where(F.col("status") != "unchanged")
        .select(
            "*",
            # Microseconds, because collecting a timestamp would turn it into this machine's time zone.
            F.unix_micros("started_at").alias("started"),
            nth.alias("nth"),
        )
        .where(F.col("nth") <= _RUNS_PER_STAGE)
        .drop("config", "started_at")
        .orderBy("stage", "nth")
        .collect()
    )
    good: dict[str, list[StageRun]] = {}
    failed_since: dict[str, datetime] = {}
    for row in rows:
        started_at = datetime.fromtimestamp(row["started"] / 1e6, UTC)
        if row["status"] != "ok":
            failed_since.setdefault(row["stage"], started_at)
            continue
        runs = good.setdefault(row["stage"], [])
        names = (
            "stage",
            "run_id",
            "seconds",
            "device_seconds",
            "rows_in",
            "rows_ok",
            "rows_failed",
            "rows_skipped",
        )
        runs.append(
            StageRun(
                started_at=started_at,
                versions=dict(sorted(row["versions"].items())),
                details=dict(sorted(row["details"].items())),
                failed_since=None if runs else failed_since.get(row["stage"]),
                **{name: row[name] for name in names},
            )
        )
    return good


def _along_the_way(run: StageRun) -> tuple[int, datetime, str]:
    return (
        _ORDER.index(run.stage) if run.stage in _ORDER else len(_ORDER),
        run.started_at,
        run.stage,
    )


def _sources(runs: Sequence[StageRun]) -> tuple[SourceSummary, ...]:
    """Per source, the last run that took anything of it: one that finds nothing new has nothing to tell."""
    sources = []
    for name in ("items", "photos", "interactions"):
        found = [_source(name, run) for run in runs if figures(run.details.get(name))]
        sources += [next((source for source in found if source.taken), found[0])] if found else []
    return tuple(sources)


def _source(name: str, run: StageRun) -> SourceSummary:
    counted = figures(run.details[name])
    read, taken, rejected, skipped = (
        int(str(counted.get(key, 0))) for key in ("in", "ok", "rejected", "skipped")
    )
    return SourceSummary(name, read, taken, rejected, skipped, run.started_at)


def _rejections(tables: Tables) -> tuple[Rejection, ...]:
    rows = (
        tables.read(schemas.REJECTED)
        .select(
            F.split("source", " ")[0].alias("source"),
            # What follows a colon names the one file or the one error, and would make every row a reason of its own.
            F.regexp_replace("reason", ":.*", "").alias("reason"),
            "occurrences",
            # Where Spark keeps what it couldn't parse; elsewhere it only fills the line.
            F.regexp_replace("row", ',?"_corrupt_record":null', "").alias("row"),
        )
        .groupBy("source", "reason")
        .agg(
            F.sum("occurrences").alias("rows"),
            F.substring(F.min("row"), 1, _EXAMPLE_LENGTH + 1).alias("example"),
        )
        .orderBy("source", F.desc("rows"), "reason")
        .limit(_REASONS)
        .collect()
    )
    return tuple(
        Rejection(
            row["source"], row["reason"], row["rows"], _shortened(row["example"], _EXAMPLE_LENGTH)
        )
        for row in rows
    )


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


def _metrics(tables: Tables, evaluated: StageRun | None) -> tuple[Metric, ...]:
    """The latest evaluation's rows; none without a good run of evaluate."""
    if evaluated is None:
        return ()
    rows = (
        tables.read(schemas.METRICS)
        .where(F.col("run_id") == evaluated.run_id)
        .orderBy("split", "k", "metric", "slice", "arm")
        .limit(_METRICS)
        .drop("run_id", "difference", "difference_low", "difference_high")
        .collect()
    )
    return tuple(Metric(**row.asDict()) for row in rows)
