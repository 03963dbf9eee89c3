"""One lazy Spark session for all tests. A test without `spark` among its arguments starts no JVM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from vlm4rec_spark.session import SparkSettings, session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    started = session(
        SparkSettings(
            master="local[2]",
            driver_memory="2g",
            conf={
                # Rows are few: more tasks, or plans made anew between the stages, only cost time.
                "spark.sql.shuffle.partitions": "1",
                "spark.default.parallelism": "1",
                "spark.databricks.delta.snapshotPartitions": "1",
                "spark.sql.adaptive.enabled": "false",
            },
        )
    )
    yield started
    started.stop()
