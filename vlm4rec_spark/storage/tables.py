"""The only Delta code: creates, reads and writes the project's tables, by SQL.

Knows how rows get into a table safely; knows no stage. `layout.py` has the DDL, `maintenance.py`
the upkeep.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from pyspark.sql import DataFrame, DataFrameWriter, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import MapType, StructField, StructType

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.files import without_file_scheme
from vlm4rec_spark.storage import commits, files, layout
from vlm4rec_spark.storage.commits import Commit
from vlm4rec_spark.storage.files import Files, LocalFiles
from vlm4rec_spark.storage.schemas import TABLES, Table

if TYPE_CHECKING:
    from deltalake import DeltaTable

T = TypeVar("T")
_CONFLICT = re.compile(r"DELTA_(CONCURRENT_\w+|METADATA_CHANGED|PROTOCOL_CHANGED)")
"""The error classes when another writer was quicker. Nothing was written then."""
PARTS = ("", "_0", "_1")
_WAITS = (0.5, 1, 2, 4, 8, None)
"""Seconds after each try of a commit; None: that was the last one."""
_SMALL = 4 * 1024 * 1024
"""Bytes of a table whose rows are kept in the driver: some 200,000 events."""
_CATALOG_SCHEMA = re.compile(r"\w+\.\w+")
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
        self._small: dict[str, tuple[int, DataFrame | None]] = {}

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

    @cached_property
    def _files(self) -> Files:
        return self.filesystem(self.location)

    def exists(self, table: Table) -> bool:
        if self.in_catalog:
            return self.spark.catalog.tableExists(self.name_of(table))
        return bool(self._folder_versions(table))

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table, as of `version` or now; an empty DataFrame when it doesn't exist yet."""
        if self._is_new(table):
            # Spark drops joins with rows that it knows not to exist.
            return self.spark.createDataFrame([], table.schema).limit(0)
        if version is None or version == self.version(table):
            rows = self._in_driver(table)
            if rows is not None:
                return rows
        options = {} if version is None else {"versionAsOf": str(version)}
        return self._load(table, options)

    def stored_schema(self, table: Table) -> StructType:
        """The columns of an existing table as they are."""
        if stored := self._without_spark(table):
            return StructType.fromJson(json.loads(stored.schema().to_json()))
        return self._load(table, {}).schema

    def frozen(self, table: Table) -> DataFrame:
        """The table as it is now, whatever is written to it later.

        A table that was read otherwise is read again by each action. A commit refreshes even what
        was persisted from it.
        """
        return self.read(table, self.version(table) if self.exists(table) else None)

    def version(self, table: Table) -> int:
        """The latest version of an existing table."""
        if self.in_catalog:
            return next(self.commits(table)).version
        return self._folder_versions(table)[0]

    def versions(self, tables: Iterable[Table]) -> dict[str, int]:
        """Of each existing table the version that last changed its rows.

        Upkeep and idle merges make versions too; these don't count. A version is looked up once,
        and again after a write of ours or `forget`.
        """
        versions = {}
        for table in tables:
            if table.name not in self._versions and self.exists(table):
                self._versions[table.name] = commits.last_change(self.commits(table)).version
            if table.name in self._versions:
                versions[table.name] = self._versions[table.name]
        return versions

    def forget(self) -> None:
        """Look all versions up again: others may have written since."""
        self._versions.clear()
        self._small.clear()

    def changed_since(self, table: Table, version: int) -> DataFrame:
        """Changes after `version` from the change feed: the table's columns, and _change_type."""
        if self.version(table) <= version:
            return self.read(table).limit(0).withColumn("_change_type", F.lit(""))
        options = {"readChangeFeed": "true", "startingVersion": str(version + 1)}
        return self._load(table, options)

    def insert(self, table: Table, rows: DataFrame, overwrite_where: str = "") -> int:
        """Add the rows whose key is new; returns how many.

        Two writers of the same keys can clash only while the table has no rows.
        Keys in `rows` are distinct. An existing row stays as it is, unless the condition
        `overwrite_where` holds for it (columns of `old`). Overwritten rows aren't counted.
        """
        if self._is_new(table):
            return self.append(table, rows)
        overwrite = f"WHEN MATCHED AND {overwrite_where} THEN UPDATE SET *"
        clauses = [overwrite] if overwrite_where else []
        counts = self._merge(table, rows, *clauses, "WHEN NOT MATCHED THEN INSERT *")
        return int(counts["num_inserted_rows"])

    def append(self, table: Table, rows: DataFrame) -> int:
        """Add rows whose keys nobody else can have: quicker than `insert`, which compares.

        Returns how many.
        """
        self.create(table)
        writer = rows.select(*table.columns).write.format("delta").mode("append")
        self.commit(table, lambda: self._save(writer, table))
        return self._rows_written(table)

    def upsert(self, table: Table, rows: DataFrame) -> None:
        """Add new keys and update rows that differ outside the volatile columns."""
        if self._is_new(table):
            self.append(table, rows)
        else:
            self._merge(table, rows, _update(table), "WHEN NOT MATCHED THEN INSERT *")

    def sync(self, table: Table, rows: DataFrame) -> None:
        """Make the table equal to `rows`, so that the change feed holds only real changes."""
        if self._is_new(table):
            self.append(table, rows)
        else:
            self._merge(
                table,
                rows,
                _update(table),
                "WHEN NOT MATCHED THEN INSERT *",
                "WHEN NOT MATCHED BY SOURCE THEN DELETE",
            )

    def revise(self, table: Table, keys: DataFrame, rows: DataFrame) -> None:
        """As `sync`, for these keys only; a key without a row in `rows` loses its row."""
        marked = rows.select(*table.columns, F.lit(True).alias("_exists"))
        distinct = keys.select(*table.key).distinct()
        source = distinct.join(marked, on=list(table.key), how="left")
        columns = ", ".join(f"`{name}`" for name in table.columns)
        values = ", ".join(f"new.`{name}`" for name in table.columns)
        self._merge(
            table,
            source,
            "WHEN MATCHED AND new._exists IS NULL THEN DELETE",
            _update(table),
            f"WHEN NOT MATCHED AND new._exists THEN INSERT ({columns}) VALUES ({values})",
        )

    def replace(self, table: Table, rows: DataFrame) -> int:
        """Make the table equal to `rows` in one transaction; returns how many there are."""
        if self._is_new(table):
            return self.append(table, rows)
        writer = rows.select(*table.columns).write.format("delta").mode("overwrite")
        self.commit(table, lambda: self._save(writer, table))
        return self._rows_written(table)

    def staged(self, table: Table, rows: DataFrame, part: str = "") -> DataFrame:
        """Write expensive rows to a staging table and read them from there.

        A MERGE may scan its source twice. `part` (one of PARTS) separates two staging tables that
        exist at the same time.
        """
        staging = _staging(table, part)
        writer = rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
        self.commit(table, lambda: self._save(writer, staging))
        return self._load(staging, {})

    def staged_rows(self, table: Table, part: str = "") -> int:
        """How many rows `staged` wrote."""
        return self._rows_written(_staging(table, part))

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
            self._files.delete(f"{self.location}/{name}")

    def properties(self, table: Table) -> dict[str, str]:
        """The Delta properties of an existing table."""
        if stored := self._without_spark(table):
            return dict(stored.metadata().configuration)
        rows = self.spark.sql(f"SHOW TBLPROPERTIES {self.sql_name(table)}").collect()
        return {row["key"]: row["value"] for row in rows}

    def detail(self, table: Table) -> Row:
        """What Delta says of an existing table: numFiles, sizeInBytes, location."""
        return self.spark.sql(f"DESCRIBE DETAIL {self.sql_name(table)}").collect()[0]

    def commits(self, table: Table) -> Iterator[Commit]:
        """The commits of an existing table, latest first."""
        if self.in_catalog:
            return commits.by_sql(self.spark, self.sql_name(table))
        return commits.in_folder(self._files, self.name_of(table))

    def commit(self, table: Table, write: Callable[[], T]) -> T:
        """Do a write whose rows can be computed again; tries again when another was quicker."""
        self._versions.pop(table.name, None)
        for seconds in _WAITS:
            try:
                with self.conf(HEAVY if table.heavy else {}):
                    return write()
            except Exception as error:
                if conflict := _CONFLICT.search(str(error)):
                    if seconds is None:
                        raise RunError(
                            f"Another program keeps writing to {self.name_of(table)} at the same "
                            f"time ({conflict[0]}); six tries failed. Run again when it is done."
                        ) from None
                    _wait(seconds)
                    continue
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

    def _folder_versions(self, table: Table) -> list[int]:
        return commits.versions(self._files, self.name_of(table))

    def _is_new(self, table: Table) -> bool:
        """Whether the table never had rows: then there is nothing to compare new ones with."""
        if self.in_catalog:
            return not self.exists(table)
        versions = self._folder_versions(table)
        return not versions or (versions == [0] and next(self.commits(table)).is_creation)

    def _rows_written(self, table: Table) -> int:
        """By the latest commit, without a Spark job."""
        written = next(self.commits(table)).metrics.get("numOutputRows")
        # Delta can be told to keep no metrics.
        return self.read(table).count() if written is None else int(written)

    def _in_driver(self, table: Table) -> DataFrame | None:
        """The rows of a small table, which are read once for each of its versions; else None.

        Spark takes four jobs to look up the files of a new version and one for each read of them.
        The deltalake library takes milliseconds. Rows of one partition are joined and grouped
        without shuffles, each of which is a job too.
        """
        if self.in_catalog:
            return None
        version = self.version(table)
        if self._small.get(table.name, (-1,))[0] != version:
            self._small[table.name] = (version, self._small_rows(table))
        rows = self._small[table.name][1]
        # With names of its own, so that a table can be joined with itself.
        return None if rows is None else rows.coalesce(1).toDF(*rows.columns)

    def _small_rows(self, table: Table) -> DataFrame | None:
        from deltalake.exceptions import DeltaError
        from pyarrow.dataset import ParquetReadOptions

        stored = self._without_spark(table)
        if stored is None:
            return None
        if sum(stored.get_add_actions()["size_bytes"].to_pylist()) > _SMALL:
            return None
        try:
            # Spark writes times of 96 bits. As nanoseconds they would end in the year 2262.
            microseconds = ParquetReadOptions(coerce_int96_timestamp_unit="us")
            rows = stored.to_pyarrow_dataset(parquet_read_options=microseconds).to_table()
        except DeltaError:  # a feature of Delta that only Spark knows
            return None
        return self.spark.createDataFrame(rows, self.stored_schema(table))

    def _without_spark(self, table: Table) -> DeltaTable | None:
        """The table as the deltalake library sees it, if it lies in a folder of this machine."""
        from deltalake import DeltaTable

        if self.in_catalog or not isinstance(self._files, LocalFiles):
            return None
        return DeltaTable(without_file_scheme(self.name_of(table)))

    def create(self, table: Table) -> None:
        """Create the table, without rows, if it doesn't exist."""
        if not self.exists(table):
            self.spark.sql(layout.create_statement(table, self.sql_name(table)))

    def _load(self, table: Table, options: dict[str, str]) -> DataFrame:
        reader = self.spark.read.options(**options)
        if self.in_catalog:
            return reader.table(self.name_of(table))
        return reader.format("delta").load(self.name_of(table))

    def _save(self, writer: DataFrameWriter, table: Table) -> None:
        save = writer.saveAsTable if self.in_catalog else writer.save
        save(self.name_of(table))

    def _merge(self, table: Table, rows: DataFrame, *clauses: str) -> Row:
        """Merge the rows, as `new`, into the table, as `old`; returns the numbers of rows."""
        self.create(table)
        same_key = " AND ".join(f"old.`{name}` = new.`{name}`" for name in table.key)
        statement = (
            f"MERGE INTO {self.sql_name(table)} AS old USING {{new}} AS new ON {same_key} "
            + " ".join(clauses)
        )
        return self.commit(table, lambda: self.spark.sql(statement, new=rows).collect()[0])


def _wait(seconds: float) -> None:
    # At random, so that two writers don't meet again.
    time.sleep(seconds * random.uniform(0.5, 1.5))


def _staging(table: Table, part: str) -> Table:
    return Table(f"_staging_{table.name}{part}", "", table.ddl, table.key)


def _update(table: Table) -> str:
    """The clause that updates a row which differs from the new one."""
    comparable = [
        field for field in table.schema if field.name not in {*table.key, *table.volatile}
    ]
    differs = " OR ".join(
        f"NOT ({_comparable('old', field)} <=> {_comparable('new', field)})" for field in comparable
    )
    updates = ", ".join(
        f"old.`{name}` = new.`{name}`" for name in table.columns if name not in table.key
    )
    return f"WHEN MATCHED AND ({differs}) THEN UPDATE SET {updates}"


def _comparable(side: str, field: StructField) -> str:
    column = f"{side}.`{field.name}`"
    # Spark can't compare maps; sorted entries can be compared.
    is_map = isinstance(field.dataType, MapType)
    return f"array_sort(map_entries({column}))" if is_map else column
