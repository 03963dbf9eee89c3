"""Evaluate, publish and report: what people and other systems read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import functions as F

from vlm4rec_spark import report as page
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation import arms
from vlm4rec_spark.evaluation import evaluate as evaluation
from vlm4rec_spark.evaluation import tune as tuning
from vlm4rec_spark.evaluation.arms import EvaluateSettings, ServingConfig
from vlm4rec_spark.pipeline import caption_audit
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.stages import embed
from vlm4rec_spark.stages import publish as shapes
from vlm4rec_spark.storage import schemas


def tables(
    run: RunContext, settings: EvaluateSettings, in_use: ServingConfig
) -> evaluation.EvaluationTables:
    """What the arms of the settings are judged by. Raises RunError for an arm that nothing is known of."""
    encoder = run.encoder_id()
    stored, representation = run.read(schemas.EMBEDDINGS), F.col("representation")
    # Of each representation that this configuration makes, the vectors that it would make.
    by = F.when(representation.isin(*embed.REPRESENTATIONS), F.lit(encoder)).when(
        representation == embed.IMAGE, F.lit(run.vision_id() or "")
    )
    there = stored.where(by.isNull() | (F.col("encoder_id") == by))
    known = {row["representation"] for row in there.select("representation").distinct().collect()}
    if unknown := evaluation.needed(settings, in_use) - known:
        raise RunError(
            f"evaluate.arms: {', '.join(sorted(unknown))}: neither a baseline "
            f"({', '.join(arms.BASELINES)}) nor blend nor a fusion nor one of evaluate.custom_arms nor a "
            f"representation of the table embeddings ({', '.join(sorted(known))}). "
            "For image set embed.vision and run embed."
        )
    return evaluation.EvaluationTables(
        run.log(), run.read(schemas.ITEMS), there, run.tables.read(schemas.USERS)
    )


def in_use(run: RunContext) -> ServingConfig:
    return ServingConfig(run.config.representation, run.config.profiles, run.config.item_item)


def evaluate(run: RunContext, outcome: StageResult) -> None:
    settings, used = run.config.evaluate, in_use(run)
    read = tables(run, settings, used)
    rows, outcome.details = evaluation.evaluate(run.spark, read, settings, used, run.reporter.info)
    outcome.ok = sum(json.loads(split)["users"] for split in outcome.details.values())
    rows += caption_audit.audit(run, outcome)
    frame = run.spark.createDataFrame(
        [row | {"run_id": run.run_id} for row in rows], schemas.METRICS.schema
    )
    run.tables.insert(schemas.METRICS, frame)


def tune(run: RunContext, representations: Sequence[str], metric: tuning.Metric) -> tuning.Tuned:
    settings = run.config.evaluate.model_copy(update={"arms": tuple(representations)})
    read = tables(run, settings, in_use(run))
    return tuning.tune(
        run.spark, read, settings, in_use(run), representations, metric, run.reporter.info
    )


def evaluate_fingerprint(run: RunContext) -> object:
    settings = (run.config.evaluate, run.config.profiles, run.config.item_item)
    described = [
        run.config.representation,
        run.encoder_id(),
        run.vision_id(),
        caption_audit.caption_audit_fingerprint(run),
    ]
    return [*(each.model_dump(mode="json") for each in settings), *described]


def publish(run: RunContext, outcome: StageResult) -> None:
    lists = run.read(schemas.RECOMMENDATIONS)
    run.tables.sync(schemas.EXPORT_LONG, shapes.long(lists, run.tables.read(schemas.ITEMS)))
    run.tables.sync(schemas.EXPORT_WIDE, shapes.wide(lists))
    outcome.ok = lists.count()


def report(run: RunContext, outcome: StageResult) -> None:
    outcome.details = {"path": str(page.write(run.tables, run.config.report).resolve())}


def report_fingerprint(run: RunContext) -> object:
    """Which runs the page tells of, and the page that is there."""
    told = run.tables.read(schemas.RUNS).where(
        (F.col("status") != "unchanged") & (F.col("stage") != "report")
    )
    latest = first_row(told.agg(F.count(F.lit(1)), F.max(F.unix_micros("started_at"))))
    path = Path(run.config.report.path)
    page_there = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    return [run.config.report.model_dump(mode="json"), list(latest), page_there]
