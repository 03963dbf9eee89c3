"""A company's tables as raw rows: each with its fields as text, its file, and itself as JSON.

Knows formats and column mappings. Rejects no row: `stages/ingest.py` does.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from typing import Literal

from pydantic import Field
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StringType

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.sources.spark_errors import readable_errors

_HEADER_BYTES = 1_000_000
"""No header is longer."""
_RESERVED = ("fields", "source", "modified_at", "row")


class Source(Settings):
    """Files or a Delta table.

    `columns` maps the names of this project to those of the source. Other columns keep their names.
    """

    path: tuple[str, ...] = ()
    format: Literal["csv", "json", "parquet", "delta"] = "csv"
    columns: dict[str, str] = Field({})
    options: dict[str, str] = Field({})


def read(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """The rows of the source.

    Columns: `fields` (map of column name to text), `source` (file), `modified_at` of the file,
    `row` (the raw row as JSON). Binary columns of the source follow with their own names. `key` is
    the config key, for errors. Raises UsageError if a file or a mapped column is missing, and
    RunError if the source can't be read.
    """
    if source.format == "json":
        with _source_errors(key, source):
            return _json_rows(spark, key, source)
    raw = open_table(spark, key, source)
    names = raw.columns
    _check_columns(key, source, names)
    binary = [name for name, kind in raw.dtypes if kind == "binary"]
    text = [name for name in names if name not in binary]
    row = F.struct(*[column_named(name) for name in text])
    return raw.select(
        _fields(source, text),
        *[column_named(name) for name in binary if name.lower() not in _RESERVED],
        *_file_columns(raw),
        F.to_json(row, {"ignoreNullFields": "false"}).alias("row"),
    )


def has_field(raw: DataFrame, field: str) -> bool:
    """Whether rows of `read` have the field. Only JSON has to be read for that."""
    names = raw.schema["fields"].metadata.get("names")
    if names is not None:
        return field in names
    return not raw.where(F.col("fields")[field].isNotNull()).isEmpty()


def open_table(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """The columns of a source that isn't JSON, with their own names and types.

    Raises as `read`, but for missing columns, which aren't looked for.
    """
    with _source_errors(key, source):
        raw = _load(spark, key, source)
        raw.schema  # noqa: B018 - a lazy session looks for the files only now
        return raw


def _source_errors(key: str, source: Source) -> AbstractContextManager[None]:
    return readable_errors(f"{key}.path", f"{key}: the {source.format} source can't be read")


def column_named(name: str) -> Column:
    """The column of exactly this name, whatever characters it has."""
    return F.col("`" + name.replace("`", "``") + "`")


def _fields(source: Source, names: Sequence[str]) -> Column:
    """`fields`. `names` are the source's columns that aren't binary."""
    mapped = source.columns.values()
    own = {name: name for name in names if name not in mapped and not name.startswith("_")}
    # Mapped columns last: one wins over a column of the source that happens to have its name.
    fields = {name: column for name, column in (own | source.columns).items() if column in names}
    pairs: list[Column] = []
    for name, column in fields.items():
        text = column_named(column).cast("string")
        # Parquet doesn't ensure that text is UTF-8, and Python can't hold any other.
        pairs += [F.lit(name), F.make_valid_utf8(text)]
    row = F.create_map(*pairs) if pairs else F.lit(None).cast("map<string, string>")
    return row.alias("fields", metadata={"names": list(fields)})


def _file_columns(raw: DataFrame) -> tuple[Column, Column]:
    # Not F.col("_metadata"), since the source may have a column of this name.
    file = raw.metadataColumn("_metadata")
    return file["file_path"].alias("source"), file["file_modification_time"].alias("modified_at")


def _check_columns(key: str, source: Source, names: Sequence[str]) -> None:
    missing = [
        f"{name} ← {column}" for name, column in source.columns.items() if column not in names
    ]
    if missing:
        raise UsageError(
            f"{key}.columns: {', '.join(missing)}: no such column in the source. "
            f"It has: {', '.join(names)}."
        )


def _json_rows(spark: SparkSession, key: str, source: Source) -> DataFrame:
    """`read` for JSON: one object per line, or arrays of objects.

    The option multiLine reads each file as a whole. Spark's own JSON reader infers columns first,
    and fails on a line with a repeated key or deep nesting. Here such a line is a malformed row.
    """
    rows = _json_objects(spark, source)
    if source.columns:
        _check_json_columns(key, source, rows)
    mapped = [*source.columns.values(), *source.columns]
    fields = F.map_filter("object", lambda name, _: ~name.isin(*mapped) & ~name.startswith("_"))
    pairs: list[Column] = []
    for name, column in source.columns.items():
        pairs += [F.lit(name), F.col("object")[column]]
    if pairs:
        fields = F.map_concat(fields, F.create_map(*pairs))
    row = F.expr("coalesce(to_json(object), to_json(struct(value AS _corrupt_record)))")
    return rows.select(
        fields.alias("fields"),
        "source",
        "modified_at",
        row.alias("row"),
    )


def _json_objects(spark: SparkSession, source: Source) -> DataFrame:
    """value (the line), source, modified_at, object (a map; null if the line is malformed)."""
    options = {name.lower(): value for name, value in source.options.items()}
    whole_file = options.get("multiline", "").lower() == "true"
    lines = spark.read.options(**source.options).text(list(source.path), wholetext=whole_file)
    text = F.btrim("value", F.lit("\ufeff \t\r\n"))
    rows = lines.select("value", *_file_columns(lines), text.alias("text"))
    array = F.expr(
        "IF(startswith(text, '['), text, concat('[', trim(TRAILING ',' FROM text), ']'))"
    )
    parsed = F.from_json(array, "array<map<string, string>>", source.options)
    unique_keys = F.expr("size(array_distinct(map_keys(object))) = size(object)")
    return (
        rows.where("text != ''")
        .withColumn("object", F.explode_outer(parsed))
        .withColumn("object", F.when(unique_keys, F.col("object")))
    )


def _check_json_columns(key: str, source: Source, rows: DataFrame) -> None:
    mapped = set(source.columns.values())
    names = rows.selectExpr("explode(map_keys(object)) AS name").distinct()
    present = names.where(F.col("name").isin(*mapped)).collect()
    if len(present) < len(mapped):
        # Some of the columns that there are, for the message.
        present += names.limit(100).collect()
    _check_columns(key, source, sorted({row["name"] for row in present}))


def _load(spark: SparkSession, key: str, source: Source) -> DataFrame:
    paths = list(source.path)
    if source.format == "csv":
        return _csv(spark, source, paths)
    reader = spark.read.options(**source.options).format(source.format)
    if source.format != "delta":
        return reader.load(paths)
    if len(paths) != 1:
        raise UsageError(
            f"{key}.path: a Delta source is one folder or table, and {len(paths)} are named."
        )
    (path,) = paths
    if "/" in path:
        return reader.load(path)
    return spark.read.table(path)


def _csv(spark: SparkSession, source: Source, paths: list[str]) -> DataFrame:
    options = {"header": "true", "multiLine": "true", "escape": '"', **source.options}
    # By default, Spark takes a NUL next to a quote for the escape of the escape, and drops it.
    options = {"charToEscapeQuoteEscaping": options["escape"], **options}
    beginning = _beginning(spark.read.options(**options).text(paths), options)
    header = _csv_of_text(spark, options, beginning)
    if not header.columns:  # the text is empty, or begins with a comment
        header = spark.read.options(**options).csv(paths)
    if not header.columns:
        return header
    # All files must have the same header, or cells would go to other columns. Spark can't compare
    # headers in which it has renamed columns: a repeated name gets its position appended, and an
    # empty one, as pandas writes its index, gets a new name.
    maybe_renamed = any(
        name.endswith(str(position)) for position, name in enumerate(header.columns)
    )
    if not (maybe_renamed and _has_renamed(spark, options, beginning)):
        options = {"enforceSchema": "false", **options}
    # Spark adds the columns of folders such as day=1.
    reader = spark.read.options(**options, columnNameOfCorruptRecord="_corrupt_record")
    return reader.schema(header.schema.add("_corrupt_record", StringType())).csv(paths)


def _beginning(files: DataFrame, options: dict[str, str]) -> str:
    """The text at the beginning of a file that isn't empty, read without a Spark job."""
    spark = files.sparkSession
    assert spark._jvm is not None
    streams = spark._jvm.org.apache.spark.sql.execution.datasources.CodecStreams
    conf = spark._jsparkSession.sessionState().newHadoopConf()
    lowered = {name.lower(): value for name, value in options.items()}
    encoding = lowered.get("encoding") or lowered.get("charset") or "UTF-8"
    for uri in files._jdf.inputFiles():
        path = spark._jvm.org.apache.hadoop.fs.Path(spark._jvm.java.net.URI(uri))
        if path.getFileSystem(conf).getFileStatus(path).getLen():
            with closing(streams.createInputStream(conf, path)) as stream:
                text = spark._jvm.java.lang.String(stream.readNBytes(_HEADER_BYTES), encoding)
            # Spark finds out the line ending of a CSV file, but not that of a Dataset of strings.
            return re.sub("\r\n?", "\n", str(text).lstrip("\ufeff\r\n"))
    return ""


def _csv_of_text(spark: SparkSession, options: dict[str, str], text: str) -> DataFrame:
    """The first row of a text in CSV, as Spark parses it. With a header its schema is there."""
    assert spark._jvm is not None
    encoder = spark._jvm.org.apache.spark.sql.Encoders.STRING()
    lines = spark._jsparkSession.createDataset([text], encoder)
    return DataFrame(spark.read.options(**options)._jreader.csv(lines), spark)


def _has_renamed(spark: SparkSession, options: dict[str, str], text: str) -> bool:
    """Whether the first line has an empty or a repeated name."""
    (row,) = _csv_of_text(spark, {**options, "header": "false"}, text).take(1)
    names = [(name or "").lower() for name in row]
    return "" in names or len(set(names)) < len(names)
