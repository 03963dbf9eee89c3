"""Lists the files of a source without reading them. Knows no formats."""

import re
from collections.abc import Sequence

from pyspark.sql import DataFrame, SparkSession

from vlm4rec_spark.sources.spark_errors import readable_errors


def list_files(spark: SparkSession, key: str, paths: Sequence[str]) -> DataFrame:
    """The files at the paths: uri, bytes, modified_at, file_path. Empty files are left out.

    `uri` can be opened. `file_path` is the same in the encoding of `source` in `reader.read`. `key`
    is the config key, for errors. Raises UsageError if nothing is at a path.
    """
    with readable_errors(key, f"{key}: the files can't be listed"):
        # Without its content column, this reader opens no file.
        reader = spark.read.format("binaryFile").option("recursiveFileLookup", "true")
        files = reader.load(list(paths))
    return files.selectExpr(
        "path AS uri",
        "length AS bytes",
        "modificationTime AS modified_at",
        "_metadata.file_path",
    )


def escape_glob(uri: str) -> str:
    """A path that names exactly this file, even if its name holds the signs of a glob."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", uri)
