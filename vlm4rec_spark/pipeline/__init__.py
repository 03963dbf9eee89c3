"""The wiring: for each stage, read tables, call the stage, write tables, record the run.

Only this folder sees both ends of every stage. Knows the order of the stages; knows no terminal.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from pyspark.sql import SparkSession

from vlm4rec_spark import __version__
from vlm4rec_spark.caption.estimate import CaptionPlan
from vlm4rec_spark.config import Config
from vlm4rec_spark.evaluation.tune import Metric, Tuned
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.pipeline import (
    caption,
    embed,
    evaluate,
    import_captions,
    index,
    ingest,
    maintain,
    profiles,
    publish,
    recommend,
    report,
)
from vlm4rec_spark.pipeline.context import Reporter, RunContext, StageResult
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.storage import layout, schemas
from vlm4rec_spark.storage.lease import Lease
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.tables import Tables

__all__ = ["STAGES", "Pipeline", "Reporter", "StageResult"]


@dataclass(frozen=True)
class Stage:
    """A stage's work, and all that its result depends on.

    A stage has nothing to do while its fingerprint is that of its last good run. The fingerprint
    covers the versions of the tables that it reads and writes, and `inputs_fingerprint`: settings,
    files and models, as JSON. That one is None when it can't be known.
    """

    work: Callable[[RunContext, StageResult], None]
    inputs_fingerprint: Callable[[RunContext], object]
    reads: tuple[Table, ...]
    writes: tuple[Table, ...]


_TEXTS = (schemas.ITEMS, schemas.CAPTIONS, schemas.ITEM_CAPTIONS)
_STAGES = {
    "ingest": Stage(
        ingest.ingest,
        ingest.inputs_fingerprint,
        reads=(),
        writes=(
            schemas.ITEMS,
            schemas.PHOTOS,
            schemas.INTERACTIONS,
            schemas.USERS,
            schemas.IDENTITIES,
            schemas.REJECTED,
            schemas.INGESTED_FILES,
        ),
    ),
    "caption": Stage(
        caption.caption,
        caption.inputs_fingerprint,
        reads=(schemas.PHOTOS,),
        writes=(schemas.CAPTIONS, schemas.ITEM_CAPTIONS),
    ),
    "embed": Stage(
        embed.embed,
        embed.inputs_fingerprint,
        reads=(*_TEXTS, schemas.PHOTOS),
        writes=(schemas.EMBEDDINGS,),
    ),
    # Profiles take their vectors from the index artifact, so the index comes first.
    "index": Stage(
        index.index,
        index.inputs_fingerprint,
        reads=(*_TEXTS, schemas.EMBEDDINGS),
        writes=(),
    ),
    "profiles": Stage(
        profiles.profiles,
        profiles.inputs_fingerprint,
        reads=(schemas.INTERACTIONS, schemas.IDENTITIES, schemas.ITEMS),
        writes=(schemas.PROFILES,),
    ),
    "recommend": Stage(
        recommend.recommend,
        recommend.inputs_fingerprint,
        reads=(
            schemas.PROFILES,
            schemas.ITEMS,
            schemas.PHOTOS,
            schemas.INTERACTIONS,
            schemas.IDENTITIES,
            schemas.USERS,
        ),
        writes=(schemas.RECOMMENDATIONS,),
    ),
    "publish": Stage(
        publish.publish,
        publish.inputs_fingerprint,
        reads=(schemas.RECOMMENDATIONS, schemas.ITEMS),
        writes=(schemas.EXPORT_LONG, schemas.EXPORT_WIDE),
    ),
    "evaluate": Stage(
        evaluate.evaluate,
        evaluate.inputs_fingerprint,
        reads=(
            schemas.INTERACTIONS,
            schemas.IDENTITIES,
            schemas.USERS,
            schemas.EMBEDDINGS,
            *_TEXTS,
            schemas.PHOTOS,
        ),
        writes=(schemas.METRICS,),
    ),
    "report": Stage(
        report.report,
        report.inputs_fingerprint,
        # Every run writes to runs and state, also one with nothing to do.
        reads=tuple(
            table for table in schemas.TABLES.values() if table not in (schemas.RUNS, schemas.STATE)
        ),
        writes=(),
    ),
}
STAGES = tuple(_STAGES)
"""In the order of `run`."""


class Pipeline:
    """Runs stages, each checked before and recorded after, one driver at a time."""

    def __init__(
        self,
        spark: SparkSession,
        config: Config,
        reporter: Reporter,
    ):
        self.context = RunContext(spark, config, reporter)
        self._unwritten: list[tuple] = []
        """Rows of `runs` about unchanged stages: the next row that is written takes them along."""

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
        self,
        stages: Sequence[str],
        on_result: Callable[[StageResult], None] = lambda result: None,
    ) -> list[StageResult]:
        """Check what can be checked before any work, then run and record the stages in order.

        `on_result` is called with each result. Raises Busy when another run works on these tables.
        """
        self.context.begin()
        self.check(stages)
        results = []
        with self.lease() as lease:
            try:
                for name in stages:
                    work = partial(self._work, _STAGES[name])
                    results.append(self._recorded(StageResult(name), lease, work))
                    on_result(results[-1])
            finally:
                if not lease.lost:
                    self._write_runs()
                    self.context.write_state()
        return results

    def check(self, stages: Sequence[str]) -> None:
        """Raise UsageError or RunError for a wrong set-up, with no table touched."""
        if "caption" in stages:
            load_prompt(self.config.caption.prompt, self.config.caption.language)
            self.config.caption.model.model_id()
        if {"embed", "index", "evaluate"} & set(stages):
            self.context.encoder_id()
            self.context.vision_id()
        if "recommend" in stages:
            recommend.check(self.context)
        layout.check(self.tables)
        if "ingest" in stages and not self._unchanged("ingest"):
            ingest.open_sources(self.context)

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Hold the tables: no other run works on them, and what a killed one left is removed."""
        seconds = self.config.lease_seconds
        with Lease(self.tables, self.run_id, seconds, self.context.reporter.info) as lease:
            self.tables.clear_staging()
            self.context.forget()  # another run may have ended while this one waited
            yield lease

    def import_captions(self, source: Source) -> StageResult:
        """Take captions from elsewhere: texts by item_id, or a captions table."""
        self.context.begin()
        layout.check(self.tables)
        work = partial(import_captions.import_captions, self.context, source=source)
        with self.lease() as lease:
            return self._recorded(StageResult("import_captions"), lease, work)

    def plan(self) -> CaptionPlan:
        """What the caption stage would do now, and its cost. Changes nothing, takes no lease."""
        self.context.begin()
        self.check(["caption"])
        return caption.plan_captions(self.context)

    def tune(self, representations: Sequence[str], metric: Metric) -> Tuned:
        """Choose settings on a validation cut. Changes nothing and takes no lease."""
        self.context.begin()
        self.check(["evaluate"])
        return evaluate.tune(self.context, representations, metric)

    def maintain(self) -> StageResult:
        """Join small files; delete old ones, old indexes and what killed runs left."""
        self.context.begin()
        maintain.check(self.context)
        work = partial(maintain.maintain, self.context)
        with self.lease() as lease:
            return self._recorded(StageResult("maintain"), lease, work)

    def _work(self, stage: Stage, result: StageResult) -> None:
        """Do the stage's work, unless its fingerprint is that of its last good run."""
        inputs = [table for table in stage.reads if table not in stage.writes]
        read_versions = self.tables.versions(inputs)
        result.versions = read_versions | self.tables.versions(stage.writes)
        last = self.context.states().get(result.stage)
        fingerprint = self._fingerprint(result.stage, result.versions)
        if last and fingerprint and last.fingerprint == fingerprint:
            result.status = "unchanged"
            result.details = {"unchanged_since": last.run_id}
            return
        stage.work(self.context, result)
        if result.complete:
            # Again, because the stage itself makes some of it: its tables, the index, the page.
            versions = read_versions | self.tables.versions(stage.writes)
            result.fingerprint = self._fingerprint(result.stage, versions)

    def _unchanged(self, name: str) -> bool:
        stage = _STAGES[name]
        last = self.context.states().get(name)
        if last is None or last.fingerprint is None:
            return False
        versions = self.tables.versions({*stage.reads, *stage.writes})
        return last.fingerprint == self._fingerprint(name, versions)

    def _fingerprint(self, name: str, versions: dict[str, int]) -> str | None:
        """SHA-256 of all that the stage's result depends on; None when that can't be known."""
        inputs = _STAGES[name].inputs_fingerprint(self.context)
        if inputs is None:
            return None
        content = json.dumps([__version__, name, versions, inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _recorded(
        self,
        result: StageResult,
        lease: Lease,
        work: Callable[[StageResult], None],
    ) -> StageResult:
        """Do the work of a stage, or something like one, and record it."""
        started_at = datetime.now(UTC)
        clock = time.monotonic()
        self.context.reporter.stage(self.run_id, result.stage)
        try:
            lease.check()
            work(result)
            lease.check()
            result.status = result.status or "ok"
        finally:
            result.seconds = time.monotonic() - clock
            # A stage that failed before it made anything leaves the tables as they were.
            if result.status or (result.rows_in and not lease.lost):
                self._record(result, started_at)
        return result

    def _record(self, result: StageResult, started_at: datetime) -> None:
        """Append to `runs`, then write `state`: killed in between, the stage runs again."""
        # The section `spark` is left out: its conf may hold a secret.
        config = self.config.model_dump_json(exclude={"spark"})
        row = (
            self.run_id,
            result.stage,
            result.status or "failed",
            result.rows_in,
            result.ok,
            result.failed,
            result.skipped,
            result.versions,
            config,
            started_at,
            result.seconds,
            result.device_seconds,
            result.details,
        )
        self._unwritten.append(row)
        if result.status == "unchanged":
            return
        self._write_runs()
        if result.status == "ok" and result.stage in _STAGES:
            self.context.keep_state(result)

    def _write_runs(self) -> None:
        if self._unwritten:
            rows = self.spark.createDataFrame(self._unwritten, schemas.RUNS.schema).coalesce(1)
            self.tables.append(schemas.RUNS, rows)
            self._unwritten.clear()
