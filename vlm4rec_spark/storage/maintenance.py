"""Upkeep of the tables: joins small files, deletes old ones, clears leftovers, measures.

Knows files and retention; changes no row. Which tables need it is the stage's to decide.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import SparkSession

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.storage import commits
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.tables import Tables

_RETENTION = "delta.deletedFileRetentionDuration"
_OUR_RETENTION = re.compile(r"interval \d+ hours")
_WEEK = 168
"""Delta's default in hours. Readers at work, and those of an old version, need replaced files."""
_RETENTION_CHECK = "spark.databricks.delta.retentionDurationCheck.enabled"
OPTIMIZE = {
    # Delta's 1 GB suits tables that are only read. Here a MERGE rewrites every file that holds a
    # changed row.
    "spark.databricks.delta.optimize.maxFileSize": str(256 * 1024 * 1024),
    "spark.databricks.delta.optimize.minFileSize": str(256 * 1024 * 1024),
    # Ordered files are ordered again with the new ones until they hold this much: at Delta's
    # 100 GB, the whole log. Events come in the order of time, by which they are clustered, so
    # small groups of files are apart anyway.
    "spark.databricks.delta.optimize.clustering.mergeStrategy.minCubeSize.threshold": str(
        1024 * 1024 * 1024
    ),
}
_VACUUM = {
    # Otherwise each VACUUM starts 10,000 tasks to list one folder: a minute per table on a laptop.
    # Our folders are flat.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    # Its two commits would make two versions of a table in which nothing has changed.
    "spark.databricks.delta.vacuum.logging.enabled": "false",
}


@dataclass(frozen=True)
class Footprint:
    """A table's version, when its rows last changed, and its bytes.

    `bytes` are those of the current version, `on_disk` those of all versions. `on_disk` is None
    where a catalog doesn't allow listing the folder.
    """

    version: int
    changed_at: datetime
    bytes: int
    on_disk: int | None


def footprint(tables: Tables, table: Table) -> Footprint | None:
    """None when the table doesn't exist."""
    if not tables.exists(table):
        return None
    detail = tables.detail(table)
    changed = commits.last_change(tables.commits(table))
    changed_at = datetime.fromtimestamp(changed.at / 1e6, UTC)
    on_disk = _bytes_below(tables, detail["location"])
    return Footprint(tables.version(table), changed_at, detail["sizeInBytes"], on_disk)


def optimize(tables: Tables, table: Table) -> tuple[int, int]:
    """Join small files, and order the new rows of a clustered table.

    Returns the numbers of files before and after. The rows stay as they are and the change feed
    is silent. A table with nothing to join isn't touched.
    """
    before = tables.detail(table)["numFiles"]
    statement = f"OPTIMIZE {tables.sql_name(table)}"
    with tables.conf(OPTIMIZE):
        (report,) = tables.commit(table, lambda: tables.spark.sql(statement).collect())
    metrics = report["metrics"]
    return before, before + metrics["numFilesAdded"] - metrics["numFilesRemoved"]


def retention(tables: Tables, table: Table) -> str:
    """How long files stay that only older versions need, as Delta writes it."""
    return tables.properties(table).get(_RETENTION, f"interval {_WEEK} hours")


def check_retention(spark: SparkSession, hours: int) -> None:
    """Raise UsageError when Delta's own check forbids so short a retention."""
    if hours < _WEEK and spark.conf.get(_RETENTION_CHECK, "true") != "false":
        raise UsageError(
            f"maintain.retention_hours: {hours} hours are less than Delta's minimum, {_WEEK}. A "
            "reader that is at work longer than that loses its files, and older versions of a "
            "table can't be read. If nobody reads the tables, allow it with "
            f"--set \"spark.conf={{{_RETENTION_CHECK}: 'false'}}\"."
        )


def vacuum(tables: Tables, table: Table, hours: int) -> int | None:
    """Delete the files that no version of the last `hours` needs; returns the bytes, if known.

    A table that was given another retention by hand, in other words than ours, keeps it.
    """
    wanted = f"interval {hours} hours"
    current = retention(tables, table)
    if current != wanted and _OUR_RETENTION.fullmatch(current):
        # Delta 4.4 ignores the hours that VACUUM is called with. The table's property decides,
        # on time travel too.
        tables.spark.sql(
            f"ALTER TABLE {tables.sql_name(table)} SET TBLPROPERTIES ('{_RETENTION}' = '{wanted}')"
        )
    folder = tables.detail(table)["location"]
    before = _bytes_below(tables, folder)
    with tables.conf(_VACUUM), _silent_console(tables.spark):
        tables.spark.sql(f"VACUUM {tables.sql_name(table)}")
    after = _bytes_below(tables, folder)
    return None if before is None or after is None else max(0, before - after)


def clear_leftovers(tables: Tables, hours: int) -> list[str]:
    """Remove each `_staging_…` to which nothing was written for `hours`; returns their names.

    A write that was killed before its first commit leaves a folder that isn't a table yet.
    """
    removed = []
    for name, folder in _staging_folders(tables):
        if time.time() - tables.filesystem(folder).last_written(folder) > hours * 3600:
            tables.remove(name)
            removed.append(name)
    return removed


def _staging_folders(tables: Tables) -> Iterator[tuple[str, str]]:
    """Name and folder of whatever is called _staging_…"""
    location = tables.location
    if tables.in_catalog:
        rows = tables.spark.sql(f"SHOW TABLES IN {location} LIKE '_staging_*'").collect()
        for row in rows:
            name = row["tableName"]
            if not row["isTemporary"]:
                detail = tables.spark.sql(f"DESCRIBE DETAIL {location}.{name}").collect()
                yield name, detail[0]["location"]
        return
    for name in tables.filesystem(location).folders(location):
        if name.startswith("_staging_"):
            yield name, f"{location}/{name}"


def _bytes_below(tables: Tables, folder: str) -> int | None:
    try:
        return tables.filesystem(folder).size(folder)
    except Exception:
        # A catalog may own the folder and allow nobody to list it. Then the size isn't known.
        return None


@contextmanager
def _silent_console(spark: SparkSession) -> Iterator[None]:
    """VACUUM prints a line to the JVM's standard output, which is this program's."""
    jvm: Any = spark._jvm
    try:
        console = getattr(getattr(jvm.scala, "Console$"), "MODULE$")
        before = console.out()
        nowhere = jvm.java.io.OutputStream.nullOutputStream()
        console.setOutDirect(jvm.java.io.PrintStream(nowhere))
    except Exception:
        # A platform may hide the JVM's classes. Then the line is printed.
        yield
        return
    try:
        yield
    finally:
        console.setOutDirect(before)
