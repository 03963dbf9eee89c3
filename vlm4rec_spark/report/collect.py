"""Delta tables to `ReportData`: counts, runs, rejected rows and metrics; `samples.py` reads what
has photos.

Knows tables and limits; knows no HTML. Every choice is by hash or order, so equal tables give equal
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pyspark.sql import Window
from pyspark.sql import functions as F

from vlm4rec_spark.report.caption_audit_section import AuditExamples
from vlm4rec_spark.report.data import (
    MetricRow,
    Rejection,
    ReportData,
    ReportSettings,
    SourceSummary,
    StageRun,
    group_of_details,
)
from vlm4rec_spark.report.samples import (
    CaptionSamples,
    UserSamples,
    photo_summary,
)
from vlm4rec_spark.report.thumbnails import Thumbnails
from vlm4rec_spark.storage import schemas, state

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_STAGES = (
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
_COUNTED = (
    schemas.ITEMS,
    schemas.PHOTOS,
    schemas.INTERACTIONS,
    schemas.CAPTIONS,
    schemas.RECOMMENDATIONS,
)
_SOURCES = ("items", "photos", "interactions")
_RUN_COLUMNS = (
    "stage",
    "run_id",
    "seconds",
    "device_seconds",
    "rows_in",
    "rows_ok",
    "rows_failed",
    "rows_skipped",
)
_RUNS_PER_STAGE = 50
_REASONS = 40
_EXAMPLE_LENGTH = 240
_METRICS = 20_000


def collect(tables: Tables, settings: ReportSettings) -> ReportData:
    """Read what the page shows. A missing table counts as empty."""
    history = _history(tables)
    counts = {table.name: tables.read(table).count() for table in _COUNTED}
    # Without the report's own runs: this one can't know about itself.
    runs = [stage_runs[0] for stage, stage_runs in history.items() if stage != "report"]
    evaluated = next(iter(history.get("evaluate", ())), None)
    captions = CaptionSamples(tables, settings.photos, history.get("caption", ()))
    users = UserSamples(tables, settings.users)
    states = state.read(tables)
    evaluation = states["evaluate"].output.evaluation if "evaluate" in states else None
    recommend = states.get("recommend")
    caption_audit = (evaluation or {}).get("caption_audit") or {}
    audit = AuditExamples(caption_audit)
    photo_keys = [*captions.photo_keys, *audit.photo_keys]
    thumbnails = Thumbnails(tables, photo_keys, users.item_ids)
    return ReportData(
        counts=counts,
        runs=tuple(sorted(runs, key=_stage_order)),
        sources=_sources(history.get("ingest", ())),
        rejections=_rejections(tables),
        photos=photo_summary(tables, counts["photos"]),
        captions=captions.with_photos(thumbnails),
        caption_audit=caption_audit,
        audit_examples=audit.with_photos(thumbnails),
        users=users.with_photos(thumbnails),
        metrics=_metrics(tables, evaluated),
        splits=(evaluation or {}).get("splits") or {},
        calibration=recommend.output.calibration if recommend else None,
    )


def _history(tables: Tables) -> dict[str, list[StageRun]]:
    """Each stage's good runs, latest first; the first one says whether a later run failed."""
    good: dict[str, list[StageRun]] = {}
    failed_since: dict[str, datetime] = {}
    latest_first = Window.partitionBy("stage").orderBy(F.desc("started_at"), "run_id")
    rows = (
        tables.read(schemas.RUNS)
        .where(F.col("status") != "unchanged")
        # Collecting a timestamp would turn it into this machine's time zone.
        .withColumn("started", F.unix_micros("started_at"))
        .withColumn("number", F.row_number().over(latest_first))
        .where(F.col("number") <= _RUNS_PER_STAGE)
        .drop("config", "started_at")
    )
    for row in rows.orderBy("stage", "number").collect():
        stage = row["stage"]
        started_at = datetime.fromtimestamp(row["started"] / 1e6, UTC)
        if row["status"] != "ok":
            failed_since.setdefault(stage, started_at)
            continue
        runs = good.setdefault(stage, [])
        runs.append(
            StageRun(
                started_at=started_at,
                versions=dict(sorted(row["versions"].items())),
                details=dict(sorted(row["details"].items())),
                failed_since=None if runs else failed_since.get(stage),
                **{name: row[name] for name in _RUN_COLUMNS},
            )
        )
    return good


def _stage_order(run: StageRun) -> tuple[int, datetime, str]:
    position = _STAGES.index(run.stage) if run.stage in _STAGES else len(_STAGES)
    return position, run.started_at, run.stage


def _sources(runs: Sequence[StageRun]) -> tuple[SourceSummary, ...]:
    """Per source, the last run that took any of its rows, or else the last run that read it."""
    sources = []
    for name in _SOURCES:
        read = [_source(name, run) for run in runs if group_of_details(run.details, name)]
        with_rows = [source for source in read if source.taken]
        sources += (with_rows or read)[:1]
    return tuple(sources)


def _source(source: str, run: StageRun) -> SourceSummary:
    figures = group_of_details(run.details, source)
    counts = {key: int(count) for key, count in figures.items()}
    return SourceSummary(
        source,
        read=counts.get("in", 0),
        taken=counts.get("ok", 0),
        rejected=counts.get("rejected", 0),
        skipped=counts.get("skipped", 0),
        ingested_at=run.started_at,
    )


def _rejections(tables: Tables) -> tuple[Rejection, ...]:
    rejected = tables.read(schemas.REJECTED).select(
        F.split("source", " ")[0].alias("source"),
        # What follows a colon names one file or one error: every row would be a reason of its own.
        F.regexp_replace("reason", ":.*", "").alias("reason"),
        "occurrences",
        # The column in which Spark keeps what it couldn't parse; empty, it only fills the line.
        F.regexp_replace("row", ',?"_corrupt_record":null', "").alias("row"),
    )
    example = F.substring(F.min("row"), 1, _EXAMPLE_LENGTH + 1).alias("example")
    reasons = rejected.groupBy("source", "reason").agg(F.sum("occurrences").alias("rows"), example)
    ordered = reasons.orderBy("source", F.desc("rows"), "reason").limit(_REASONS)
    return tuple(
        Rejection(row["source"], row["reason"], row["rows"], _shortened(row["example"]))
        for row in ordered.collect()
    )


def _shortened(example: str) -> str:
    return example if len(example) <= _EXAMPLE_LENGTH else example[:_EXAMPLE_LENGTH] + "…"


def _metrics(tables: Tables, evaluated: StageRun | None) -> tuple[MetricRow, ...]:
    """The latest evaluation's rows; none without a good run of evaluate."""
    if evaluated is None:
        return ()
    rows = tables.read(schemas.METRICS).where(F.col("run_id") == evaluated.run_id)
    ordered = rows.orderBy("split", "k", "metric", "slice", "arm").limit(_METRICS)
    return tuple(MetricRow(**row.asDict()) for row in ordered.drop("run_id").collect())
