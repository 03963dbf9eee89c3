"""One lazy Spark session for all tests. A test without the fixture `spark` starts no JVM."""

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
    """The two longest files first: `make test` has two processes, and both end about together."""
    items.sort(key=lambda item: item.path.name not in ("test_cluster.py", "test_pipeline.py"))


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    test_session = session(
        SparkSettings(
            master="local[2]",
            driver_memory="2g",
            conf={
                # There are few rows: generated code, more tasks and new plans between the stages
                # only take time. Spark's interpreter of expressions gives the same results, as
                # test_cluster.py checks.
                "spark.sql.codegen.wholeStage": "false",
                "spark.sql.codegen.factoryMode": "NO_CODEGEN",
                "spark.sql.shuffle.partitions": "1",
                "spark.default.parallelism": "1",
                "spark.databricks.delta.snapshotPartitions": "1",
                "spark.sql.adaptive.enabled": "false",
            },
        )
    )
    yield test_session
    test_session.stop()


@pytest.fixture(scope="session")
def pipeline(spark: SparkSession) -> Callable[..., Pipeline]:
    """A function that makes a silent pipeline of a folder and `key=value` settings.

    Its models are the fakes of conf/test.yaml.
    """
    from shop import paths

    from vlm4rec_spark.config import load
    from vlm4rec_spark.pipeline import Pipeline, Reporter

    def make(folder: Path, *assignments: str) -> Pipeline:
        config = load([Path("test.yaml")], [*paths(folder), *assignments])
        return Pipeline(spark, config, Reporter(print, print, lambda *_: nullcontext()))

    return make
