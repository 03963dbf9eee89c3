"""Report: one HTML page of what the tables hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pyspark.sql import functions as F

from vlm4rec_spark import report as page
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.storage import schemas


def report(context: RunContext, result: StageResult) -> None:
    path = page.write(context.tables, context.config.report)
    result.details = {"path": str(path.resolve())}


def inputs_fingerprint(context: RunContext) -> object:
    """The runs that the page shows, and the page as it is."""
    settings = context.config.report
    runs = context.tables.read(schemas.RUNS)
    shown = runs.where("status != 'unchanged' AND stage != 'report'")
    last_start = F.max(F.unix_micros("started_at"))
    latest = first_row(shown.agg(F.count("*"), last_start))
    path = Path(settings.path)
    written = "none"
    if path.is_file():
        written = hashlib.sha256(path.read_bytes()).hexdigest()
    return [
        settings.model_dump(mode="json"),
        list(latest),
        written,
    ]
