"""The only Delta code: create, read, pending, insert-only merge, upsert, sync, replace, optimize, vacuum.

Knows how a record of `schemas.py` becomes a Delta table in a folder or in a catalog's schema; knows no stage.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from delta import exceptions
from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import Column, DataFrame, DataFrameWriter, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, MapType, StructType

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.storage import files
from vlm4rec_spark.storage.files import Files
from vlm4rec_spark.storage.schemas import LAYOUT, TABLES, Table

T = TypeVar("T")
CONFLICTS = (
    exceptions.ConcurrentAppendException,
    exceptions.ConcurrentDeleteDeleteException,
    exceptions.ConcurrentDeleteReadException,
    exceptions.ConcurrentTransactionException,
    exceptions.ConcurrentWriteException,
    exceptions.MetadataChangedException,
    exceptions.ProtocolChangedException,
)
"""What Delta raises when another writer was quicker; nothing was written then."""
PARTS = ("", "_0", "_1")
_LAYOUT_KEY = "vlm4rec.layout"
_NAMED = re.compile(r"\w+\.\w+")
_RETENTION = "delta.deletedFileRetentionDuration"
_OUR_RETENTION = re.compile(r"interval \d+ hours")
_WEEK = 168
"""Delta's default in hours: readers that are at work, and who reads an old version, need files that were replaced."""
_UNCHECKED = "spark.databricks.delta.retentionDurationCheck.enabled"
_UPKEEP = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES")
_MOVED = ("numTargetRowsInserted", "numTargetRowsUpdated", "numTargetRowsDeleted")
_OPTIMIZE = {
    # Delta's 1 GB suits tables that are only read. Here a MERGE rewrites every file that holds a changed row.
    "spark.databricks.delta.optimize.maxFileSize": str(256 * 1024 * 1024),
    "spark.databricks.delta.optimize.minFileSize": str(256 * 1024 * 1024),
    # Ordered files are ordered again with the new ones until they hold this much: at Delta's 100 GB, the whole log.
    # Events come in the order of time, by which they are clustered, so that small lots lie apart anyway.
    "spark.databricks.delta.optimize.clustering.mergeStrategy.minCubeSize.threshold": str(
        1024 * 1024 * 1024
    ),
}
_HEAVY = {
    # A reader holds a row group, and a batch of up to 4,096 rows of it. At Parquet's 128 MB, two tasks that read photos
    # of 200 kB took a JVM of 1 GB down; at 32 MB they don't.
    "parquet.block.size": str(32 * 1024 * 1024),
    # Parquet looks after a hundred rows for the first time whether a group is full: 500 MB of photos of 5 MB.
    "parquet.page.size.row.check.min": "10",
}
_VACUUM = {
    # Otherwise each VACUUM starts 10,000 tasks to list one folder: a minute per table on a laptop. Ours are flat.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    # Its two commits would make two versions of a table in which nothing has changed.
    "spark.databricks.delta.vacuum.logging.enabled": "false",
}


@dataclass(frozen=True)
class Footprint:
    """A table's version, when its rows last changed, the bytes of its files, and those on disk with older versions'.

    `on_disk` is None where a catalog lets nobody list the folder.
    """

    version: int
    changed_at: datetime
    bytes: int
    on_disk: int | None


