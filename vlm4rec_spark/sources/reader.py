"""The company's own files and tables as raw DataFrames, and the listing of photo files.

Knows formats, column mappings and where a row stood; judges no row (`stages/ingest.py` does).
"""

from __future__ import annotations

import re
from typing import Literal

from py4j.protocol import Py4JJavaError
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import MapType, StringType

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.photos.download import HttpSettings


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
    Files whose name begins with a dot or `_` don't count: to Spark they are hidden.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = ""
    file_name: str = Field(r"(.+?)(?:\.(\d{1,3}))?\.[A-Za-z0-9]+", min_length=1)
    path_column: str = ""
    bytes_column: str = ""
    keep: bool = True
    http: HttpSettings = HttpSettings()

    @model_validator(mode="after")
    def _bytes_have_no_other_place(self) -> PhotoSource:
        if self.bytes_column and not self.keep:
            raise ValueError(
                "keep: photos of a bytes_column lie nowhere else, so they have to be kept"
            )
        return self

    @field_validator("file_name")
    @classmethod
    def _two_groups(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except (re.error, OverflowError, RecursionError) as wrong:
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
        if source.format == "json":
            return _json_rows(spark, key, source)
        raw = _load(spark, source)
        names = raw.columns
    except AnalysisException as missing:
        raise UsageError(f"{key}.path: {_first_line(missing)}") from None
    except (PySparkException, Py4JJavaError) as broken:
        raise RunError(
            f"{key}: the {source.format} source can't be read: {_first_line(broken)}"
        ) from None
    _require(key, source, names)
    mapped = set(source.columns.values())
    # Last, so that a name that the config maps wins over a source column that happens to bear it.
    fields = {
        name: name for name in names if name not in mapped and not name.startswith("_")
    } | source.columns
    binary = [field.name for field in raw.schema if field.dataType.typeName() == "binary"]
    shown = [column_named(name) for name in names if name not in binary]
    pairs = [
        part
        for ours, theirs in fields.items()
        if theirs not in binary
        # Parquet doesn't promise that its text is UTF-8, and Python can't hold what isn't.
        for part in (F.lit(ours), F.make_valid_utf8(column_named(theirs).cast("string")))
    ]
    return raw.select(
        (
            F.create_map(*pairs) if pairs else F.lit(None).cast(MapType(StringType(), StringType()))
        ).alias("fields"),
        *[column_named(name) for name in binary if name.lower() not in _OURS],
        *_file(raw),
        F.to_json(F.struct(*shown), {"ignoreNullFields": "false"}).alias("row"),
    )


def column_named(name: str) -> Column:
    """The column of exactly this name, whatever it is made of."""
    return F.col("`" + name.replace("`", "``") + "`")


def listing(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """The source's files without their content: uri, bytes, modified_at. Raises UsageError when a path isn't there."""
    return _files(spark, f"{key}.path", source.path)


def literal(uri: str) -> str:
    """A path that names this very file, even where its name holds signs of a glob."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", uri)


def photo_files(spark: SparkSession, photos: PhotoSource) -> DataFrame:
    """The photo folder's files: uri, bytes, modified_at, item_id and position (null when the name doesn't fit)."""
    assert spark._jvm is not None
    try:
        spark._jvm.java.util.regex.Pattern.compile(photos.file_name)
    except (PySparkException, Py4JJavaError) as wrong:
        raise UsageError(f"ingest.photos.file_name: {_first_line(wrong)}") from None
    files = _files(spark, "ingest.photos.folder", (photos.folder,)).unionByName(
        _empty_files(spark, photos.folder)
    )
    name = F.regexp_extract("uri", "([^/]+)$", 1)
    pattern = f"^{photos.file_name}$"
    fits = name.rlike(pattern)
    item, position = (F.regexp_extract(name, pattern, group) for group in (1, 2))
    return files.select(
        "*",
        F.when(fits, item).alias("item_id"),
        F.when(fits, F.when(position == "", 0).otherwise(position.try_cast("int"))).alias(
            "position"
        ),
    )


def _files(spark: SparkSession, key: str, paths: tuple[str, ...]) -> DataFrame:
    try:
        # Without its content column, this reader only lists: no byte of a file is read.
        files = (
            spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(list(paths))
        )
    except AnalysisException as missing:
        raise UsageError(f"{key}: {_first_line(missing)}") from None
    except (PySparkException, Py4JJavaError) as broken:
        raise RunError(f"{key}: it can't be listed: {_first_line(broken)}") from None
    names = {"path": "uri", "length": "bytes", "modificationTime": "modified_at"}
    return files.select(*[F.col(theirs).alias(ours) for theirs, ours in names.items()])


def _empty_files(spark: SparkSession, folder: str) -> DataFrame:
    """What Spark's listing leaves out: files of no bytes. Their time is null; who opens one can ask for it."""
    assert spark._jvm is not None
    files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(folder)
    # All names stay in the JVM: there may be millions.
    every = spark._jvm.scala.Predef.genericWrapArray(files._jdf.inputFiles()).toSeq()
    names = spark._jsparkSession.createDataset(
        every, spark._jvm.org.apache.spark.sql.Encoders.STRING()
    )
    # One of the two writes file:/ and the other file:///.
    one_way = F.regexp_replace("value", "^file:/+", "file:/").alias("value")
    there = files.select(F.col("_metadata.file_path").alias("value")).select(one_way)
    empty = DataFrame(names.toDF(), spark).select(one_way).join(there, on="value", how="left_anti")
    return empty.select(
        F.url_decode(F.replace("value", F.lit("+"), F.lit("%2B"))).alias("uri"),
        F.lit(0).cast("bigint").alias("bytes"),
        F.lit(None).cast("timestamp").alias("modified_at"),
    )


def _json_rows(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """`read` for JSON: an object per line, or an array of objects; the whole file at once with the option multiLine.

    Spark's own reader looks for columns first, and one line in which a key stands twice, or that nests deep, ends the
    run. Here such a line is a row that isn't well formed.
    """
    whole = {name.lower(): value for name, value in source.options.items()}.get(
        "multiline", ""
    ).lower() == "true"
    read = spark.read.options(**source.options).text(list(source.path), wholetext=whole)
    text = F.btrim("value", F.lit("\ufeff \t\r\n"))
    array = F.when(text.startswith("["), text).otherwise(
        F.concat(F.lit("["), F.rtrim(text, F.lit(",")), F.lit("]"))
    )
    objects = F.from_json(array, "array<map<string, string>>", source.options)
    once = F.size(F.array_distinct(F.map_keys("object"))) == F.size("object")
    rows = (
        read.where(text != "")
        .select("value", *_file(read), F.explode_outer(objects).alias("object"))
        .select("value", "source", "modified_at", F.when(once, F.col("object")).alias("object"))
    )
    if source.columns:
        names = rows.select(F.explode(F.map_keys("object")).alias("name")).distinct()
        found = names.where(F.col("name").isin(*source.columns.values())).collect()
        some = names.limit(100).collect() if len(found) < len(set(source.columns.values())) else []
        _require(key, source, sorted({row["name"] for row in (*found, *some)}))
    mapped = [*source.columns.values(), *source.columns]
    others = F.map_filter("object", lambda name, _: ~name.isin(*mapped) & ~name.startswith("_"))
    pairs = [
        part
        for ours, theirs in source.columns.items()
        for part in (F.lit(ours), F.col("object")[theirs])
    ]
    return rows.select(
        (F.map_concat(others, F.create_map(*pairs)) if pairs else others).alias("fields"),
        "source",
        "modified_at",
        F.coalesce(
            F.to_json("object"), F.to_json(F.struct(F.col("value").alias("_corrupt_record")))
        ).alias("row"),
    )


def _require(key: str, source: Source, names: list[str]) -> None:
    absent = [
        f"{ours} ← {theirs}" for ours, theirs in source.columns.items() if theirs not in names
    ]
    if absent:
        there = ", ".join(names)
        raise UsageError(
            f"{key}.columns: {', '.join(absent)}: no such column in the source. It has: {there}."
        )


_OURS = ("fields", "source", "modified_at", "row")


def _file(raw: DataFrame) -> tuple[Column, Column]:
    # Asked for in this way, because the source may have a column of its own that is called _metadata.
    file = raw.metadataColumn("_metadata")
    return file["file_path"].alias("source"), file["file_modification_time"].alias("modified_at")


def _load(spark: SparkSession, source: Source) -> DataFrame:
    paths = list(source.path)
    if source.format == "csv":
        options = {"header": "true", "multiLine": "true", "escape": '"', **source.options}
        # Without it, a NUL beside a quote is taken for the sign that escapes the escape, and dropped.
        options = {"charToEscapeQuoteEscaping": options["escape"], **options}
        header = _top(spark, options, paths)
        if not header.columns:
            return header
        # Several files must have one header, or cells would land in other columns. Spark appends the place to a name
        # that stands twice, and invents one where there is none, as pandas writes its index; then it can't compare.
        unsure = any(name.endswith(str(place)) for place, name in enumerate(header.columns))
        if not (unsure and _renamed(_top(spark, {**options, "header": "false"}, paths))):
            options = {"enforceSchema": "false", **options}
        return (
            spark.read.options(**options, columnNameOfCorruptRecord="_corrupt_record")
            .schema(header.schema.add("_corrupt_record", StringType()))
            .csv(paths)
        )
    reader = spark.read.options(**source.options).format(source.format)
    if source.format == "delta":
        if len(paths) != 1:
            raise UsageError(
                f"path: a Delta source is one folder or table, and {len(paths)} are named."
            )
        path = paths[0]
        return reader.load(path) if "/" in path else spark.read.table(path)
    return reader.load(paths)


def _top(spark: SparkSession, options: dict[str, str], paths: list[str]) -> DataFrame:
    try:
        return spark.read.options(**options).csv(paths)
    except Py4JJavaError:
        # A file with a bracket or a star in its name: for the header of a multiLine file, and for that alone, Spark
        # takes the name that it has found for a pattern.
        return spark.read.options(**{**options, "multiLine": "false"}).csv(paths)


def _renamed(headerless: DataFrame) -> bool:
    names = [(name or "").lower() for name in headerless.take(1)[0]]
    return "" in names or len(set(names)) < len(names)


def _first_line(error: Exception) -> str:
    java = getattr(error, "java_exception", None)
    lines = (
        " ".join(line.split())
        for line in str(error if java is None else java.toString()).splitlines()
    )
    return next(filter(None, lines), type(error).__name__)
