"""Delta tables to `ReportData`: runs and metrics; `figures.py` counts, `samples.py` has the photos.

Knows tables and limits; knows no HTML. Every choice is by hash or order, so equal tables give equal
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from vlm4rec_spark.report.caption_audit_section import AuditExamples
from vlm4rec_spark.report.data import (
    MetricRow,
    PhotoSummary,
    Rejection,
    ReportData,
    ReportSettings,
    SourceSummary,
    StageRun,
    group_of_details,
)
from vlm4rec_spark.report.figures import EXAMPLE_LENGTH, Figures
from vlm4rec_spark.report.samples import CaptionSamples, UserSamples
from vlm4rec_spark.report.thumbnails import Thumbnails
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.state import StageState
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
_RUNS = 10_000
_REASONS = 40
_METRICS = 20_000


def collect(
    tables: Tables,
    states: Mapping[str, StageState],
    settings: ReportSettings,
) -> ReportData:
    """Read what the page shows. A missing table counts as empty."""
    history = _history(tables)
    # Without the report's own runs: this one can't know about itself.
    runs = [stage_runs[0] for stage, stage_runs in history.items() if stage != "report"]
    caption_runs = history.get("caption", ())
    figures = Figures(tables, caption_runs, max(_REASONS, settings.photos))
    captions = CaptionSamples(figures, settings.photos, caption_runs)
    users = UserSamples(tables, settings.users)
    evaluate = states.get("evaluate")
    evaluation = (evaluate and evaluate.output.evaluation) or {}
    recommend = states.get("recommend")
    caption_audit = evaluation.get("caption_audit") or {}
    audit = AuditExamples(caption_audit)
    counts = figures.counts("tables")
    photos = counts.get("photos", 0)
    thumbnails = Thumbnails(tables, captions.photos, audit.photo_keys, users.item_ids, photos)
    return ReportData(
        counts=counts,
        runs=tuple(sorted(runs, key=_stage_order)),
        sources=_sources(history.get("ingest", ())),
        rejections=_rejections(figures),
        photos=_photo_summary(figures.counts("shared"), thumbnails.kinds),
        captions=captions.with_photos(thumbnails),
        caption_audit=caption_audit,
        audit_examples=audit.with_photos(thumbnails),
        users=users.with_photos(thumbnails),
        metrics=_metrics(tables, history.get("evaluate", ())),
        splits=evaluation.get("splits") or {},
        calibration=recommend.output.calibration if recommend else None,
    )


def _history(tables: Tables) -> dict[str, list[StageRun]]:
    """Each stage's good runs, latest first; the first one says whether a later run failed."""
    good: dict[str, list[StageRun]] = {}
    failed_since: dict[str, datetime] = {}
    runs = tables.read(schemas.RUNS).where(F.col("status") != "unchanged").drop("config")
    latest = runs.orderBy(F.desc("started_at"), "run_id").limit(_RUNS)
    # Collecting a timestamp would turn it into this machine's time zone.
    for row in latest.withColumn("started_at", F.unix_micros("started_at")).collect():
        stage = row["stage"]
        started_at = datetime.fromtimestamp(row["started_at"] / 1e6, UTC)
        if row["status"] != "ok":
            failed_since.setdefault(stage, started_at)
            continue
        stage_runs = good.setdefault(stage, [])
        stage_runs.append(
            StageRun(
                started_at=started_at,
                versions=dict(sorted(row["versions"].items())),
                details=dict(sorted(row["details"].items())),
                failed_since=None if stage_runs else failed_since.get(stage),
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


def _rejections(figures: Figures) -> tuple[Rejection, ...]:
    rejections = [
        Rejection(source, row["key"], row["rows"], _shortened(row["example"]))
        for source, rows in sorted(figures.by_name("rejected").items())
        for row in rows
    ]
    return tuple(rejections[:_REASONS])


def _shortened(example: str) -> str:
    return example if len(example) <= EXAMPLE_LENGTH else example[:EXAMPLE_LENGTH] + "…"


def _photo_summary(shared: Mapping[str, int], kinds: Mapping[str, int]) -> PhotoSummary:
    contents = shared.get("contents", 0)
    return PhotoSummary(sum(kinds.values()), kinds, contents, shared.get("photos", 0))


def _metrics(tables: Tables, runs: Sequence[StageRun]) -> tuple[MetricRow, ...]:
    """The latest evaluation's rows; none without a good run of evaluate (latest first)."""
    if not runs:
        return ()
    rows = tables.read(schemas.METRICS).where(F.col("run_id") == runs[0].run_id)
    ordered = rows.orderBy("split", "k", "metric", "slice", "arm").limit(_METRICS)
    return tuple(MetricRow(**row.asDict()) for row in ordered.drop("run_id").collect())
