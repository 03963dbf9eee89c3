"""The only Delta code: create, read, pending, insert-only merge, upsert, sync, replace.

Knows how a record of `schemas.py` becomes a Delta table in a folder or in a catalog's schema; knows no stage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql.types import DataType, MapType, StructType

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.schemas import TABLES, Table

_NAMED = re.compile(r"\w+\.\w+")


class Tables:
    """The project's tables at `location`: a folder (any Hadoop URI) or `catalog.schema`."""

    def __init__(self, spark: SparkSession, location: str):
        self.spark = spark
        self.named = _NAMED.fullmatch(location) is not None
        # Delta takes a relative path for a table's name.
        self.location = location if self.named or ":" in location else os.path.abspath(location)  # noqa: PTH100

    def prepare(self) -> None:
        """Check that the place can be written and that every table there has this release's columns.

        Raises UsageError or RunError before anything was changed.
        """
        if not self.named:
            self._probe()
        elif not self.spark.catalog.databaseExists(self.location):
            raise RunError(f"tables: there is no schema {self.location}. Create it, or name a folder with a / in it.")
        for table in TABLES.values():
            if self.exists(table):
                _check_schema(table, self.read(table).schema, self.place(table))

    def place(self, table: Table) -> str:
        return f"{self.location}.{table.name}" if self.named else f"{self.location}/{table.name}"

    def exists(self, table: Table) -> bool:
        if self.named:
            return self.spark.catalog.tableExists(self.place(table))
        return DeltaTable.isDeltaTable(self.spark, self.place(table))

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table, as of `version` or now; an empty DataFrame when it isn't there yet."""
        if not self.exists(table):
            return self.spark.createDataFrame([], table.schema)
        reader = self.spark.read if version is None else self.spark.read.option("versionAsOf", version)
        return reader.table(self.place(table)) if self.named else reader.format("delta").load(self.place(table))

    def versions(self, tables: Iterable[Table]) -> dict[str, int]:
        """Current version of each table that exists."""
        return {
            table.name: self._delta(table).history(1).select("version").collect()[0][0]
            for table in tables
            if self.exists(table)
        }

    def pending(self, rows: DataFrame, table: Table) -> DataFrame:
        """The rows whose key isn't in the table yet."""
        return rows.join(self.read(table).select(*table.key), on=list(table.key), how="left_anti")

    def insert(self, table: Table, rows: DataFrame) -> int:
        """Add the rows whose key is new, and say how many. Keys in `rows` are distinct; two writers can't clash."""
        self._create(table)
        merge = self._delta(table).alias("old").merge(rows.select(*table.columns).alias("new"), _same_key(table))
        return _inserted(merge.whenNotMatchedInsertAll().execute())

    def upsert(self, table: Table, rows: DataFrame) -> None:
        """Add new keys and update rows that differ outside the volatile columns."""
        self._create(table)
        merge = self._delta(table).alias("old").merge(rows.select(*table.columns).alias("new"), _same_key(table))
        self._write_changes(table, merge).execute()

    def sync(self, table: Table, rows: DataFrame) -> None:
        """Make the table equal to `rows`, touching only what differs, so that the change feed holds only changes."""
        self._create(table)
        merge = self._delta(table).alias("old").merge(rows.select(*table.columns).alias("new"), _same_key(table))
        self._write_changes(table, merge).whenNotMatchedBySourceDelete().execute()

    def replace(self, table: Table, rows: DataFrame) -> None:
        """Make the table equal to `rows` in one transaction, rewriting all of it."""
        self._create(table)
        writer = rows.select(*table.columns).write.format("delta").mode("overwrite")
        writer.saveAsTable(self.place(table)) if self.named else writer.save(self.place(table))

    def staged(self, table: Table, rows: DataFrame) -> DataFrame:
        """Write rows that are expensive to compute aside and read them back: a MERGE may scan its source twice."""
        aside = Table(f"_staging_{table.name}", "", table.ddl, table.key)
        writer = rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
        writer.saveAsTable(self.place(aside)) if self.named else writer.save(self.place(aside))
        return self.read(aside)

    def unstage(self, table: Table) -> None:
        """Remove what `staged` wrote for the table."""
        place = f"_staging_{table.name}"
        if self.named:
            self.spark.sql(f"DROP TABLE IF EXISTS {self.location}.{place}")
        else:
            self._filesystem(f"{self.location}/{place}").delete(self._path(f"{self.location}/{place}"), True)

    def _write_changes(self, table: Table, merge: DeltaMergeBuilder) -> DeltaMergeBuilder:
        compared = [field for field in table.schema if field.name not in {*table.key, *table.volatile}]
        differs = " OR ".join(f"NOT ({_comparable('old', f.name, f.dataType)} <=> "
                              f"{_comparable('new', f.name, f.dataType)})" for f in compared)  # fmt: skip
        updates: dict[str, str | Column] = {name: f"new.`{name}`" for name in table.columns if name not in table.key}
        return merge.whenMatchedUpdate(condition=differs, set=updates).whenNotMatchedInsertAll()

    def _create(self, table: Table) -> None:
        if self.exists(table):
            return
        # SQL, because the builder's names have two parts at most, and a catalog's tables have three.
        properties = {f"delta.constraints.{name}": check for name, check in table.checks}
        if table.feed:
            properties["delta.enableChangeDataFeed"] = "true"
        listed = ", ".join(f"{_quoted(key)} = {_quoted(value)}" for key, value in properties.items())
        self.spark.sql(
            f"CREATE TABLE IF NOT EXISTS {self._sql_name(table)} ({table.ddl}) USING DELTA "
            + (f"CLUSTER BY ({', '.join(table.cluster)}) " if table.cluster else "")
            + f"COMMENT {_quoted(table.comment)}"
            + (f" TBLPROPERTIES ({listed})" if listed else "")
        )

    def _sql_name(self, table: Table) -> str:
        return self.place(table) if self.named else f"delta.`{self.place(table)}`"

    def _delta(self, table: Table) -> DeltaTable:
        if self.named:
            return DeltaTable.forName(self.spark, self.place(table))
        return DeltaTable.forPath(self.spark, self.place(table))

    def _probe(self) -> None:
        probe = f"{self.location}/_write_probe"
        try:
            files, path = self._filesystem(probe), self._path(probe)
            fresh = not files.exists(path.getParent())
            files.create(path, True).close()
            files.delete(path, False)
            if fresh:
                files.delete(path.getParent(), False)
        except Exception as refused:
            reason = str(getattr(refused, "java_exception", refused)).splitlines()[0]
            raise RunError(f"tables: nothing can be written to {self.location} ({reason}). Check the path and its "
                           "permissions, or name another place with --set tables=…") from None  # fmt: skip

    def _path(self, uri: str) -> Any:
        assert self.spark._jvm is not None
        return self.spark._jvm.org.apache.hadoop.fs.Path(uri)

    def _filesystem(self, uri: str) -> Any:
        return self._path(uri).getFileSystem(self.spark._jsparkSession.sessionState().newHadoopConf())


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _same_key(table: Table) -> str:
    return " AND ".join(f"old.`{name}` = new.`{name}`" for name in table.key)


def _inserted(result: DataFrame) -> int:
    return int(result.head()["num_inserted_rows"])  # type: ignore[index]


def _comparable(side: str, name: str, kind: DataType) -> str:
    # Spark can't compare maps; sorted entries can be compared.
    return f"array_sort(map_entries({side}.`{name}`))" if isinstance(kind, MapType) else f"{side}.`{name}`"


def _check_schema(table: Table, found: StructType, place: str) -> None:
    expected = {field.name: field.dataType.simpleString() for field in table.schema}
    there = {field.name: field.dataType.simpleString() for field in found}
    if expected == there:
        return
    wrong = [f"{name} is missing" for name in expected.keys() - there.keys()]
    wrong += [f"{name} isn't known" for name in there.keys() - expected.keys()]
    wrong += [f"{name} is {there[name]}, expected {expected[name]}" for name in expected.keys() & there.keys()
              if expected[name] != there[name]]  # fmt: skip
    raise RunError(f"The table {place} has another schema than this release writes: {'; '.join(sorted(wrong))}. "
                   "Name another place with --set tables=…, or move the table away.")  # fmt: skip
