"""The Spark session, built here and nowhere else.

Starts Spark on this machine with Delta, or takes the session of spark-submit or Databricks.
Knows no table and no stage.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.spark import jars, java

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_LOCAL_MASTER = re.compile(r"local(\[.*\])?")
_DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
# Set unless somebody has set them. An event's date must not depend on the machine's time zone.
# Spark's default batch is 10,000 rows, whatever their size: 2 GB of photos at once.
_UTC = {"spark.sql.session.timeZone": "UTC"}
_ARROW = {
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.maxBytesPerBatch": str(16 * 1024 * 1024),
}
_LOCAL = {
    "spark.ui.enabled": "false",
    # Partitions for one machine's cores; Spark joins small ones.
    "spark.sql.shuffle.partitions": str(2 * (os.cpu_count() or 2)),
    "spark.databricks.delta.snapshotPartitions": "2",
    # Else pyspark looks up the Python line of each expression, a twentieth of a short run's time.
    "spark.sql.dataFrameQueryContext.enabled": "false",
}

ARCHIVE = Path(sys.prefix, "cache", "spark-classes.jsa")
"""The archive that `class_archive` makes, and every local session uses."""
QUIET_ARCHIVE = ("-Xlog:cds=off", "-Xlog:class+path=off")
"""Java warns of classes that it can't archive, and of an archive of another Java."""
_LOCAL_JVM_OPTIONS = (
    # Only the first compiler: starts in two thirds of the time, and the heavy work is in Python.
    "-XX:TieredStopAtLevel=1",
    # A long session fills the default of 48 MB, and then the JVM drops compiled code and compiles
    # it again and again.
    "-XX:ReservedCodeCacheSize=256m",
    # G1, the default, collects beside the program and takes its cores: a tenth of a demo's time.
    "-XX:+UseParallelGC",
    # The long lineage of ALS overflows a stack of 1 MB.
    "-Xss4m",
)
_LOCAL_ENVIRONMENT = {
    # So that neither a VPN nor an unknown host name matters.
    "SPARK_LOCAL_IP": "127.0.0.1",
    # Workers have the packages of this Python.
    "PYSPARK_PYTHON": sys.executable,
    # Heaps of the C library. By default it makes many, which hold a tenth of the JVM's memory.
    "MALLOC_ARENA_MAX": "2",
}


class SparkSettings(Settings):
    """Where Spark runs and where Delta comes from."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    master: str | None = "local[*]"
    """None, or a job of spark-submit: the platform decides on master, memory and jars."""
    app_name: str = Field("vlm4rec", min_length=1)
    driver_memory: str = Field("4g", pattern=r"^\d+[kmgtKMGT]$")
    delta: Literal["fetch", "platform"] = "fetch"
    """`platform`: Spark already has Delta, and it is switched on, as on Databricks."""
    delta_jars: tuple[Path, ...] = ()
    """Local jar files in place of the download: delta-spark and delta-storage."""
    conf: dict[str, str] = Field({})
    """More Spark configuration; wins over everything that is set here."""


def session(settings: SparkSettings, jvm_options: Sequence[str] = ()) -> SparkSession:
    """The running session if there is one, else a new one, in a JVM with these further options.

    Raises UsageError when Spark, Java or Delta is missing.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise UsageError(
            "Spark isn't installed here. Get it with pip install 'vlm4rec_spark[local]'."
        ) from None
    # spark-submit sets the port of the JVM that it has started. Master and jars are fixed then.
    running = SparkSession.getActiveSession() is not None or "PYSPARK_GATEWAY_PORT" in os.environ
    jvm: AbstractContextManager[dict[str, Any]] = nullcontext({})
    if settings.master is not None and not running:
        jvm = _new_jvm(settings, settings.master, jvm_options)
    with jvm as conf:
        conf |= _DELTA if settings.delta == "fetch" else {}
        spark = (
            SparkSession.builder.appName(settings.app_name)
            .config(map=conf | settings.conf)
            .getOrCreate()
        )
    if running and settings.delta == "fetch":
        _require_delta(spark)
    present = spark.conf.getAll
    for key, value in (_UTC if settings.delta == "platform" else _UTC | _ARROW).items():
        if key not in present:
            spark.conf.set(key, value)
    return spark


@contextmanager
def _new_jvm(
    settings: SparkSettings, master: str, jvm_options: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The configuration of a new JVM. Inside `with`, the environment is the one to start it in."""
    executable = java.find()
    log_settings = Path(__file__).with_name("log4j2.properties")
    options = [f"-Dlog4j2.configurationFile={log_settings.as_uri()}", *jvm_options]
    conf = {
        "spark.master": master,
        "spark.driver.memory": settings.driver_memory,
        # Spark takes a Python program for a shell and turns the bar on.
        "spark.ui.showConsoleProgress": "false",
    }
    if settings.delta == "fetch":
        ivy = Path(settings.conf.get("spark.jars.ivy", Path.home() / ".ivy2.5.2"))
        delta = [str(jar) for jar in jars.find(settings.delta_jars, ivy)]
        class_path = "spark.driver.extraClassPath"
        if _LOCAL_MASTER.fullmatch(master) and class_path not in settings.conf:
            # Only the classes of the class path can be archived.
            conf[class_path] = os.pathsep.join(delta)
        else:
            conf["spark.jars"] = ",".join(delta)
    environment: dict[str, str] = {}
    if master.startswith("local"):
        folder = _temporary_folder()
        options += [*_LOCAL_JVM_OPTIONS, f'"-Djava.io.tmpdir={folder}"']
        if ARCHIVE.is_file():
            options += [f'"-XX:SharedArchiveFile={ARCHIVE}"', *QUIET_ARCHIVE]
        conf |= _LOCAL | {
            "spark.sql.warehouse.dir": f"{folder}/warehouse",
            "spark.local.dir": f"{folder}/local",
        }
        for name, value in _LOCAL_ENVIRONMENT.items():
            environment[name] = os.environ.get(name, value)
    conf["spark.driver.extraJavaOptions"] = " ".join(options)
    with java.home(executable) as home, _environment(environment | {"JAVA_HOME": str(home)}):
        yield conf


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name) if old is None else os.environ.update({name: old})


def _require_delta(spark: SparkSession) -> None:
    """Spark only warns about a missing extension, and fails much later, at the first table."""
    try:
        spark.catalog.currentCatalog()
    except Exception as error:
        if "catalog plugin class" not in str(error):
            raise
        packages = [f"{jars.ORGANIZATION}:{name}:{jars.DELTA_VERSION}" for name in jars.NAMES]
        raise UsageError(
            "This Spark was started without Delta's jars. Start it with spark-submit --packages "
            + ",".join(packages)
        ) from None


def _temporary_folder() -> Path:
    """A folder for Spark's files, deleted when this process ends. Those of killed processes go now.

    Without it Spark makes a warehouse in the working directory, and leaves its local files when it
    is killed.
    """
    parent = Path(tempfile.gettempdir())
    for leftover in parent.glob("vlm4rec-*-*"):
        pid = leftover.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"vlm4rec-{os.getpid()}-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
