"""Evaluate and tune: the arms as of a cut, from the tables as they are."""

from collections.abc import Sequence

from pyspark.sql import DataFrame
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
from vlm4rec_spark.storage.state import StageOutput


def evaluate(context: RunContext, result: StageResult) -> None:
    """Add this run's metrics; audit the captions too."""
    settings = context.config.evaluate
    serving = _serving_config(context)
    rows, splits = evaluation.evaluate(
        context.spark,
        _tables(context),
        settings,
        serving,
        context.reporter.info,
    )
    if not splits:
        _require_known_arms(context, settings, serving)
    result.ok = sum(facts["users"] for facts in splits.values())
    audit_rows, audit = caption_audit.audit(context, result)
    result.output = StageOutput(evaluation={"splits": splits, "caption_audit": audit})
    rows = [row | {"run_id": context.run_id} for row in rows + audit_rows]
    metrics = context.spark.createDataFrame(rows, schemas.METRICS.schema)
    context.tables.insert(schemas.METRICS, metrics)


def tune(
    context: RunContext,
    representations: Sequence[str],
    metric: tuning.Metric,
) -> tuning.Tuned:
    """Choose settings on a validation cut; writes nothing."""
    settings = context.config.evaluate.model_copy(update={"arms": tuple(representations)})
    serving = _serving_config(context)
    _require_known_arms(context, settings, serving)
    return tuning.tune(
        context.spark,
        _tables(context),
        settings,
        serving,
        representations,
        metric,
        context.reporter.info,
    )


def inputs_fingerprint(context: RunContext) -> object:
    settings = (context.config.evaluate, context.config.profiles, context.config.item_item)
    return [
        *(section.model_dump(mode="json") for section in settings),
        context.config.representation,
        context.encoder_id(),
        context.vision_id(),
        caption_audit.inputs_fingerprint(context),
    ]


def _serving_config(context: RunContext) -> ServingConfig:
    return ServingConfig(
        context.config.representation,
        context.config.profiles,
        context.config.item_item,
    )


def _tables(context: RunContext) -> evaluation.EvaluationTables:
    """What the arms are evaluated on."""
    return evaluation.EvaluationTables(
        context.log(),
        context.read(schemas.ITEMS),
        _embeddings(context),
        context.tables.read(schemas.USERS),
    )


def _require_known_arms(
    context: RunContext,
    settings: EvaluateSettings,
    serving: ServingConfig,
) -> None:
    """Raises RunError for an arm whose representation has no embedding."""
    rows = _embeddings(context).select("representation").distinct().collect()
    representations = {row["representation"] for row in rows}
    if unknown := evaluation.required_representations(settings, serving) - representations:
        raise RunError(
            f"evaluate.arms: {', '.join(sorted(unknown))}: neither a baseline "
            f"({', '.join(arms.BASELINES)}) nor blend nor a fusion nor one of "
            "evaluate.custom_arms nor a representation of the table embeddings "
            f"({', '.join(sorted(representations))}). For image set embed.vision and run embed."
        )


def _embeddings(context: RunContext) -> DataFrame:
    """Of each representation that this configuration makes, the vectors of its encoder."""
    representation = F.col("representation")
    is_text = representation.isin(*embed.REPRESENTATIONS)
    is_image = representation == embed.IMAGE
    encoder = F.when(is_text, context.encoder_id())
    encoder = encoder.when(is_image, context.vision_id() or "")
    embeddings = context.read(schemas.EMBEDDINGS)
    return embeddings.where(encoder.isNull() | (F.col("encoder_id") == encoder))
