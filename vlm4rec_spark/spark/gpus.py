"""The GPUs that Spark gives to executors: how many tasks can caption at once, and what each of them claims."""

from __future__ import annotations

from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

_OF_EXECUTOR, _OF_TASK = "spark.executor.resource.gpu.amount", "spark.task.resource.gpu.amount"


def slots(spark: SparkSession) -> int:
    """One per GPU, where Spark knows of them, else one per core."""
    context = spark.sparkContext
    each = _of_each_executor(spark)
    # The driver is among them.
    executors = len(context._jsc.sc().statusTracker().getExecutorInfos()) - 1
    return max(1, executors * each) if each else context.defaultParallelism


def profile(spark: SparkSession) -> ResourceProfile | None:
    """A GPU for each task that captions, while those of other stages need but a core (stage-level scheduling).

    None where there are no GPUs, and where the setting for tasks has claimed them for every stage already.
    """
    if not _of_each_executor(spark) or spark.conf.get(_OF_TASK, None):
        return None
    return ResourceProfileBuilder().require(TaskResourceRequests().cpus(1).resource("gpu", 1)).build


def _of_each_executor(spark: SparkSession) -> int:
    """0 where Spark gives none away, as in local mode."""
    local = str(spark.sparkContext.master).startswith("local")
    return 0 if local else int(spark.conf.get(_OF_EXECUTOR, None) or 0)
