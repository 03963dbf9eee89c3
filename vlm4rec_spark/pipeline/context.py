"""What every stage of a run has at hand: session, config, tables, voice, and a record of what it did."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.config import Config
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.encoding import text_encoder, vision_encoder
from vlm4rec_spark.stages import profiles
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.tables import Tables


@dataclass
class StageResult:
    """What a stage did, as `runs` keeps it; rows in = ok + failed + skipped.

    `status` is empty until the stage has ended well, `state` stands for all that its result depends on.
    """

    stage: str
    status: str = ""
    complete: bool = True
    """False when the next run has more to do though nothing changes: then it isn't taken for unchanged."""
    state: str | None = None
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    device_seconds: float | None = None
    details: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rows_in(self) -> int:
        return self.ok + self.failed + self.skipped


@dataclass(frozen=True)
class Reporter:
    """How a run speaks: `enter(run_id, stage)`; `say` a line; `watch(label, rows)` a Spark job that takes long.

    A third argument to `watch` gives the rows done and what else there is to say; else finished tasks are counted.
    """

    stage: Callable[[str, str], None]
    info: Callable[[str], None]
    progress: Callable[..., AbstractContextManager[None]]


class RunContext:
    """Runs of one configuration on one Spark session, one after another."""

    def __init__(self, spark: SparkSession, config: Config, reporter: Reporter):
        self.spark, self.config, self.reporter = spark, config, reporter
        self.tables = Tables(spark, config.tables)
        self.run_id = ""
        self.retry: str | None = None
        """Failed captions to try again: an error class, or "" for all of them."""
        self.index_folder: Path | None = None
        """What this run has built; `runs` doesn't know of it before the stage has ended."""

    def begin(self) -> None:
        """Another run, with an id of its own."""
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
        self.index_folder = None
        self.tables.forget()
        self.reporter.stage(self.run_id, "start")

    def read(self, table: Table) -> DataFrame:
        """A table that an earlier stage made. Raises RunError when it isn't there."""
        if not self.tables.exists(table):
            raise RunError(
                f"The table {self.tables.name_of(table)} isn't there yet. Run the stage that makes it, or "
                "`vlm4rec run` for all."
            )
        return self.tables.read(table)

    def last(self, stage: str) -> Row | None:
        """The last run of the stage that had something to do and ended well."""
        good = self.tables.read(schemas.RUNS).where(
            (F.col("stage") == stage) & (F.col("status") == "ok")
        )
        return good.orderBy(F.desc("started_at")).first()

    def log(self) -> DataFrame:
        """The interactions, those of an anonymous id under the user that it is known to be."""
        return self.identified(self.read(schemas.INTERACTIONS))

    def identified(self, events: DataFrame) -> DataFrame:
        """Rows of interactions under the users that their ids are known to be."""
        if not self.tables.exists(schemas.IDENTITIES):
            return events
        return profiles.identified(events, self.tables.read(schemas.IDENTITIES))

    def reject(self, rows: DataFrame) -> None:
        self.tables.insert(schemas.REJECTED, rows)

    def encoder_id(self) -> str:
        return text_encoder.encoder_id(self.config.embed.encoder, self.config.embed.revision)

    def vision_id(self) -> str | None:
        """None where no photos are embedded."""
        settings = self.config.embed
        return (
            vision_encoder.vision_id(settings.vision, settings.vision_revision)
            if settings.vision
            else None
        )


def first_row(rows: DataFrame) -> Row:
    """The first row, of rows that are known to have one."""
    return rows.take(1)[0]
