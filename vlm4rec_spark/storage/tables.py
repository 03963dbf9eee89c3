"""The only Delta code: creates, reads and writes the project's tables.

Knows how rows get into a table safely; knows no stage. `layout.py` has the DDL, `maintenance.py`
the upkeep.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from delta import exceptions
from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import Column, DataFrame, DataFrameWriter, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, MapType

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.storage import files, layout
from vlm4rec_spark.storage.files import Files
from vlm4rec_spark.storage.schemas import TABLES, Table

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
"""What Delta raises when another writer was quicker. Nothing was written then."""
PARTS = ("", "_0", "_1")
_WAITS = (0.5, 1, 2, 4, 8, None)
"""Seconds after each try of a commit; None: that was the last one."""
_CATALOG_SCHEMA = re.compile(r"\w+\.\w+")
_UPKEEP = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES")
_ROW_COUNTS = ("numTargetRowsInserted", "numTargetRowsUpdated", "numTargetRowsDeleted")
HEAVY = {
    # A reader holds a row group, and a batch of up to 4,096 rows of it. At Parquet's 128 MB, two
    # tasks that read photos of 200 kB took a JVM of 1 GB down; at 32 MB they don't.
    "parquet.block.size": str(32 * 1024 * 1024),
    # Parquet checks after a hundred rows for the first time whether a group is full: 500 MB of
    # photos of 5 MB.
    "parquet.page.size.row.check.min": "10",
}


class Tables:
    """The project's tables at `location`: a folder (any Hadoop URI) or `catalog.schema`."""

    def __init__(self, spark: SparkSession, location: str):
        self.spark = spark
        self.in_catalog = _CATALOG_SCHEMA.fullmatch(location) is not None
        self.location = location if self.in_catalog else files.qualified(location)
        self._versions: dict[str, int] = {}

    def name_of(self, table: Table) -> str:
        return (
            f"{self.location}.{table.name}" if self.in_catalog else f"{self.location}/{table.name}"
        )

    def sql_name(self, table: Table) -> str:
        """As `name_of`, for a SQL statement."""
        return self.name_of(table) if self.in_catalog else f"delta.`{self.name_of(table)}`"

    def folder(self) -> str:
        """The folder of the tables; for `catalog.schema` the one of that schema."""
        if self.in_catalog:
            return self.spark.catalog.getDatabase(self.location).locationUri
        return self.location

    def filesystem(self, uri: str) -> Files:
        """The file system of the tables, or of this part of them."""
        return files.filesystem(self.spark, uri)

    def exists(self, table: Table) -> bool:
        if self.in_catalog:
            return self.spark.catalog.tableExists(self.name_of(table))
        return DeltaTable.isDeltaTable(self.spark, self.name_of(table))

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table, as of `version` or now; an empty DataFrame when it doesn't exist yet."""
        if not self.exists(table):
            return self.spark.createDataFrame([], table.schema)
        options = {} if version is None else {"versionAsOf": str(version)}
        return self._load(table, options)

    def frozen(self, table: Table) -> DataFrame:
        """The table as it is now, whatever is written to it later.

        A table that was read otherwise is read again by each action. A commit refreshes even what
        was persisted from it.
        """
        if not self.exists(table):
            return self.read(table)
        return self.read(table, self.delta(table).history(1).select("version").collect()[0][0])

    def versions(self, tables: Iterable[Table]) -> dict[str, int]:
        """Of each existing table the version that last changed its rows.

        Upkeep and idle merges make versions too; these don't count. A version is looked up once,
        and again after a write of ours or `forget`.
        """
        versions = {}
        for table in tables:
            if table.name not in self._versions and self.exists(table):
                self._versions[table.name] = last_change(self.commits(table))["version"]
            if table.name in self._versions:
                versions[table.name] = self._versions[table.name]
        return versions

    def forget(self) -> None:
        """Look all versions up again: others may have written since."""
        self._versions.clear()

    def changed_since(self, table: Table, version: int) -> DataFrame:
        """Changes after `version` from the change feed: the table's columns, and _change_type."""
        if self.commits(table)[0]["version"] <= version:
            return self.read(table).limit(0).withColumn("_change_type", F.lit(""))
        options = {"readChangeFeed": "true", "startingVersion": str(version + 1)}
        return self._load(table, options)

    def pending(self, rows: DataFrame, table: Table) -> DataFrame:
        """The rows whose key isn't in the table yet."""
        return rows.join(self.read(table).select(*table.key), on=list(table.key), how="left_anti")

    def insert(self, table: Table, rows: DataFrame, overwrite_where: str = "") -> int:
        """Add the rows whose key is new; returns how many. Two writers can't clash.

        Keys in `rows` are distinct. An existing row stays as it is, unless the condition
        `overwrite_where` holds for it (columns of `old`). Overwritten rows aren't counted.
        """

        def write() -> DataFrame:
            merge = self._merge(table, rows)
            if overwrite_where:
                merge = merge.whenMatchedUpdateAll(condition=overwrite_where)
            return merge.whenNotMatchedInsertAll().execute()

        return int(self.commit(table, write).collect()[0]["num_inserted_rows"])

    def append(self, table: Table, rows: DataFrame) -> None:
        """Add rows whose keys nobody else can have: quicker than `insert`, which compares."""
        self._create(table)
        writer = rows.select(*table.columns).write.format("delta").mode("append")
        self.commit(table, lambda: self._save(writer, table))

    def upsert(self, table: Table, rows: DataFrame) -> None:
        """Add new keys and update rows that differ outside the volatile columns."""
        self.commit(
            table, lambda: _with_update_and_insert(table, self._merge(table, rows)).execute()
        )

    def sync(self, table: Table, rows: DataFrame) -> None:
        """Make the table equal to `rows`, so that the change feed holds only real changes."""

        def write() -> DataFrame:
            merge = _with_update_and_insert(table, self._merge(table, rows))
            return merge.whenNotMatchedBySourceDelete().execute()

        self.commit(table, write)

    def revise(self, table: Table, keys: DataFrame, rows: DataFrame) -> None:
        """As `sync`, for these keys only; a key without a row in `rows` loses its row."""
        self._create(table)
        marked = rows.select(*table.columns, F.lit(True).alias("_exists"))
        distinct = keys.select(*table.key).distinct()
        source = distinct.join(marked, on=list(table.key), how="left").alias("new")
        differs, updates = _difference(table)
        inserts = updates | {name: f"new.`{name}`" for name in table.key}

        def write() -> DataFrame:
            merge = self.delta(table).alias("old").merge(source, _same_key(table))
            merge = merge.whenMatchedDelete(condition="new._exists IS NULL")
            merge = merge.whenMatchedUpdate(condition=differs, set=updates)
            merge = merge.whenNotMatchedInsert(condition="new._exists", values=inserts)
            return merge.execute()

        self.commit(table, write)

    def replace(self, table: Table, rows: DataFrame, where: str = "") -> None:
        """Make the table, or its rows `where`, equal to `rows` in one transaction."""
        self._create(table)
        writer = rows.select(*table.columns).write.format("delta").mode("overwrite")
        if where:
            writer = writer.option("replaceWhere", where)
        self.commit(table, lambda: self._save(writer, table))

    def staged(self, table: Table, rows: DataFrame, part: str = "") -> DataFrame:
        """Write expensive rows to a staging table and read them from there.

        A MERGE may scan its source twice. `part` (one of PARTS) separates two staging tables that
        exist at the same time.
        """
        staging = _staging(table, part)
        writer = rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
        self.commit(table, lambda: self._save(writer, staging))
        return self.read(staging)

    def unstage(self, table: Table, part: str = "") -> None:
        """Remove what `staged` wrote for the table."""
        self.remove(_staging(table, part).name)

    def clear_staging(self) -> None:
        """Remove what a killed run has staged."""
        for table in TABLES.values():
            for part in PARTS:
                if self.exists(_staging(table, part)):
                    self.unstage(table, part)

    def remove(self, name: str) -> None:
        """Remove the table `name` and its files, if it exists."""
        if self.in_catalog:
            self.spark.sql(f"DROP TABLE IF EXISTS {self.location}.{name}")
        else:
            self.filesystem(self.location).delete(f"{self.location}/{name}")

    def properties(self, table: Table) -> dict[str, str]:
        """The Delta properties of an existing table."""
        return dict(self.delta(table).detail().select("properties").collect()[0][0])

    def delta(self, table: Table) -> DeltaTable:
        if self.in_catalog:
            return DeltaTable.forName(self.spark, self.name_of(table))
        return DeltaTable.forPath(self.spark, self.name_of(table))

    def commits(self, table: Table) -> list[Row]:
        """Commits, latest first: version, `at` (microseconds since 1970), whether rows `changed`.

        The last ten, or all of them when none of the ten changed rows.
        """
        # Not as a timestamp: collecting one would turn it into this machine's time zone.
        at = F.unix_micros("timestamp").alias("at")
        counts = [F.col("operationMetrics")[name].cast("long") for name in _ROW_COUNTS]
        # Where Delta keeps no metrics, a merge counts as a change.
        idle = (F.col("operation") == "MERGE") & F.coalesce(
            sum(counts, F.lit(0)) == 0, F.lit(False)
        )
        changed = (~F.col("operation").isin(*_UPKEEP) & ~idle).alias("changed")
        last = self.delta(table).history(10).select("version", at, changed).collect()
        if any(commit["changed"] for commit in last):
            return last
        return self.delta(table).history().select("version", at, changed).collect()

    def commit(self, table: Table, write: Callable[[], T]) -> T:
        """Do a write whose rows can be computed again; tries again when another was quicker."""
        self._versions.pop(table.name, None)
        for seconds in _WAITS:
            try:
                with self.conf(HEAVY if table.heavy else {}):
                    return write()
            except CONFLICTS as conflict:
                if seconds is None:
                    name = type(conflict).__name__
                    raise RunError(
                        f"Another program keeps writing to {self.name_of(table)} at the same time "
                        f"({name}); six tries failed. Run again when it is done."
                    ) from None
                _wait(seconds)
            except Exception as error:
                if "No space left on device" not in str(error):
                    raise
                raise RunError(
                    f"The disk that holds {self.name_of(table)} is full. Nothing of this write "
                    "counts; make room and run again."
                ) from None
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def conf(self, settings: dict[str, str]) -> Iterator[None]:
        """The session with these settings; the old ones come back at the end."""
        before = {key: self.spark.conf.get(key, None) for key in settings}
        for key, value in settings.items():
            self.spark.conf.set(key, value)
        try:
            yield
        finally:
            for key, old in before.items():
                self.spark.conf.unset(key) if old is None else self.spark.conf.set(key, old)

    def _create(self, table: Table) -> None:
        if not self.exists(table):
            self.spark.sql(layout.create_statement(table, self.sql_name(table)))

    def _load(self, table: Table, options: dict[str, str]) -> DataFrame:
        reader = self.spark.read.options(**options)
        if self.in_catalog:
            return reader.table(self.name_of(table))
        return reader.format("delta").load(self.name_of(table))

    def _save(self, writer: DataFrameWriter, table: Table) -> None:
        writer.saveAsTable(self.name_of(table)) if self.in_catalog else writer.save(
            self.name_of(table)
        )

    def _merge(self, table: Table, rows: DataFrame) -> DeltaMergeBuilder:
        self._create(table)
        new = rows.select(*table.columns).alias("new")
        return self.delta(table).alias("old").merge(new, _same_key(table))


