"""One lazy Spark session for all tests. A test without the fixture `spark` starts no JVM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm4rec_spark.spark.session import SparkSettings, session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from vlm4rec_spark.pipeline import Pipeline

# `make test` has two processes on two cores: a second thread of one only waits for the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST_FILES = (
    "test_cluster.py",
    "test_pipeline.py",
    "test_caption.py",
    "test_evaluate.py",
    "test_ingest.py",
    "test_hostile.py",
    "test_profiles.py",
    "test_tables.py",
    "test_maintain.py",
    "test_docs.py",
    "test_rules.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: `make test` has two processes, and both end about together."""
    order = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


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
                # Nobody reads the plans in the UI. A thousand of them fill half the memory.
                "spark.sql.ui.explainMode": "simple",
                "spark.sql.maxPlanStringLength": "100",
                "spark.sql.ui.retainedExecutions": "1",
                "spark.ui.retainedJobs": "100",
                "spark.ui.retainedStages": "100",
                "spark.ui.retainedTasks": "1000",
                # Spark checks each plan after each rule, and Delta the table after each commit.
                "spark.sql.lightweightPlanChangeValidation": "false",
                "spark.databricks.delta.stateReconstructionValidation.enabled": "false",
                "spark.databricks.delta.autoCompact.enabled": "false",
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
