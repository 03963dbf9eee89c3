"""One lazy Spark session for all tests. A test without the fixture `spark` starts no JVM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm4rec_spark.spark.session import SparkSettings, session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from vlm4rec_spark.pipeline import Pipeline
    from vlm4rec_spark.storage.schemas import Table
    from vlm4rec_spark.storage.tables import Tables

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
                # Where Hadoop's native library is missing, the default forks 20 processes for each
                # commit. This one is safe for the threads of one driver.
                "spark.delta.logStore.file.impl": "io.delta.storage.LocalLogStore",
            },
        )
    )
    _import_classes(test_session)
    yield test_session
    test_session.stop()


def _import_classes(spark: SparkSession) -> None:
    """pyspark asks for these by their short names, and Java looks in each package and jar."""
    from py4j.java_gateway import java_import

    for name in (
        "sql.functions",
        "api.python.PythonUtils",
        "api.python.PythonRDD",
        "api.python.SerDeUtil",
        "sql.api.python.PythonSQLUtils",
    ):
        java_import(spark._jvm, f"org.apache.spark.{name}")


class EmptyTables:
    """Makes each empty table once, and copies of it for every other shop."""

    def __init__(self, folder: Path):
        self._folder = folder

    def use_in(self, tables: Tables) -> None:
        make = tables.create

        def create(table: Table) -> None:
            empty = self._folder / table.name
            if tables.in_catalog or tables.exists(table):
                make(table)
            elif empty.exists():
                shutil.copytree(empty, tables.name_of(table))
            else:
                make(table)
                shutil.copytree(tables.name_of(table), empty)

        tables.create = create  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def pipeline(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pipeline]:
    """A function that makes a silent pipeline of a folder and `key=value` settings.

    Its models are the fakes of conf/test.yaml.
    """
    from shop import paths

    from vlm4rec_spark.config import load
    from vlm4rec_spark.pipeline import Pipeline, Reporter

    empty_tables = EmptyTables(tmp_path_factory.mktemp("empty"))

    def make(folder: Path, *assignments: str) -> Pipeline:
        config = load([Path("test.yaml")], [*paths(folder), *assignments])
        run = Pipeline(spark, config, Reporter(print, print, lambda *_: nullcontext()))
        empty_tables.use_in(run.tables)
        return run

    return make