def last_change(commits: list[Row]) -> Row:
    """The latest commit that changed rows; when none did, the latest."""
    return next((commit for commit in commits if commit["changed"]), commits[0])


def _wait(seconds: float) -> None:
    # At random, so that two writers don't meet again.
    time.sleep(seconds * random.uniform(0.5, 1.5))


def _staging(table: Table, part: str) -> Table:
    return Table(f"_staging_{table.name}{part}", "", table.ddl, table.key)


def _same_key(table: Table) -> str:
    return " AND ".join(f"old.`{name}` = new.`{name}`" for name in table.key)


def _with_update_and_insert(table: Table, merge: DeltaMergeBuilder) -> DeltaMergeBuilder:
    differs, updates = _difference(table)
    return merge.whenMatchedUpdate(condition=differs, set=updates).whenNotMatchedInsertAll()


def _difference(table: Table) -> tuple[str, dict[str, str | Column]]:
    """The condition under which a row `new` differs from `old`, and what it then sets."""
    ignored = {*table.key, *table.volatile}
    comparisons = [
        f"NOT ({_comparable('old', field.name, field.dataType)} <=> "
        f"{_comparable('new', field.name, field.dataType)})"
        for field in table.schema
        if field.name not in ignored
    ]
    updates: dict[str, str | Column] = {
        name: f"new.`{name}`" for name in table.columns if name not in table.key
    }
    return " OR ".join(comparisons), updates


def _comparable(side: str, name: str, kind: DataType) -> str:
    column = f"{side}.`{name}`"
    # Spark can't compare maps; sorted entries can be compared.
    return f"array_sort(map_entries({column}))" if isinstance(kind, MapType) else column
