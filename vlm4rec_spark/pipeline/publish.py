"""Publish: the lists in the shapes that consumers read."""

from __future__ import annotations

from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.stages import publish as shapes
from vlm4rec_spark.storage import schemas


def publish(context: RunContext, result: StageResult) -> None:
    lists = context.read(schemas.RECOMMENDATIONS)
    context.tables.sync(schemas.EXPORT_LONG, shapes.long(lists, context.tables.read(schemas.ITEMS)))
    context.tables.sync(schemas.EXPORT_WIDE, shapes.wide(lists))
    result.ok = lists.count()


def inputs_fingerprint(context: RunContext) -> object:
    """Nothing but the tables."""
    return ""
