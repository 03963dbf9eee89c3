"""Where photos come from, and the listing of a photo folder. Opens no photo."""

from __future__ import annotations

import re

from py4j.protocol import Py4JJavaError
from pydantic import Field, field_validator, model_validator
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.photos.download import HttpSettings
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.sources.file_listing import list_files
from vlm4rec_spark.sources.spark_errors import first_line


class PhotoSource(Settings):
    """Where photos come from: a folder of files named after the items, or a catalogue column.

    `file_name` is a regular expression in Java's syntax with two groups: the item's id, and the
    photo's position or nothing. Spark hides files whose name begins with a dot or `_`.
    """

    folder: str = ""
    file_name: str = Field(r"(.+?)(?:\.(\d{1,3}))?\.[A-Za-z0-9]+", min_length=1)
    path_column: str = ""
    bytes_column: str = ""
    keep: bool = True
    http: HttpSettings = HttpSettings()

    @model_validator(mode="after")
    def _bytes_are_stored(self) -> PhotoSource:
        if self.bytes_column and not self.keep:
            raise ValueError("keep: photos of a bytes_column are nowhere else, so it must be true")
        return self

    @field_validator("file_name")
    @classmethod
    def _two_groups(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 2:
            raise ValueError(f"it needs two groups, item_id and position, and has {groups}")
        return pattern


def photo_files(spark: SparkSession, photos: PhotoSource) -> DataFrame:
    """The files of the photo folder: uri, bytes, modified_at, item_id, position.

    item_id and position are null for a name that doesn't match. Raises UsageError if the folder
    isn't there or Java doesn't accept the regular expression.
    """
    assert spark._jvm is not None
    try:
        spark._jvm.java.util.regex.Pattern.compile(photos.file_name)
    except (PySparkException, Py4JJavaError) as error:
        raise UsageError(f"ingest.photos.file_name: {first_line(error)}") from None
    files = _with_empty_files(list_files(spark, "ingest.photos.folder", (photos.folder,)))
    name = F.regexp_extract("uri", "([^/]+)$", 1)
    pattern = f"^{photos.file_name}$"
    matches = name.rlike(pattern)
    position = F.regexp_extract(name, pattern, 2)
    number = F.when(position == "", 0).otherwise(position.try_cast("int"))
    return files.select(
        "*",
        F.when(matches, F.regexp_extract(name, pattern, 1)).alias("item_id"),
        F.when(matches, number).alias("position"),
    )


def _with_empty_files(files: DataFrame) -> DataFrame:
    """A listing with the files of no bytes, which Spark leaves out. Their modified_at is null."""
    spark = files.sparkSession
    assert spark._jvm is not None
    # All names stay in the JVM, since there may be millions.
    java_names = spark._jvm.scala.Predef.genericWrapArray(files._jdf.inputFiles()).toSeq()
    encoder = spark._jvm.org.apache.spark.sql.Encoders.STRING()
    names = DataFrame(spark._jsparkSession.createDataset(java_names, encoder).toDF(), spark)
    # One of the two listings writes file:/ and the other file:///.
    one_form = "regexp_replace({}, '^file:/+', 'file:/') AS file_path"
    not_empty = files.selectExpr("uri", "bytes", "modified_at", one_form.format("file_path"))
    all_files = names.selectExpr(one_form.format("value"))
    return all_files.join(not_empty, on="file_path", how="left").selectExpr(
        "coalesce(uri, url_decode(replace(file_path, '+', '%2B'))) AS uri",
        "coalesce(bytes, 0L) AS bytes",
        "modified_at",
    )
