"""What every stage of a run uses: session, config, tables, reporter, and a record of its result."""

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from pyspark.sql import DataFrame, Row, SparkSession

from vlm4rec_spark.config import Config
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.encoding import text_encoder, vision_encoder
from vlm4rec_spark.spark.shipping import Artifact, ship
from vlm4rec_spark.stages import profiles
from vlm4rec_spark.storage import schemas, state
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.state import StageOutput, StageState
from vlm4rec_spark.storage.tables import Tables

T = TypeVar("T")
_STATE_SECONDS = 60
"""A run that is killed does again what it did in this time; quick stages share one write."""


@dataclass
class StageResult:
    """What a stage did, as `runs` records it; rows in = ok + failed + skipped.

    `status` is empty until the stage has ended well. `output` is what later runs read back.
    """

    stage: str
    status: str = ""
    complete: bool = True
    """False: the next run has more to do though nothing changes, and runs the stage again."""
    fingerprint: str | None = None
    """Of all that a good result depends on; None when it isn't complete."""
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    device_seconds: float | None = None
    details: dict[str, str] = field(default_factory=dict)
    """Figures for people; those of a group have a dot in their names, such as items.rejected."""
    versions: dict[str, int] = field(default_factory=dict)
    output: StageOutput = field(default_factory=StageOutput)
    seconds: float = 0.0

    @property
    def rows_in(self) -> int:
        return self.ok + self.failed + self.skipped


@dataclass(frozen=True)
class Reporter:
    """Where a run's messages go.

    - `stage(run_id, stage)`: a stage begins.
    - `info(line)`: one line of text.
    - `progress(label, rows)`: a context around a long Spark job. A third argument returns the rows
      done and a text; without it, finished tasks are counted.
    """

    stage: Callable[[str, str], None]
    info: Callable[[str], None]
    progress: Callable[..., AbstractContextManager[None]]


class RunContext:
    """Runs of one configuration on one Spark session, one after another."""

    def __init__(
        self,
        spark: SparkSession,
        config: Config,
        reporter: Reporter,
    ):
        self.spark = spark
        self.config = config
        self.reporter = reporter
        self.tables = Tables(spark, config.tables)
        self.run_id = ""
        self.retry: str | None = None
        """Failed captions to try again: an error class, or "" for all of them."""
        self.built_index_id: str | None = None
        """The index that this run has built; `state` has it only after the stage's end."""
        self._states: dict[str, StageState] | None = None
        self._unwritten_state = False
        self._state_written_at = time.monotonic()
        self._once: dict[str, Any] = {}

    def begin(self) -> None:
        """Start another run, with an id of its own."""
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
        self.built_index_id = None
        self._once.clear()
        self.forget()
        self.reporter.stage(self.run_id, "start")

    def forget(self) -> None:
        """Look up state and versions again: another run may have written since."""
        self.tables.forget()
        self._states = None
        self._unwritten_state = False

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned when it was called for this name, once in a run."""
        if name not in self._once:
            self._once[name] = make()
        return cast(T, self._once[name])

    def states(self) -> dict[str, StageState]:
        """By stage what its last good run left."""
        if self._states is None:
            self._states = state.read(self.tables)
        return self._states

    def keep_state(self, result: StageResult) -> None:
        """Put what a good run left into `state`, at once or with the next stages' rows."""
        row = StageState(
            result.stage,
            result.fingerprint,
            result.versions,
            result.output,
            self.run_id,
            datetime.now(UTC),
        )
        self._states = self.states() | {row.stage: row}
        self._unwritten_state = True
        if time.monotonic() - self._state_written_at > _STATE_SECONDS:
            self.write_state()

    def write_state(self) -> None:
        """Write the table `state` if it isn't what this run knows."""
        if self._unwritten_state:
            state.write(self.tables, self.states().values())
            self._unwritten_state = False
            self._state_written_at = time.monotonic()

    def read(self, table: Table) -> DataFrame:
        """A table that an earlier stage made. Raises RunError when it doesn't exist."""
        if not self.tables.exists(table):
            raise RunError(
                f"The table {self.tables.name_of(table)} isn't there yet. Run the stage that "
                "makes it, or `vlm4rec run` for all."
            )
        return self.tables.read(table)

    def log(self) -> DataFrame:
        """The interactions; events of an anonymous id count as those of its user."""
        return self.identified(self.read(schemas.INTERACTIONS))

    def identified(self, events: DataFrame) -> DataFrame:
        """Rows of interactions, with anonymous ids replaced by their users."""
        if not self.tables.exists(schemas.IDENTITIES):
            return events
        return profiles.identified(events, self.tables.read(schemas.IDENTITIES))

    def ship(self, folder: Path, opens: Callable[[Path], Artifact]) -> Callable[[], Artifact]:
        """A factory that opens the artifact in a worker."""
        return ship(self.spark, folder, self.config.index.broadcast_gb, opens)

    def reject(self, rows: DataFrame) -> None:
        self.tables.insert(schemas.REJECTED, rows)

    def encoder_id(self) -> str:
        settings = self.config.embed
        return text_encoder.encoder_id(settings.encoder, settings.revision)

    def vision_id(self) -> str | None:
        """None where no photos are embedded."""
        settings = self.config.embed
        if not settings.vision:
            return None
        return vision_encoder.vision_id(settings.vision, settings.vision_revision)


def grouped(group: str, figures: Mapping[str, object]) -> dict[str, str]:
    """Details of one group: `rejected` of `items` becomes `items.rejected`."""
    return {f"{group}.{name}": str(figure) for name, figure in figures.items()}


def first_row(rows: DataFrame) -> Row:
    """The first row, of rows that are known to have one."""
    return rows.take(1)[0]
