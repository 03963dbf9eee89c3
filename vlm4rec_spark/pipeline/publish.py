"""Publish: the lists in the shapes that consumers read."""

from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.stages import publish as stage
from vlm4rec_spark.storage import schemas


def publish(context: RunContext, result: StageResult) -> None:
    """Write what changed, so that the change feeds of the exports hold only changes."""
    lists = context.read(schemas.RECOMMENDATIONS)
    items = context.tables.read(schemas.ITEMS)
    context.tables.sync(schemas.EXPORT_LONG, stage.long(lists, items))
    context.tables.sync(schemas.EXPORT_WIDE, stage.wide(lists))
    result.ok = lists.count()


def inputs_fingerprint(context: RunContext) -> object:
    """Nothing but the tables."""
    return ""
