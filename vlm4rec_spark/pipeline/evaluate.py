"""Evaluate and tune: the arms as of a cut, from the tables as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation import arms
from vlm4rec_spark.evaluation import evaluate as evaluation
from vlm4rec_spark.evaluation import tune as tuning
from vlm4rec_spark.evaluation.arms import EvaluateSettings, ServingConfig
from vlm4rec_spark.pipeline import caption_audit
from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.stages import embed
from vlm4rec_spark.storage import schemas


def tables(
    context: RunContext, settings: EvaluateSettings, in_use: ServingConfig
) -> evaluation.EvaluationTables:
    """What the arms of the settings are judged by. Raises RunError for an arm that nothing is known of."""
    encoder = context.encoder_id()
    stored, representation = context.read(schemas.EMBEDDINGS), F.col("representation")
    # Of each representation that this configuration makes, the vectors that it would make.
    by = F.when(representation.isin(*embed.REPRESENTATIONS), F.lit(encoder)).when(
        representation == embed.IMAGE, F.lit(context.vision_id() or "")
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
        context.log(), context.read(schemas.ITEMS), there, context.tables.read(schemas.USERS)
    )


def in_use(context: RunContext) -> ServingConfig:
    return ServingConfig(
        context.config.representation, context.config.profiles, context.config.item_item
    )


def evaluate(context: RunContext, result: StageResult) -> None:
    settings, used = context.config.evaluate, in_use(context)
    read = tables(context, settings, used)
    rows, result.details = evaluation.evaluate(
        context.spark, read, settings, used, context.reporter.info
    )
    result.ok = sum(json.loads(split)["users"] for split in result.details.values())
    rows += caption_audit.audit(context, result)
    frame = context.spark.createDataFrame(
        [row | {"run_id": context.run_id} for row in rows], schemas.METRICS.schema
    )
    context.tables.insert(schemas.METRICS, frame)


def tune(
    context: RunContext, representations: Sequence[str], metric: tuning.Metric
) -> tuning.Tuned:
    settings = context.config.evaluate.model_copy(update={"arms": tuple(representations)})
    read = tables(context, settings, in_use(context))
    return tuning.tune(
        context.spark,
        read,
        settings,
        in_use(context),
        representations,
        metric,
        context.reporter.info,
    )


def inputs_fingerprint(context: RunContext) -> object:
    settings = (context.config.evaluate, context.config.profiles, context.config.item_item)
    described = [
        context.config.representation,
        context.encoder_id(),
        context.vision_id(),
        caption_audit.inputs_fingerprint(context),
    ]
    return [*(each.model_dump(mode="json") for each in settings), *described]
