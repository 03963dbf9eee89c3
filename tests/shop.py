"""What tests of a shop share: its pipeline, its events, and the rows of its tables."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame, Row, SparkSession

from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import Pipeline, StageResult
from vlm4rec_spark.report.data import group_of_details
from vlm4rec_spark.storage.schemas import INTERACTIONS, ITEMS, Table
from vlm4rec_spark.storage.tables import Tables

MakePipeline = Callable[..., Pipeline]
"""Makes the pipeline of a folder and `key=value` settings: conftest.py's fixture `pipeline`."""


Event = tuple[str, str, str, str]
"""User, item, type and time."""


def paths(folder: Path) -> tuple[str, ...]:
    """The settings of all that a pipeline writes."""
    tables = f"tables={folder}/tables"
    return tables, f"index.folder={folder}/index", f"report.path={folder}/report.html"


def demo_settings(raw: Path) -> tuple[str, ...]:
    """Write the files of the demo's shop, and return the settings of a quick run on them."""
    catalogue.write(raw, items=60, users=60)
    return (
        *catalogue.settings(raw),
        "recommend.k=5",
        "evaluate.splits=[time]",
        "report.photos=4",
        "report.users=2",
    )


@dataclass
class Shop:
    """A folder with raw files, the settings that read them, and a pipeline of these settings."""

    folder: Path
    settings: tuple[str, ...]
    run: Pipeline

    def rows(self, table: Table) -> list[Row]:
        return rows_of(self.run, table)

    def copy(self, folder: Path) -> None:
        """Copy its tables and its index to another folder; the raw files stay."""
        for name in ("tables", "index"):
            shutil.copytree(self.folder / name, folder / name)


def rows_of(run: Pipeline, table: Table) -> list[Row]:
    return run.tables.read(table).collect()


def from_files(tables: Tables, table: Table) -> DataFrame:
    """The table as Delta's own reader has it, which tells its files."""
    return tables.spark.read.format("delta").load(tables.name_of(table))


def run_stage(run: Pipeline, stage: str) -> StageResult:
    (result,) = run.run([stage])
    return result


def item_row(item_id: str, **columns: object) -> tuple:
    """A row of the catalogue; other columns are null, but for `available` and `updated_at`."""
    row: dict[str, object] = dict.fromkeys(ITEMS.columns)
    row |= {"item_id": item_id, "available": True, "updated_at": datetime(2025, 1, 1)}
    return tuple((row | columns).values())


def photo_row(item_id: str, image: bytes) -> tuple:
    digest = hashlib.sha256(image).hexdigest()
    return item_id, 0, None, image, digest, len(image), None, None


def upsert(run: Pipeline, table: Table, rows: list[tuple]) -> None:
    run.tables.upsert(table, run.spark.createDataFrame(rows, table.schema))


def log(spark: SparkSession, events: Iterable[Event], first: int = 0) -> DataFrame:
    """The table of interactions from user, item, type and time, with numbers as ids."""
    rows = []
    for number, (user, item, event_type, time) in enumerate(events, first):
        at = datetime.fromisoformat(time)
        rows.append((f"e{number:04d}", user, item, event_type, at, at.date()))
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
