"""The table `state`: what each stage did last, as records that later runs read back.

Knows the columns and their types; knows no stage.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pyspark.sql import Row
from pyspark.sql import functions as F

from vlm4rec_spark.storage.schemas import LAYOUT, STATE
from vlm4rec_spark.storage.tables import Tables


class TriedEffort(NamedTuple):
    """An effort of the approximate search, and the recall@k and speed measured with it."""

    leaves: int
    candidates: int
    recall: float
    low: float
    lists_per_second: float


class CalibrationState(NamedTuple):
    """The search that recommend chose; without `leaves` and `candidates` it is exact.

    `recall` was measured on `users` profiles, `low` is its lower 95 % bound.
    """

    target_recall: float
    leaves: int | None
    candidates: int | None
    recall: float
    low: float
    users: int
    exact_lists_per_second: float | None
    tried: tuple[TriedEffort, ...]

    @property
    def chosen(self) -> TriedEffort | None:
        """The measurements of the chosen effort; None for exact search."""
        for effort in self.tried:
            if (effort.leaves, effort.candidates) == (self.leaves, self.candidates):
                return effort
        return None


class ProfilesState(NamedTuple):
    """What an incremental run of profiles compares. A version is None where there was no table."""

    settings_sha256: str
    embeddings_version: int | None
    profiles_version: int | None


class StageOutput(NamedTuple):
    """What a stage leaves for later runs to read back."""

    representation: str | None = None
    index_id: str | None = None
    calibration: CalibrationState | None = None
    profiles: ProfilesState | None = None
    evaluation: dict[str, Any] | None = None


class StageState(NamedTuple):
    """A row of `state`. No `fingerprint`: the next run has more to do though nothing changes."""

    stage: str
    fingerprint: str | None
    versions: Mapping[str, int]
    output: StageOutput
    run_id: str
    updated_at: datetime


def read(tables: Tables) -> dict[str, StageState]:
    """The rows by stage."""
    # Microseconds, because collecting a timestamp would turn it into this machine's time zone.
    rows = tables.read(STATE).withColumn("updated_at", F.unix_micros("updated_at")).collect()
    return {row["stage"]: _state(row) for row in rows}


def write(tables: Tables, states: Iterable[StageState]) -> None:
    """Make these the rows of the table. They fit one file, which is cheaper than a MERGE."""
    rows = [
        (
            state.stage,
            LAYOUT,
            state.fingerprint,
            dict(state.versions),
            *state.output,
            state.run_id,
            state.updated_at,
        )
        for state in states
    ]
    tables.replace(STATE, tables.spark.createDataFrame(rows, STATE.schema).coalesce(1))


def _state(row: Row) -> StageState:
    calibration = row["calibration"] and _calibration(row["calibration"])
    profiles = row["profiles"] and ProfilesState(*row["profiles"])
    evaluation = row["evaluation"] and row["evaluation"].asDict(recursive=True)
    return StageState(
        row["stage"],
        row["fingerprint"],
        row["versions"],
        StageOutput(row["representation"], row["index_id"], calibration, profiles, evaluation),
        row["run_id"],
        datetime.fromtimestamp(row["updated_at"] / 1e6, UTC),
    )


def _calibration(row: Row) -> CalibrationState:
    tried = tuple(TriedEffort(*effort) for effort in row["tried"])
    return CalibrationState(**row.asDict() | {"tried": tried})
