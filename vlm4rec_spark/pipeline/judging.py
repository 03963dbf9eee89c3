"""Evaluate, export and report: what people and other systems read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pyspark.sql import functions as F

from vlm4rec_spark import report as page
from vlm4rec_spark import schemas
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation import evaluate as evaluation
from vlm4rec_spark.evaluation.arms import InUse
from vlm4rec_spark.pipeline import auditing
from vlm4rec_spark.pipeline.run import Outcome, Run, one
from vlm4rec_spark.stages import embed
from vlm4rec_spark.stages import export as shapes


def evaluate(run: Run, outcome: Outcome) -> None:
    settings, encoder = run.config.evaluate, run.encoder_id()
    stored, representation = run.read(schemas.EMBEDDINGS), F.col("representation")
    # Of each representation that this configuration makes, the vectors that it would make.
    by = F.when(representation.isin(*embed.REPRESENTATIONS), F.lit(encoder)).when(
        representation == embed.IMAGE, F.lit(run.vision_id() or "")
    )
    there = stored.where(by.isNull() | (F.col("encoder_id") == by))
    known = {row["representation"] for row in there.select("representation").distinct().collect()}
    in_use = InUse(run.config.representation, run.config.profiles, run.config.cooccurrence)
    if unknown := evaluation.arms.needed(settings.arms, in_use) - known:
        raise RunError(f"evaluate.arms: {', '.join(sorted(unknown))}: neither a baseline "
                       f"({', '.join(evaluation.arms.BASELINES)}) nor blend nor a representation of the table "
                       f"embeddings ({', '.join(sorted(known))}). "
                       "For image set embed.vision and run embed.")  # fmt: skip
    read = evaluation.Tables(run.read(schemas.INTERACTIONS), run.read(schemas.ITEMS), there)
    rows, outcome.details = evaluation.evaluate(run.spark, read, settings, in_use, run.voice.say)
    outcome.ok = sum(json.loads(split)["users"] for split in outcome.details.values())
    rows += auditing.audit(run, outcome)
    frame = run.spark.createDataFrame([row | {"run_id": run.run_id} for row in rows], schemas.METRICS.schema)
    run.tables.insert(schemas.METRICS, frame)


def beside_metrics(run: Run) -> object:
    settings = (run.config.evaluate, run.config.profiles, run.config.cooccurrence)
    described = [run.config.representation, run.encoder_id(), run.vision_id(), auditing.beside(run)]
    return [*(each.model_dump(mode="json") for each in settings), *described]


def export(run: Run, outcome: Outcome) -> None:
    lists = run.read(schemas.RECOMMENDATIONS)
    run.tables.sync(schemas.EXPORT_LONG, shapes.long(lists, run.tables.read(schemas.ITEMS)))
    run.tables.sync(schemas.EXPORT_WIDE, shapes.wide(lists))
    outcome.ok = lists.count()


def report(run: Run, outcome: Outcome) -> None:
    outcome.details = {"path": str(page.write(run.tables, run.config.report).resolve())}


def beside_report(run: Run) -> object:
    """Which runs the page tells of, and the page that is there."""
    told = run.tables.read(schemas.RUNS).where((F.col("status") != "unchanged") & (F.col("stage") != "report"))
    latest = one(told.agg(F.count(F.lit(1)), F.max(F.unix_micros("started_at"))))
    path = Path(run.config.report.path)
    page_there = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    return [run.config.report.model_dump(mode="json"), list(latest), page_there]
