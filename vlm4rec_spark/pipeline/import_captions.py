"""import-captions: texts from elsewhere, or the captions of earlier tables, as captions."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.caption import plan
from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.stages import ingest
from vlm4rec_spark.storage import schemas

_KEY = "import-captions"
_OF_A_CAPTIONS_TABLE = {"caption_key", "image_sha256", "status", "caption"}


def import_captions(context: RunContext, result: StageResult, source: Source) -> None:
    """Raises UsageError if a column is missing, and RunError if no row can be taken."""
    if source.format == "delta":
        table = reader.open_table(context.spark, _KEY, source)
        if set(table.columns) >= _OF_A_CAPTIONS_TABLE:
            _import_table(context, result, table)
            return
    _import_texts(context, result, reader.read(context.spark, _KEY, source))


def _import_table(context: RunContext, result: StageResult, table: DataFrame) -> None:
    """Take the good captions of a `captions` table as they are, for every photo with their key.

    Captions that failed, were rejected or were imported themselves are skipped.
    """
    rows = table.where("status = 'ok' AND caption IS NOT NULL AND caption_key IS NOT NULL")
    rows = rows.dropDuplicates(["caption_key"])
    good = rows.count()
    if not good:
        raise RunError(f"{_KEY}: the table has no caption of status ok. Nothing was written.")
    if "attempts" not in rows.columns:
        rows = rows.withColumn("attempts", F.lit(1))
    result.ok = context.tables.insert(schemas.CAPTIONS, caption_rows(context, rows))
    result.skipped = table.count() - result.ok
    result.details = {"imported": str(good)}


def _import_texts(context: RunContext, result: StageResult, raw: DataFrame) -> None:
    for field in ("item_id", "text"):
        if not reader.has_field(raw, field):
            raise UsageError(
                f"{_KEY}: the source has no column {field} with a value. Name it with "
                f"--column {field}=NAME."
            )
    rows = plan.import_rows(raw, context.read(schemas.ITEMS))
    good = rows.where("reason IS NULL")
    counts = rows.agg(F.count("*"), F.count("reason"), F.min("reason"))
    ((total, failed, reason),) = counts.collect()
    imported = total - failed
    if not imported:
        reason = reason or "the source is empty"
        raise RunError(f"{_KEY}: no row could be taken, such as: {reason}. Nothing was written.")
    captions = good.selectExpr(
        "caption_key",
        "caption",
        "'imported' AS status",
        "1 AS attempts",
    )
    result.failed = failed
    result.ok = context.tables.insert(schemas.CAPTIONS, caption_rows(context, captions))
    result.skipped = imported - result.ok
    _link_to_items(context, good)
    if failed:
        context.reject(ingest.rejected(rows, "captions"))
    result.details = {"imported": str(imported)}


def _link_to_items(context: RunContext, captions: DataFrame) -> None:
    """Put the captions in force, in place of any other of the same items."""
    imported = captions.selectExpr("item_id", "0 AS position", "caption_key")
    in_force = context.tables.read(schemas.ITEM_CAPTIONS)
    remaining = in_force.join(imported.select("item_id"), on="item_id", how="left_anti")
    context.tables.sync(schemas.ITEM_CAPTIONS, imported.unionByName(remaining))


def caption_rows(context: RunContext, rows: DataFrame) -> DataFrame:
    """Rows of `captions` from rows with some of its columns.

    By default captioned_at is now, run_id is this run, and any other column is null.
    """
    defaults = {"captioned_at": F.current_timestamp(), "run_id": F.lit(context.run_id)}
    columns = []
    for field in schemas.CAPTIONS.schema:
        column = F.col(field.name)
        if field.name not in rows.columns:
            column = defaults.get(field.name, F.lit(None))
        columns.append(column.cast(field.dataType).alias(field.name))
    return rows.select(*columns)
