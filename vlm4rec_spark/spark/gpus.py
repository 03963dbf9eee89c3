"""The GPUs of Spark's executors: how many tasks can caption at once, and what each claims."""

from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

_EXECUTOR_GPUS = "spark.executor.resource.gpu.amount"
_TASK_GPUS = "spark.task.resource.gpu.amount"


def slots(spark: SparkSession) -> int:
    """Tasks that can caption at once: one per GPU where Spark knows of GPUs, else one per core."""
    context = spark.sparkContext
    gpus = _per_executor(spark)
    if not gpus:
        return context.defaultParallelism
    # Spark counts the driver too.
    executors = len(context._jsc.sc().statusTracker().getExecutorInfos()) - 1
    return max(1, executors * gpus)


def profile(spark: SparkSession) -> ResourceProfile | None:
    """A GPU for each task that captions; other stages' tasks claim a core only.

    None without GPUs, or if Spark's own setting claims a GPU for the tasks of every stage.
    """
    if not _per_executor(spark) or spark.conf.get(_TASK_GPUS, None):
        return None
    requests = TaskResourceRequests().cpus(1).resource("gpu", 1)
    return ResourceProfileBuilder().require(requests).build


def _per_executor(spark: SparkSession) -> int:
    """0 where Spark assigns none, as in local mode."""
    if str(spark.sparkContext.master).startswith("local"):
        return 0
    return int(spark.conf.get(_EXECUTOR_GPUS, None) or 0)
