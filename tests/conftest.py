"""One lazy Spark session for all tests. A test without `spark` among its arguments starts no JVM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm4rec_spark.spark.session import SparkSettings, session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from vlm4rec_spark.pipeline import Pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two longest files first, so that of the two processes of `make test` none waits for the other at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_cluster.py", "test_pipeline.py"))


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    started = session(
        SparkSettings(
            master="local[2]",
            driver_memory="2g",
            conf={
                # Rows are few: code made for each query, more tasks, or plans made anew between the stages, only cost
                # time. Spark's own interpreter of expressions gives the same answers; test_cluster.py compares.
                "spark.sql.codegen.wholeStage": "false",
                "spark.sql.codegen.factoryMode": "NO_CODEGEN",
                "spark.sql.shuffle.partitions": "1",
                "spark.default.parallelism": "1",
                "spark.databricks.delta.snapshotPartitions": "1",
                "spark.sql.adaptive.enabled": "false",
            },
        )
    )
    yield started
    started.stop()


@pytest.fixture(scope="session")
def pipeline(spark: SparkSession) -> Callable[..., Pipeline]:
    """A function from a folder and `key=value` settings to a silent pipeline with the fake models of conf/test.yaml."""
    from vlm4rec_spark.config import load
    from vlm4rec_spark.pipeline import Pipeline, Reporter

    def make(folder: Path, *assignments: str) -> Pipeline:
        places = (
            f"tables={folder}/tables",
            f"index.folder={folder}/index",
            f"report.path={folder}/report.html",
        )
        config = load([Path("test.yaml")], [*places, *assignments])
        return Pipeline(spark, config, Reporter(print, print, lambda *_: nullcontext()))

    return make