class Tables:
    """The project's tables at `location`: a folder (any Hadoop URI) or `catalog.schema`."""

    def __init__(self, spark: SparkSession, location: str):
        self.spark = spark
        self.named = _NAMED.fullmatch(location) is not None
        self.location = location if self.named else files.qualified(location)
        self._versions: dict[str, int] = {}

    def prepare(self) -> None:
        """Check that this release can read every table there. Changes nothing; raises RunError."""
        if self.named and not self.spark.catalog.databaseExists(self.location):
            raise RunError(
                f"tables: there is no schema {self.location}. Create it, or name a folder with a / in it."
            )
        for table in filter(self.exists, TABLES.values()):
            self._check_layout(table)
            _check_schema(table, self.read(table).schema, self.name_of(table))

    def name_of(self, table: Table) -> str:
        return f"{self.location}.{table.name}" if self.named else f"{self.location}/{table.name}"

    def folder(self) -> str:
        """The folder of the tables; of named ones the place that the catalog gives to their schema."""
        return (
            self.spark.catalog.getDatabase(self.location).locationUri
            if self.named
            else self.location
        )

    def exists(self, table: Table) -> bool:
        if self.named:
            return self.spark.catalog.tableExists(self.name_of(table))
        return DeltaTable.isDeltaTable(self.spark, self.name_of(table))

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table, as of `version` or now; an empty DataFrame when it isn't there yet."""
        if not self.exists(table):
            return self.spark.createDataFrame([], table.schema)
        reader = (
            self.spark.read if version is None else self.spark.read.option("versionAsOf", version)
        )
        return (
            reader.table(self.name_of(table))
            if self.named
            else reader.format("delta").load(self.name_of(table))
        )

    def frozen(self, table: Table) -> DataFrame:
        """The table as it is now, whatever is written to it later.

        What was read otherwise is read anew by each action, and a commit refreshes even what was persisted from it.
        """
        if not self.exists(table):
            return self.read(table)
        return self.read(table, self._delta(table).history(1).select("version").collect()[0][0])

    def versions(self, tables: Iterable[Table]) -> dict[str, int]:
        """Of each table that exists the version that last changed its rows: upkeep and idle merges make versions too.

        Looked up once, and again after a write of ours or `forget`.
        """
        found = {}
        for table in tables:
            if table.name not in self._versions and self.exists(table):
                self._versions[table.name] = _last_change(self._commits(table))["version"]
            if table.name in self._versions:
                found[table.name] = self._versions[table.name]
        return found

    def forget(self) -> None:
        """Look all versions up again: others may have written since."""
        self._versions.clear()

    def pending(self, rows: DataFrame, table: Table) -> DataFrame:
        """The rows whose key isn't in the table yet."""
        return rows.join(self.read(table).select(*table.key), on=list(table.key), how="left_anti")

    def insert(self, table: Table, rows: DataFrame, instead_of: str = "") -> int:
        """Add the rows whose key is new, and say how many. Keys in `rows` are distinct; two writers can't clash.

        A row that is there is left as it is, unless the condition `instead_of` holds for it (columns of `old`).
        """
        self._create(table)

        def write() -> DataFrame:
            merge = self._merge(table, rows)
            merge = merge.whenMatchedUpdateAll(condition=instead_of) if instead_of else merge
            return merge.whenNotMatchedInsertAll().execute()

        return _inserted(self._commit(table, write))

    def append(self, table: Table, rows: DataFrame) -> None:
        """Add rows whose keys nobody else can have: quicker than `insert`, which looks."""
        self._create(table)
        writer = rows.select(*table.columns).write.format("delta").mode("append")
        self._commit(table, lambda: self._save(writer, table))

    def upsert(self, table: Table, rows: DataFrame) -> None:
        """Add new keys and update rows that differ outside the volatile columns."""
        self._create(table)
        self._commit(table, lambda: self._write_changes(table, self._merge(table, rows)).execute())

    def sync(self, table: Table, rows: DataFrame) -> None:
        """Make the table equal to `rows`, touching only what differs, so that the change feed holds only changes."""
        self._create(table)
        self._commit(
            table,
            lambda: (
                self._write_changes(table, self._merge(table, rows))
                .whenNotMatchedBySourceDelete()
                .execute()
            ),
        )

    def revise(self, table: Table, keys: DataFrame, rows: DataFrame) -> None:
        """Make the rows of these keys equal to `rows`, touching only what differs; a key without one loses its row."""
        self._create(table)
        there = rows.select(*table.columns, F.lit(True).alias("_there"))
        source = (
            keys.select(*table.key)
            .distinct()
            .join(there, on=list(table.key), how="left")
            .alias("new")
        )
        found = self._delta(table).alias("old").merge(source, _same_key(table))
        differs, updates = self._changes(table)
        inserts = updates | {name: f"new.`{name}`" for name in table.key}
        self._commit(
            table,
            lambda: (
                found.whenMatchedDelete(condition="new._there IS NULL")
                .whenMatchedUpdate(condition=differs, set=updates)
                .whenNotMatchedInsert(condition="new._there", values=inserts)
                .execute()
            ),
        )

    def changed_since(self, table: Table, version: int) -> DataFrame:
        """What the change feed says of later versions, if anything: the table's columns, and _change_type."""
        if self._commits(table)[0]["version"] <= version:
            return self.read(table).limit(0).withColumn("_change_type", F.lit(""))
        feed = self.spark.read.option("readChangeFeed", "true").option(
            "startingVersion", version + 1
        )
        return (
            feed.table(self.name_of(table))
            if self.named
            else feed.format("delta").load(self.name_of(table))
        )

    def replace(self, table: Table, rows: DataFrame) -> None:
        """Make the table equal to `rows` in one transaction, rewriting all of it."""
        self._create(table)
        writer = rows.select(*table.columns).write.format("delta").mode("overwrite")
        self._commit(table, lambda: self._save(writer, table))

    def staged(self, table: Table, rows: DataFrame, part: str = "") -> DataFrame:
        """Write rows that are expensive to compute aside and read them back: a MERGE may scan its source twice.

        `part` (one of PARTS) tells two apart that are aside at the same time.
        """
        aside = Table(f"_staging_{table.name}{part}", "", table.ddl, table.key)
        writer = rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
        self._commit(table, lambda: self._save(writer, aside))
        return self.read(aside)

    def clear_staging(self) -> None:
        """Remove what a killed run has staged."""
        for table in TABLES.values():
            for part in PARTS:
                if self.exists(Table(f"_staging_{table.name}{part}", "", table.ddl, table.key)):
                    self.unstage(table, part)

    def unstage(self, table: Table, part: str = "") -> None:
        """Remove what `staged` wrote for the table."""
        place = f"_staging_{table.name}{part}"
        if self.named:
            self.spark.sql(f"DROP TABLE IF EXISTS {self.location}.{place}")
        else:
            self.filesystem(self.location).delete(f"{self.location}/{place}")

    def clear_leftovers(self, hours: int) -> list[str]:
        """Remove each `_staging_…` to which nothing was written for `hours`, and name it.

        A write that was killed before its first commit leaves a folder that isn't a table yet.
        """
        gone = []
        for name, place in self._staging_places():
            if time.time() - self.filesystem(place).last_written(place) > hours * 3600:
                if self.named:
                    self.spark.sql(f"DROP TABLE IF EXISTS {self.location}.{name}")
                else:
                    self.filesystem(place).delete(place)
                gone.append(name)
        return gone

    def footprint(self, table: Table) -> Footprint | None:
        """None when the table isn't there."""
        if not self.exists(table):
            return None
        detail = self._delta(table).detail().select("sizeInBytes", "location").collect()[0]
        commits = self._commits(table)
        changed_at = datetime.fromtimestamp(_last_change(commits)["at"] / 1e6, UTC)
        on_disk = self._on_disk(detail["location"])
        return Footprint(commits[0]["version"], changed_at, detail["sizeInBytes"], on_disk)

    def optimize(self, table: Table) -> tuple[int, int]:
        """Join small files and, of a clustered table, order the new rows. Says how many files there were and are now.

        The rows stay as they are and the change feed is silent. A table with nothing to join isn't touched.
        """
        before = self._delta(table).detail().select("numFiles").collect()[0][0]
        with self._conf(_OPTIMIZE):
            done = self._commit(table, lambda: self._delta(table).optimize().executeCompaction())
        metrics = done.select("metrics.numFilesAdded", "metrics.numFilesRemoved").collect()[0]
        return before, before + metrics[0] - metrics[1]

    def retention(self, table: Table) -> str:
        """How long files are kept that only older versions need, as Delta writes it."""
        return self._properties(table).get(_RETENTION, f"interval {_WEEK} hours")

    def check_retention(self, hours: int) -> None:
        """Raise UsageError when Delta's own check forbids to keep replaced files for so few hours only."""
        if hours < _WEEK and self.spark.conf.get(_UNCHECKED, "true") != "false":
            raise UsageError(
                f"maintain.retention_hours: {hours} hours are less than Delta's least, {_WEEK}. A reader that is at "
                "work longer than that loses its files, and a table can't be read as it was before. To have it all "
                f"the same, when nobody reads: --set \"spark.conf={{{_UNCHECKED}: 'false'}}\"."
            )

    def vacuum(self, table: Table, hours: int) -> int | None:
        """Delete the files that no version of the last `hours` needs, and say how many bytes that freed, if known.

        A table that was given another retention by hand, in other words than these, keeps it.
        """
        wanted, there = f"interval {hours} hours", self.retention(table)
        if there != wanted and _OUR_RETENTION.fullmatch(there):
            # Delta 4.4 ignores the hours that VACUUM is called with; the table's property decides, on time travel too.
            self.spark.sql(
                f"ALTER TABLE {self._sql_name(table)} SET TBLPROPERTIES ('{_RETENTION}' = '{wanted}')"
            )
        place = self._delta(table).detail().select("location").collect()[0][0]
        before = self._on_disk(place)
        with self._conf(_VACUUM), self._no_chatter():
            self._delta(table).vacuum()
        after = self._on_disk(place)
        return None if before is None or after is None else max(0, before - after)

    def _commit(self, table: Table, write: Callable[[], T]) -> T:
        """Do a write whose rows can be computed again; once more when another writer was quicker, a few times."""
        self._versions.pop(table.name, None)
        for seconds in (0.5, 1, 2, 4, 8, None):
            try:
                with self._conf(_HEAVY if table.heavy else {}):
                    return write()
            except CONFLICTS as conflict:
                if seconds is None:
                    name = type(conflict).__name__
                    raise RunError(
                        f"Another program keeps writing to {self.name_of(table)} at the same time ({name}); "
                        "six tries failed. Run again when it is done."
                    ) from None
                _wait(seconds)
            except Exception as failed:
                if "No space left on device" not in str(failed):
                    raise
                raise RunError(
                    f"The disk that holds {self.name_of(table)} is full. Nothing of this write counts; make "
                    "room and run again."
                ) from None
        raise AssertionError("the last try returns or raises")

    def _save(self, writer: DataFrameWriter, table: Table) -> None:
        writer.saveAsTable(self.name_of(table)) if self.named else writer.save(self.name_of(table))

    def _merge(self, table: Table, rows: DataFrame) -> DeltaMergeBuilder:
        return (
            self._delta(table)
            .alias("old")
            .merge(rows.select(*table.columns).alias("new"), _same_key(table))
        )

    def _write_changes(self, table: Table, merge: DeltaMergeBuilder) -> DeltaMergeBuilder:
        differs, updates = self._changes(table)
        return merge.whenMatchedUpdate(condition=differs, set=updates).whenNotMatchedInsertAll()

    def _changes(self, table: Table) -> tuple[str, dict[str, str | Column]]:
        """The condition that a row `new` differs from `old`, and what it then sets."""
        compared = [
            field for field in table.schema if field.name not in {*table.key, *table.volatile}
        ]
        differs = " OR ".join(
            f"NOT ({_comparable('old', f.name, f.dataType)} <=> "
            f"{_comparable('new', f.name, f.dataType)})"
            for f in compared
        )
        return differs, {name: f"new.`{name}`" for name in table.columns if name not in table.key}

    def _create(self, table: Table) -> None:
        if self.exists(table):
            return
        # SQL, because the builder's names have two parts at most, and a catalog's tables have three.
        self.spark.sql(
            f"CREATE TABLE IF NOT EXISTS {self._sql_name(table)} ({table.ddl}) USING DELTA "
            + (f"CLUSTER BY ({', '.join(table.cluster)}) " if table.cluster else "")
            + f"COMMENT {_quoted(table.comment)} TBLPROPERTIES ({_listed(_properties(table))})"
        )

    def _properties(self, table: Table) -> dict[str, str]:
        return dict(self._delta(table).detail().select("properties").collect()[0][0])

    def _check_layout(self, table: Table) -> None:
        layout = self._properties(table).get(_LAYOUT_KEY, str(LAYOUT))
        if layout != str(LAYOUT):
            raise RunError(
                f"The table {self.name_of(table)} has layout {layout}; this release reads layout {LAYOUT} only. Start in "
                "a new folder, with --set tables=…. Captions that were paid for can be brought over with "
                "`vlm4rec import-captions`."
            )

    def _sql_name(self, table: Table) -> str:
        return self.name_of(table) if self.named else f"delta.`{self.name_of(table)}`"

    def _delta(self, table: Table) -> DeltaTable:
        if self.named:
            return DeltaTable.forName(self.spark, self.name_of(table))
        return DeltaTable.forPath(self.spark, self.name_of(table))

    def _commits(self, table: Table) -> list[Row]:
        """Latest first: version, `at` in microseconds of the epoch, and whether rows `changed`.

        The last ten; all that there are, when none of these changed rows.
        """
        # Not as a timestamp: collecting one would turn it into this machine's time zone.
        at = F.unix_micros("timestamp").alias("at")
        moved = sum((F.col("operationMetrics")[name].cast("long") for name in _MOVED), F.lit(0))
        # Where Delta keeps no metrics, a merge counts.
        idle = (F.col("operation") == "MERGE") & F.coalesce(moved == 0, F.lit(False))
        changed = (~F.col("operation").isin(*_UPKEEP) & ~idle).alias("changed")
        last = self._delta(table).history(10).select("version", at, changed).collect()
        if any(commit["changed"] for commit in last):
            return last
        return self._delta(table).history().select("version", at, changed).collect()

    def _staging_places(self) -> list[tuple[str, str]]:
        """Name and folder of whatever is called _staging_…"""
        if self.named:
            found = self.spark.sql(f"SHOW TABLES IN {self.location} LIKE '_staging_*'").collect()
            names = [row["tableName"] for row in found if not row["isTemporary"]]
            details = {
                name: self.spark.sql(f"DESCRIBE DETAIL {self.location}.{name}").collect()[0]
                for name in names
            }
            return [(name, detail["location"]) for name, detail in details.items()]
        names = self.filesystem(self.location).folders(self.location)
        return [(name, f"{self.location}/{name}") for name in names if name.startswith("_staging_")]

    def _on_disk(self, place: str) -> int | None:
        try:
            return self.filesystem(place).size(place)
        except (
            Exception
        ):  # a catalog may own the folder and let nobody list it; then the size isn't known
            return None

    @contextmanager
    def _conf(self, settings: dict[str, str]) -> Iterator[None]:
        before = {key: self.spark.conf.get(key, None) for key in settings}
        for key, value in settings.items():
            self.spark.conf.set(key, value)
        try:
            yield
        finally:
            for key, old in before.items():
                self.spark.conf.unset(key) if old is None else self.spark.conf.set(key, old)

    @contextmanager
    def _no_chatter(self) -> Iterator[None]:
        """VACUUM prints a line to the JVM's standard output, which is this program's."""
        jvm: Any = self.spark._jvm
        try:
            console = getattr(getattr(jvm.scala, "Console$"), "MODULE$")
            before = console.out()
            console.setOutDirect(
                jvm.java.io.PrintStream(jvm.java.io.OutputStream.nullOutputStream())
            )
        except Exception:  # a platform may hide the JVM's classes; then it talks
            yield
            return
        try:
            yield
        finally:
            console.setOutDirect(before)

    def filesystem(self, uri: str) -> Files:
        """The file system in which the tables, or this part of them, lie."""
        return files.filesystem(self.spark, uri)


