"""Evaluate, export and report: what people and other systems read."""

from __future__ import annotations

import json

from pyspark.sql import functions as F

from vlm4rec_spark import report as page
from vlm4rec_spark import schemas
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation import evaluate as evaluation
from vlm4rec_spark.pipeline.run import Outcome, Run
from vlm4rec_spark.stages import embed
from vlm4rec_spark.stages import export as shapes


def evaluate(run: Run, outcome: Outcome) -> None:
    settings, encoder = run.config.evaluate, run.encoder_id()
    there = run.read(schemas.EMBEDDINGS)
    known = {row["representation"] for row in there.select("representation").distinct().collect()}
    if unknown := set(settings.arms) - known - set(evaluation.arms.BASELINES):
        raise RunError(f"evaluate.arms: {', '.join(sorted(unknown))}: neither a baseline "
                       f"({', '.join(evaluation.arms.BASELINES)}) nor a representation of the table embeddings "
                       f"({', '.join(sorted(known))}).")  # fmt: skip
    outcome.versions = run.tables.versions([schemas.INTERACTIONS, schemas.ITEMS, schemas.EMBEDDINGS])
    ours = F.col("representation").isin(*embed.REPRESENTATIONS)
    vectors = there.where(~ours | (F.col("encoder_id") == encoder))
    read = evaluation.Tables(run.read(schemas.INTERACTIONS), run.read(schemas.ITEMS), vectors)
    rows, outcome.details = evaluation.evaluate(run.spark, read, settings, run.config.profiles, run.voice.say)
    frame = run.spark.createDataFrame([row | {"run_id": run.run_id} for row in rows], schemas.METRICS.schema)
    run.tables.insert(schemas.METRICS, frame)
    outcome.ok = sum(json.loads(split)["users"] for split in outcome.details.values())


def export(run: Run, outcome: Outcome) -> None:
    lists = run.read(schemas.RECOMMENDATIONS)
    outcome.versions = run.tables.versions([schemas.RECOMMENDATIONS])
    run.tables.sync(schemas.EXPORT_LONG, shapes.long(lists, run.tables.read(schemas.ITEMS)))
    run.tables.sync(schemas.EXPORT_WIDE, shapes.wide(lists))
    outcome.ok = lists.count()


def report(run: Run, outcome: Outcome) -> None:
    outcome.details = {"path": str(page.write(run.tables, run.config.report).resolve())}
