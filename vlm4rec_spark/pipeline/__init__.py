"""The wiring: for each stage, read tables, call the stage, write tables, record the run.

Only this folder sees both ends of every stage. Knows the order of the stages; knows no terminal.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark import __version__
from vlm4rec_spark.caption.estimate import CaptionPlan
from vlm4rec_spark.config import Config
from vlm4rec_spark.evaluation.tune import Metric, Tuned
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.pipeline import (
    caption,
    embed,
    evaluate,
    index,
    ingest,
    maintain,
    profiles,
    publish,
    recommend,
    report,
)
from vlm4rec_spark.pipeline.context import Reporter, RunContext, StageResult
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.lease import Lease
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.tables import Tables

__all__ = ["STAGES", "Pipeline", "Reporter", "StageResult"]


@dataclass(frozen=True)
class Stage:
    """A stage's work, and all that its result depends on.

    A stage whose state is still that of its last good run has nothing to do. The state is made of the versions of the
    tables that it reads and writes, and of `beside`: settings, files and models, as JSON; None when it can't be known.
    """

    work: Callable[[RunContext, StageResult], None]
    reads: tuple[Table, ...]
    writes: tuple[Table, ...]
    inputs_fingerprint: Callable[[RunContext], object]


_TEXTS = (schemas.ITEMS, schemas.CAPTIONS, schemas.ITEM_CAPTIONS)
_STAGES = {
    "ingest": Stage(
        ingest.ingest,
        (),
        (
            schemas.ITEMS,
            schemas.PHOTOS,
            schemas.INTERACTIONS,
            schemas.USERS,
            schemas.IDENTITIES,
            schemas.REJECTED,
            schemas.FILES,
        ),
        ingest.inputs_fingerprint,
    ),
    "caption": Stage(
        caption.caption,
        (schemas.PHOTOS,),
        (schemas.CAPTIONS, schemas.ITEM_CAPTIONS),
        caption.inputs_fingerprint,
    ),
    "embed": Stage(
        embed.embed, (*_TEXTS, schemas.PHOTOS), (schemas.EMBEDDINGS,), embed.inputs_fingerprint
    ),
    # Profiles take their vectors from the index artefact, so the index comes first.
    "index": Stage(index.index, (*_TEXTS, schemas.EMBEDDINGS), (), index.inputs_fingerprint),
    "profiles": Stage(
        profiles.profiles,
        (schemas.INTERACTIONS, schemas.IDENTITIES, schemas.ITEMS),
        (schemas.PROFILES,),
        profiles.inputs_fingerprint,
    ),
    "recommend": Stage(
        recommend.recommend,
        (
            schemas.PROFILES,
            schemas.ITEMS,
            schemas.PHOTOS,
            schemas.INTERACTIONS,
            schemas.IDENTITIES,
            schemas.USERS,
        ),
        (schemas.RECOMMENDATIONS,),
        recommend.inputs_fingerprint,
    ),
    "publish": Stage(
        publish.publish,
        (schemas.RECOMMENDATIONS, schemas.ITEMS),
        (schemas.EXPORT_LONG, schemas.EXPORT_WIDE),
        publish.inputs_fingerprint,
    ),
    "evaluate": Stage(
        evaluate.evaluate,
        (
            schemas.INTERACTIONS,
            schemas.IDENTITIES,
            schemas.USERS,
            schemas.EMBEDDINGS,
            *_TEXTS,
            schemas.PHOTOS,
        ),
        (schemas.METRICS,),
        evaluate.inputs_fingerprint,
    ),
    "report": Stage(
        report.report,
        tuple(table for table in schemas.TABLES.values() if table is not schemas.RUNS),
        (),
        report.inputs_fingerprint,
    ),
}
STAGES = tuple(_STAGES)
"""In the order of `run`."""


class Pipeline:
    """Runs stages, each checked before and recorded after, one driver at a time."""

    def __init__(self, spark: SparkSession, config: Config, reporter: Reporter):
        self.context = RunContext(spark, config, reporter)

    @property
    def spark(self) -> SparkSession:
        return self.context.spark

    @property
    def config(self) -> Config:
        return self.context.config

    @property
    def tables(self) -> Tables:
        return self.context.tables

    @property
    def run_id(self) -> str:
        """Of the latest run; empty before the first."""
        return self.context.run_id

    def run(
        self, stages: Sequence[str], done: Callable[[StageResult], None] = lambda result: None
    ) -> list[StageResult]:
        """Check what can be checked before any work, then run the stages in order, each recorded as it ends.

        `done` hears of each. Raises Busy when another run is at work on these tables.
        """
        self.context.begin()
        self.check(stages)
        outcomes = []
        with self.lease() as lease:
            last = self.last_good()
            for stage in stages:
                work = partial(self._work, _STAGES[stage], last.get(stage))
                outcomes.append(self._recorded(StageResult(stage), lease, work))
                done(outcomes[-1])
        return outcomes

    def check(self, stages: Sequence[str]) -> None:
        """Raise UsageError or RunError for a wrong set-up, with no table touched."""
        if "caption" in stages:
            load_prompt(self.context.config.caption.prompt, self.context.config.caption.language)
            self.context.config.caption.model.model_id()
        if {"embed", "index", "evaluate"} & set(stages):
            self.context.encoder_id()
            self.context.vision_id()
        if "recommend" in stages:
            recommend.check(self.context)
        self.context.tables.prepare()
        if "ingest" in stages and not self._unchanged("ingest"):
            ingest.raw_sources(self.context)

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Hold the tables, made ready: no other run works on them, and what a killed one left is gone."""
        with Lease(
            self.context.tables,
            self.context.run_id,
            self.context.config.lease_seconds,
            self.context.reporter.info,
        ) as lease:
            self.context.tables.clear_staging()
            self.context.tables.forget()  # another run may have ended while this one waited
            yield lease

    def import_captions(self, source: Source) -> StageResult:
        """Take descriptions from elsewhere: rows of item_id and text stand in for the caption stage."""
        self.context.begin()
        raw = reader.read(self.context.spark, "import-captions", source)
        self.context.tables.prepare()
        with self.lease() as lease:
            return self._recorded(
                StageResult("import_captions"),
                lease,
                partial(ingest.import_captions, raw, self.context),
            )

    def plan(self) -> CaptionPlan:
        """What the caption stage would do now, and what that costs. Changes nothing and holds nobody up."""
        self.context.begin()
        self.check(["caption"])
        return caption.plan_captions(self.context)

    def tune(self, representations: Sequence[str], metric: Metric) -> Tuned:
        """Settings chosen on a validation cut, of these representations. Changes nothing and holds nobody up."""
        self.context.begin()
        self.check(["evaluate"])
        return evaluate.tune(self.context, representations, metric)

    def maintain(self) -> StageResult:
        """Join small files, delete old ones, and clear what killed runs left. Changes no row."""
        self.context.begin()
        maintain.check(self.context)
        with self.lease() as lease:
            return self._recorded(
                StageResult("maintain"), lease, partial(maintain.maintain, self.context)
            )

    def _work(self, stage: Stage, last: Row | None, result: StageResult) -> None:
        read = self.context.tables.versions(
            [table for table in stage.reads if table not in stage.writes]
        )
        result.versions = read | self.context.tables.versions(stage.writes)
        result.state = _state(result.stage, result.versions, stage.inputs_fingerprint(self.context))
        if last and result.state and last["state"] == result.state:
            result.status, result.details = "unchanged", {"unchanged_since": last["run_id"]}
            return
        stage.work(self.context, result)
        # What it depends on besides may be made by the stage itself: the index folder, the report's page.
        beside = stage.inputs_fingerprint(self.context) if result.complete else None
        result.state = _state(
            result.stage, read | self.context.tables.versions(stage.writes), beside
        )

    def _unchanged(self, name: str) -> bool:
        stage, last = _STAGES[name], self.last_good().get(name)
        if last is None:
            return False
        versions = self.context.tables.versions({*stage.reads, *stage.writes})
        return last["state"] is not None and last["state"] == _state(
            name, versions, stage.inputs_fingerprint(self.context)
        )

    def last_good(self) -> dict[str, Row]:
        """By stage, run_id and state of the last run that had something to do and ended well."""
        good = (
            self.context.tables.read(schemas.RUNS).where(F.col("status") == "ok").groupBy("stage")
        )
        last = F.max_by(F.struct("run_id", "state"), F.struct("started_at", "run_id")).alias("last")
        return {row["stage"]: row["last"] for row in good.agg(last).collect()}

    def _recorded(
        self, result: StageResult, lease: Lease, work: Callable[[StageResult], None]
    ) -> StageResult:
        """Do the work of a stage, or something like one, and record it."""
        started, clock = datetime.now(UTC), time.monotonic()
        self.context.reporter.stage(self.context.run_id, result.stage)
        try:
            lease.check()
            work(result)
            lease.check()
            result.status = result.status or "ok"
        finally:
            result.seconds = time.monotonic() - clock
            # A stage that failed before it made anything leaves the tables as they were.
            if result.status or (result.rows_in and not lease.lost):
                self._record(result, started)
        return result

    def _record(self, result: StageResult, started: datetime) -> None:
        # The section `spark` stays out: its conf may hold a secret.
        config = self.context.config.model_dump_json(exclude={"spark"})
        row = (
            self.context.run_id,
            result.stage,
            result.status or "failed",
            result.rows_in,
            result.ok,
            result.failed,
            result.skipped,
            result.versions,
            config,
            started,
            result.seconds,
            result.device_seconds,
            result.details,
            result.state if result.status else None,
        )
        self.context.tables.append(
            schemas.RUNS, self.context.spark.createDataFrame([row], schemas.RUNS.schema)
        )


def _state(stage: str, versions: dict[str, int], beside: object) -> str | None:
    if beside is None:
        return None
    content = json.dumps([__version__, stage, versions, beside], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
