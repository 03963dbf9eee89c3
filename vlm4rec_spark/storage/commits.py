"""The commits of a Delta table: their versions, and whether they changed rows.

Reads the files of the log, which starts no Spark job. Where a catalog owns them, SQL tells the
same.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.storage.files import Files

_LOG_FILE = re.compile(r"(\d{20})\.(?:json|checkpoint\..*)")
_RECENT = 10
"""Commits that SQL is asked for; all of them only where none of these changed rows."""
_UPKEEP = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES")
_CREATION = "CREATE TABLE"
_ROW_COUNTS = ("numTargetRowsInserted", "numTargetRowsUpdated", "numTargetRowsDeleted")


class Commit(NamedTuple):
    """One version of a table. `at` is in microseconds since 1970."""

    version: int
    at: int
    operation: str
    metrics: Mapping[str, str]

    @property
    def changed(self) -> bool:
        """Whether rows changed. Where Delta keeps no metrics, a merge counts as a change."""
        if self.operation == "MERGE" and set(_ROW_COUNTS) <= set(self.metrics):
            return any(int(self.metrics[name]) for name in _ROW_COUNTS)
        return self.operation not in _UPKEEP

    @property
    def is_creation(self) -> bool:
        """The table is as it was created, without rows."""
        return self.operation == _CREATION


def versions(files: Files, table: str) -> list[int]:
    """The versions that the log of the table in a folder names, latest first; none: no table."""
    matches = map(_LOG_FILE.fullmatch, files.names(f"{table}/_delta_log"))
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def in_folder(files: Files, table: str) -> Iterator[Commit]:
    """Commits of the table in a folder, latest first."""
    for version in versions(files, table):
        lines = (files.read(f"{table}/_delta_log/{version:020d}.json") or "").splitlines()
        actions = [json.loads(line) for line in lines if '"commitInfo"' in line[:20]]
        for info in (action["commitInfo"] for action in actions):
            metrics = info.get("operationMetrics", {})
            yield Commit(version, info["timestamp"] * 1000, info["operation"], metrics)


def by_sql(spark: SparkSession, table: str) -> Iterator[Commit]:
    """Commits of a table, latest first; `table` is its name in a statement."""
    # Not as a timestamp: collecting one would turn it into this machine's time zone.
    columns = ("version", F.unix_micros("timestamp"), "operation", "operationMetrics")
    for limit in (f" LIMIT {_RECENT}", ""):
        history = spark.sql(f"DESCRIBE HISTORY {table}{limit}").select(*columns).collect()
        commits = [Commit(*row) for row in history]
        if limit and not any(commit.changed for commit in commits):
            continue
        yield from commits
        return


def last_change(commits: Iterator[Commit]) -> Commit:
    """The latest commit that changed rows; when none did, the latest."""
    latest = next(commits)
    if latest.changed:
        return latest
    return next((commit for commit in commits if commit.changed), latest)
