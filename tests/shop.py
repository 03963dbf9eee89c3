"""What tests of a shop share: its pipeline, its events, and the rows of its tables."""

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame, Row, SparkSession

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import Pipeline, StageResult
from vlm4rec_spark.report.data import group_of_details
from vlm4rec_spark.storage.schemas import INTERACTIONS, Table

MakePipeline = Callable[..., Pipeline]
"""Makes the pipeline of a folder and `key=value` settings: conftest.py's fixture `pipeline`."""


def rows_of(run: Pipeline, table: Table) -> list[Row]:
    return run.tables.read(table).collect()


def insert(run: Pipeline, table: Table, rows: list[tuple]) -> None:
    """Add rows, or replace those with the same keys."""
    run.tables.upsert(table, run.spark.createDataFrame(rows, table.schema))


def log(spark: SparkSession, events: Iterable[tuple[str, str, str, str]]) -> DataFrame:
    """The table of interactions from user, item, type and time; its ids are e0, e1, …"""
    rows = []
    for number, (user, item, event_type, time) in enumerate(events):
        at = datetime.fromisoformat(time)
        rows.append((f"e{number}", user, item, event_type, at, at.date()))
    return spark.createDataFrame(rows, INTERACTIONS.schema)


def source_counts(result: StageResult, source: str) -> dict[str, int]:
    """How many rows of the source ingest took, rejected and skipped."""
    details = group_of_details(result.details, source)
    return {name: int(count) for name, count in details.items()}


def build_exact(folder: Path, ids: Iterable[str], vectors: np.ndarray) -> Path:
    """An index without texts that is searched exactly."""
    texts = [""] * len(vectors)
    Searcher.build(folder, folder.name, list(ids), vectors, texts, ann_min_items=10**6)
    return folder
