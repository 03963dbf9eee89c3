"""The Spark session, built here and nowhere else.

Knows how to start Spark on this machine with Delta, and to leave alone what spark-submit or Databricks decided.
Knows no table and no stage.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.spark import jars, java

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
# Wherever nobody set them: an event's date must not depend on the machine's time zone, and Spark's default batch
# counts rows only, 10,000 of them: 2 GB of photos at once.
_UTC = {"spark.sql.session.timeZone": "UTC"}
_ARROW = {
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.maxBytesPerBatch": str(16 * 1024 * 1024),
}
_LOCAL = {
    "spark.ui.enabled": "false",
    # Partitions for one machine's cores, not for a cluster's; joined further where they are small.
    "spark.sql.shuffle.partitions": str(2 * (os.cpu_count() or 2)),
    "spark.databricks.delta.snapshotPartitions": "2",
}


class SparkSettings(BaseModel):
    """Where Spark runs and where Delta comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    master: str | None = "local[*]"
    """None, or a job started by spark-submit: the platform decides on master, memory and jars."""
    app_name: str = Field("vlm4rec", min_length=1)
    driver_memory: str = Field("4g", pattern=r"^\d+[kmgtKMGT]$")
    delta: Literal["fetch", "platform"] = "fetch"
    """`platform`: it already carries Delta and has it switched on, as Databricks does."""
    delta_jars: tuple[Path, ...] = ()
    """Local jar files to use instead of fetching: delta-spark and delta-storage."""
    conf: dict[str, str] = {}
    """More Spark configuration; wins over everything set here."""


def session(settings: SparkSettings) -> SparkSession:
    """The running session where there is one, else a new one.

    Raises UsageError when Spark, Java or Delta is missing.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise UsageError(
            "Spark isn't installed here. Get it with pip install 'vlm4rec_spark[local]'."
        ) from None
    # spark-submit leaves the port of the JVM that it has started; master and jars can't be chosen any more then.
    running = SparkSession.getActiveSession() is not None or "PYSPARK_GATEWAY_PORT" in os.environ
    jvm: AbstractContextManager[dict[str, Any]] = nullcontext({})
    if settings.master is not None and not running:
        jvm = _own_jvm(settings, settings.master)
    with jvm as conf:
        conf |= _DELTA if settings.delta == "fetch" else {}
        spark = (
            SparkSession.builder.appName(settings.app_name)
            .config(map=conf | settings.conf)
            .getOrCreate()
        )
    if running and settings.delta == "fetch":
        _require_delta(spark)
    already = spark.conf.getAll
    for key, value in (_UTC if settings.delta == "platform" else _UTC | _ARROW).items():
        if key not in already:
            spark.conf.set(key, value)
    return spark


@contextmanager
def _own_jvm(settings: SparkSettings, master: str) -> Iterator[dict[str, Any]]:
    """The configuration of a JVM that is ours and, while this lasts, the environment for it to start in."""
    executable = java.find()
    options = [
        f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties').as_uri()}"
    ]
    conf = {
        "spark.master": master,
        "spark.driver.memory": settings.driver_memory,
        "spark.ui.showConsoleProgress": "false",  # Spark takes a Python program for a shell and turns it on
    }
    if settings.delta == "fetch":
        ivy = Path(settings.conf.get("spark.jars.ivy", Path.home() / ".ivy2.5.2"))
        conf["spark.jars"] = ",".join(str(jar) for jar in jars.find(settings.delta_jars, ivy))
    with java.home(executable) as home:
        environment = {"JAVA_HOME": str(home)}
        if master.startswith("local"):
            folder = _folder()
            # Level 1: a third off the cold start; the heavy work is in Python. A long session fills its code cache of
            # 48 MB: then the JVM throws compiled code away and compiles it again, without end. Stacks of 4 MB: the long
            # lineage of ALS overflows one of 1.
            options += [
                "-XX:TieredStopAtLevel=1",
                "-XX:ReservedCodeCacheSize=256m",
                "-Xss4m",
                f'"-Djava.io.tmpdir={folder}"',
            ]
            conf |= _LOCAL | {
                "spark.sql.warehouse.dir": f"{folder}/warehouse",
                "spark.local.dir": f"{folder}/local",
            }
            # The loopback address, so that neither a VPN nor an unknown host name gets in the way; and workers with
            # the packages of this very Python. Two heaps of the C library: in the many that it makes else, it keeps a
            # tenth of the JVM's memory.
            ours = {
                "SPARK_LOCAL_IP": "127.0.0.1",
                "PYSPARK_PYTHON": sys.executable,
                "MALLOC_ARENA_MAX": "2",
            }
            environment |= {name: os.environ.get(name, value) for name, value in ours.items()}
        conf["spark.driver.extraJavaOptions"] = " ".join(options)
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield conf
        finally:
            for name, old in before.items():
                os.environ.pop(name) if old is None else os.environ.update({name: old})


def _require_delta(spark: SparkSession) -> None:
    """Spark itself only warns about a missing extension, and fails much later, at the first table."""
    try:
        spark.catalog.currentCatalog()
    except Exception as failed:
        if "catalog plugin class" not in str(failed):
            raise
        raise UsageError(
            "This Spark was started without Delta's jars. Give them to spark-submit: --packages "
            + ",".join(f"{jars.ORGANISATION}:{name}:{jars.DELTA_VERSION}" for name in jars.NAMES)
        ) from None


def _folder() -> Path:
    """A folder for Spark's files that goes when this process ends; those of killed processes go now.

    Spark would make a warehouse at start, in the working directory, and leave its local files when it is killed.
    """
    place = Path(tempfile.gettempdir())
    for left in place.glob("vlm4rec-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"vlm4rec-{os.getpid()}-", dir=place))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _main() -> None:
    """`python -m vlm4rec_spark.session`: proves that Spark starts here, and fetches what it lacks for that."""
    spark = session(SparkSettings(driver_memory="1g"))
    print(
        f"Spark {spark.version} with Delta {jars.DELTA_VERSION} starts, on {spark.conf.get('spark.master')}."
    )
    spark.stop()


if __name__ == "__main__":
    _main()
