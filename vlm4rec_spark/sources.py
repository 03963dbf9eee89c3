"""The company's own files and tables as raw DataFrames, and the listing of photo files.

Knows formats, column mappings and where a row stood; judges no row (`stages/ingest.py` does).
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import MapType, StringType

from vlm4rec_spark.errors import RunError, UsageError


class Source(BaseModel):
    """Files or a Delta table. `columns` maps our column names to the source's; unmapped ones keep their name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: tuple[str, ...] = ()
    format: Literal["csv", "json", "parquet", "delta"] = "csv"
    columns: dict[str, str] = {}
    options: dict[str, str] = {}


class PhotoSource(BaseModel):
    """Where photos come from: a folder of files named after the items, or a column of the catalogue.

    `file_name` is a regular expression (Java's) with two groups: the item's id, and the photo's position or nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = ""
    file_name: str = Field(r"(.+?)(?:\.(\d{1,3}))?\.[A-Za-z0-9]+", min_length=1)
    path_column: str = ""
    bytes_column: str = ""

    @field_validator("file_name")
    @classmethod
    def _two_groups(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as wrong:
            raise ValueError(f"not a regular expression: {wrong}") from None
        if groups != 2:
            raise ValueError(f"it needs two groups, item_id and position, and has {groups}")
        return pattern


def read(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """The rows of the source, with what every later step needs to name one of them.

    Columns: `fields` (map of our column name to text), `image` when the source has binary columns, `source` (file),
    `modified_at` of the file, `row` (the raw row as JSON). `key` is the config key, for errors. Raises UsageError when
    a file isn't there or a mapped column isn't in it.
    """
    try:
        raw = _load(spark, source)
        names = raw.columns
    except AnalysisException as missing:
        raise UsageError(f"{key}.path: {_first_line(missing)}") from None
    except PySparkException as broken:
        raise RunError(f"{key}: the {source.format} source can't be read: {_first_line(broken)}") from None
    absent = [f"{ours} ← {theirs}" for ours, theirs in source.columns.items() if theirs not in names]
    if absent:
        there = ", ".join(names)
        raise UsageError(f"{key}.columns: {', '.join(absent)}: no such column in the source. It has: {there}.")
    mapped = set(source.columns.values())
    # Last, so that a name that the config maps wins over a source column that happens to bear it.
    fields = {name: name for name in names if name not in mapped and not name.startswith("_")} | source.columns
    binary = [field.name for field in raw.schema if field.dataType.typeName() == "binary"]
    shown = [F.col(f"`{name}`") for name in names if name not in binary]
    pairs = [
        part for ours, theirs in fields.items() if theirs not in binary
        for part in (F.lit(ours), F.col(f"`{theirs}`").cast("string"))
    ]  # fmt: skip
    return raw.select(
        (F.create_map(*pairs) if pairs else F.lit(None).cast(MapType(StringType(), StringType()))).alias("fields"),
        *[F.col(f"`{name}`") for name in binary],
        F.col("_metadata.file_path").alias("source"),
        F.col("_metadata.file_modification_time").alias("modified_at"),
        F.to_json(F.struct(*shown), {"ignoreNullFields": "false"}).alias("row"),
    )


def listing(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """The source's files without their content: uri, bytes, modified_at. Raises UsageError when a path isn't there."""
    try:
        return _files(spark, source.path)
    except AnalysisException as missing:
        raise UsageError(f"{key}.path: {_first_line(missing)}") from None


def photo_files(spark: SparkSession, photos: PhotoSource) -> DataFrame:
    """The photo folder's files: uri, bytes, modified_at, item_id and position (null when the name doesn't fit)."""
    try:
        files = _files(spark, (photos.folder,))
    except AnalysisException as missing:
        raise UsageError(f"ingest.photos.folder: {_first_line(missing)}") from None
    files = files.unionByName(_empty_files(spark, photos.folder))
    name = F.regexp_extract("uri", "([^/]+)$", 1)
    pattern = f"^{photos.file_name}$"
    fits = name.rlike(pattern)
    item, position = (F.regexp_extract(name, pattern, group) for group in (1, 2))
    return files.select(
        "*",
        F.when(fits, item).alias("item_id"),
        F.when(fits, F.when(position == "", 0).otherwise(position.cast("int"))).alias("position"),
    )


def _files(spark: SparkSession, paths: tuple[str, ...]) -> DataFrame:
    # Without its content column, this reader only lists: no byte of a file is read.
    files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(list(paths))
    names = {"path": "uri", "length": "bytes", "modificationTime": "modified_at"}
    return files.select(*[F.col(theirs).alias(ours) for theirs, ours in names.items()])


def _empty_files(spark: SparkSession, folder: str) -> DataFrame:
    """What Spark's listing leaves out: files of no bytes. Their time is null; who opens one can ask for it."""
    assert spark._jvm is not None
    files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(folder)
    # All names stay in the JVM: there may be millions.
    every = spark._jvm.scala.Predef.genericWrapArray(files._jdf.inputFiles()).toSeq()
    names = spark._jsparkSession.createDataset(every, spark._jvm.org.apache.spark.sql.Encoders.STRING())
    # One of the two writes file:/ and the other file:///.
    one_way = F.regexp_replace("value", "^file:/+", "file:/").alias("value")
    there = files.select(F.col("_metadata.file_path").alias("value")).select(one_way)
    empty = DataFrame(names.toDF(), spark).select(one_way).join(there, on="value", how="left_anti")
    return empty.select(
        F.url_decode(F.replace("value", F.lit("+"), F.lit("%2B"))).alias("uri"),
        F.lit(0).cast("bigint").alias("bytes"),
        F.lit(None).cast("timestamp").alias("modified_at"),
    )


def _load(spark: SparkSession, source: Source) -> DataFrame:
    paths = list(source.path)
    if source.format == "csv":
        options = {"header": "true", "multiLine": "true", "escape": '"', **source.options}
        header = spark.read.options(**options).csv(paths)
        if not header.columns:
            return header
        # Several files must have one header, or cells would land in other columns. Spark invents a name where the
        # header has none, as pandas writes its index; then it can't compare.
        if not any(re.fullmatch(r"_c\d+", name) for name in header.columns):
            options = {"enforceSchema": "false", **options}
        return (
            spark.read.options(**options, columnNameOfCorruptRecord="_corrupt_record")
            .schema(header.schema.add("_corrupt_record", StringType())).csv(paths)
        )  # fmt: skip
    if source.format == "json":
        rows = spark.read.options(**{"primitivesAsString": "true", **source.options}).json(paths)
        # Spark doesn't give this column alone.
        return spark.read.text(paths).toDF("_corrupt_record") if rows.columns == ["_corrupt_record"] else rows
    reader = spark.read.options(**source.options).format(source.format)
    if source.format == "delta":
        if len(paths) != 1:
            raise UsageError(f"path: a Delta source is one folder or table, and {len(paths)} are named.")
        path = paths[0]
        return reader.load(path) if "/" in path else spark.read.table(path)
    return reader.load(paths)


def _first_line(error: PySparkException) -> str:
    return " ".join(str(error).split("\n")[0].split())
