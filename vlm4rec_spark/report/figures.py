"""Every count of the page, and the photos of its examples, by one query over the tables.

Each part of the query turns rows of a table into figures. Those with equal section, name and key
are summed, and the first keys of each name are returned: few, however large the tables are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.captioning.attributes import Attributes
from vlm4rec_spark.report.data import StageRun
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

ATTRIBUTES = tuple(Attributes.model_fields)
EXAMPLE_LENGTH = 240
_COUNTED = (schemas.ITEMS, schemas.INTERACTIONS, schemas.RECOMMENDATIONS)
_COLUMNS = {
    "name": "STRING",
    "key": "STRING",
    "rows": "BIGINT",
    "order": "BIGINT",
    "example": "STRING",
    "photo": "STRUCT<caption_key: STRING, item_id: STRING, position: INT>",
}


class Figures:
    """The figures by section and name, each a Row of key, rows, example and photo.

    They come by `order`, then most rows first, then by key.

    - tables: rows of each table; shared: photos, and contents, that several items have
    - rejected, by source: rows for each reason, with an example
    - statuses, failed: captions by status, and photos without a caption by error class
    - failures, by error class, and samples: photos without and with a caption
    - captioned: items with a caption; values, by attribute: photos with each value
    """

    def __init__(
        self,
        tables: Tables,
        runs: Sequence[StageRun],
        keys: int,
    ):
        """`runs` of the caption stage, latest first; at most `keys` keys for each name."""
        parts = _parts(tables, _captions_of_last_run(tables, runs))
        rows = reduce(DataFrame.union, parts).where(F.col("section").isNotNull())
        counted = rows.groupBy("section", "name", "key").agg(
            F.sum("rows").alias("rows"),
            F.min("order").alias("order"),
            F.substring(F.min("example"), 1, EXAMPLE_LENGTH + 1).alias("example"),
            F.min("photo").alias("photo"),
        )
        first = Window.partitionBy("section", "name").orderBy("order", F.desc("rows"), "key")
        ranked = counted.withColumn("rank", F.row_number().over(first))
        self._rows: dict[str, dict[str, list[Row]]] = {}
        for row in sorted(
            ranked.where(F.col("rank") <= keys).collect(), key=lambda row: row["rank"]
        ):
            self._rows.setdefault(row["section"], {}).setdefault(row["name"], []).append(row)

    def by_name(self, section: str) -> dict[str, list[Row]]:
        """The figures of a section by their name."""
        return self._rows.get(section, {})

    def of(self, section: str) -> list[Row]:
        """The figures of a section without names."""
        return self.by_name(section).get("", [])

    def counts(self, section: str) -> dict[str, int]:
        """The rows by key of a section without names."""
        return {row["key"]: row["rows"] for row in self.of(section)}


def _captions_of_last_run(tables: Tables, runs: Sequence[StageRun]) -> DataFrame:
    """Imported captions, and those of the model and prompt of the latest run; all captions without
    a run."""
    captions = tables.read(schemas.CAPTIONS)
    details = runs[0].details if runs else {}
    if not {"model", "prompt_id"} <= details.keys():
        return captions
    is_model = F.col("model") == details["model"]
    is_prompt = F.col("prompt_id") == details["prompt_id"]
    return captions.where((F.col("status") == "imported") | (is_model & is_prompt))


def _parts(tables: Tables, captions: DataFrame) -> Iterator[DataFrame]:
    for table in _COUNTED:
        # Not a figure for each row: Delta knows the number of a table's rows without reading them.
        count = tables.read(table).groupBy().count().where("count > 0")
        yield _figures(count, _figure("tables", key=F.lit(table.name), rows=F.col("count")))
    photos = tables.read(schemas.PHOTOS).select("item_id", "position", "image_sha256", "bytes")
    yield _contents(photos)
    yield _rejected(tables.read(schemas.REJECTED))
    yield _figures(captions, _figure("statuses", key=F.col("status")))
    yield _failures(captions, photos)
    yield _captioned(captions, tables.read(schemas.ITEM_CAPTIONS))


def _figures(rows: DataFrame, *figures: Column) -> DataFrame:
    """The figures of each row."""
    return rows.select(F.inline(F.array(*figures)))


def _figure(section: str, **columns: Column) -> Column:
    """A struct of section and _COLUMNS. By default it counts one row, and has no name or key."""
    columns = {"name": F.lit(""), "key": F.lit(""), "rows": F.lit(1)} | columns
    fields = [
        columns.get(name, F.lit(None)).cast(data_type).alias(name)
        for name, data_type in _COLUMNS.items()
    ]
    return F.struct(F.lit(section).alias("section"), *fields)


def _contents(photos: DataFrame) -> DataFrame:
    contents = photos.groupBy("image_sha256", "bytes").agg(
        F.count(F.lit(1)).alias("photos"),
        F.min("item_id").alias("first"),
        F.max("item_id").alias("last"),
    )
    is_shared = (F.col("bytes") > 0) & (F.col("first") != F.col("last"))
    rows = F.col("photos")
    key = F.lit("photos")
    return _figures(
        contents,
        _figure("tables", key=key, rows=rows),
        F.when(is_shared, _figure("shared", key=key, rows=rows)),
        F.when(is_shared, _figure("shared", key=F.lit("contents"))),
    )


def _rejected(rejected: DataFrame) -> DataFrame:
    figure = _figure(
        "rejected",
        name=F.split("source", " ")[0],
        # What follows a colon names one file or one error: every row would be a reason of its own.
        key=F.regexp_replace("reason", ":.*", ""),
        rows=F.col("occurrences"),
        # The column in which Spark keeps what it couldn't parse; empty, it only fills the line.
        example=F.regexp_replace("row", ',?"_corrupt_record":null', ""),
    )
    return _figures(rejected, figure)


def _failures(captions: DataFrame, photos: DataFrame) -> DataFrame:
    failed = captions.where(F.col("status").isin("failed", "rejected"))
    failed = failed.join(photos, on="image_sha256", how="inner")
    position = F.lpad(F.col("position").cast("string"), 10, "0")
    photo_id = F.concat_ws("/", "caption_key", "item_id", position)
    error_class = F.col("error_class")
    return _figures(
        failed,
        _figure("failed", key=error_class),
        _figure("failures", name=error_class, key=photo_id, photo=_photo()),
    )


def _captioned(captions: DataFrame, links: DataFrame) -> DataFrame:
    """The sections captioned, samples and values. links: the table item_captions."""
    texts = captions.where(F.col("caption").isNotNull()).select("caption_key", "attributes")
    by_position = Window.partitionBy("item_id").orderBy("position")
    number = F.row_number().over(by_position).alias("number")
    linked = links.join(texts, on="caption_key", how="inner").select("*", number)
    caption_key = F.col("caption_key")
    order = F.xxhash64(caption_key)
    figures = F.array(
        F.when(F.col("number") == 1, _figure("captioned")),
        _figure("samples", key=caption_key, order=order, photo=_photo()),
    )
    attributes = F.filter(F.map_entries("attributes"), lambda pair: pair["key"].isin(*ATTRIBUTES))
    values = F.transform(
        attributes, lambda pair: _figure("values", name=pair["key"], key=F.lower(pair["value"]))
    )
    return linked.select(F.inline(F.flatten(F.array_compact(F.array(figures, values)))))


def _photo() -> Column:
    return F.struct("caption_key", "item_id", "position")