def _wait(seconds: float) -> None:
    # At random, so that two writers don't meet again.
    time.sleep(seconds * random.uniform(0.5, 1.5))


def _last_change(commits: list[Row]) -> Row:
    """The latest commit that may have changed rows; none among these: the latest."""
    return next((commit for commit in commits if commit["changed"]), commits[0])


def _properties(table: Table) -> dict[str, str]:
    properties = {f"delta.constraints.{name}": check for name, check in table.checks}
    if table.feed:
        properties["delta.enableChangeDataFeed"] = "true"
    return properties | dict(table.properties) | {_LAYOUT_KEY: str(LAYOUT)}


def _listed(properties: dict[str, str]) -> str:
    return ", ".join(f"{_quoted(key)} = {_quoted(value)}" for key, value in properties.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _same_key(table: Table) -> str:
    return " AND ".join(f"old.`{name}` = new.`{name}`" for name in table.key)


def _inserted(result: DataFrame) -> int:
    return int(result.head()["num_inserted_rows"])  # type: ignore[index]


def _comparable(side: str, name: str, kind: DataType) -> str:
    # Spark can't compare maps; sorted entries can be compared.
    return (
        f"array_sort(map_entries({side}.`{name}`))"
        if isinstance(kind, MapType)
        else f"{side}.`{name}`"
    )


def _check_schema(table: Table, found: StructType, place: str) -> None:
    expected = {field.name: field.dataType.simpleString() for field in table.schema}
    there = {field.name: field.dataType.simpleString() for field in found}
    wrong = [f"{name} isn't known" for name in there.keys() - expected.keys()]
    wrong += [f"{name} is missing" for name in expected.keys() - there.keys()]
    wrong += [
        f"{name} is {there[name]}, expected {expected[name]}"
        for name in expected.keys() & there.keys()
        if expected[name] != there[name]
    ]
    if wrong:
        raise RunError(
            f"The table {place} has another schema than this release writes: {'; '.join(sorted(wrong))}. "
            "Name another place with --set tables=…, or move the table away."
        )
