"""The wiring: for each stage, read tables, call the stage, write tables, record the run.

Only this folder sees both ends of every stage. Knows the order of the stages; knows no terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from vlm4rec_spark import schemas, sources
from vlm4rec_spark.models.prompts import load_prompt
from vlm4rec_spark.pipeline import describing, intake, judging, matching
from vlm4rec_spark.pipeline.run import Outcome, Run, Voice
from vlm4rec_spark.sources import Source

__all__ = ["STAGES", "Outcome", "Pipeline", "Voice"]

_WORK: dict[str, Callable[[Run, Outcome], None]] = {
    "ingest": intake.ingest,
    "caption": describing.caption,
    "embed": describing.embed,
    # Profiles take their vectors from the index artefact, so the index comes first.
    "index": matching.index,
    "profiles": matching.profiles,
    "recommend": matching.recommend,
    "evaluate": judging.evaluate,
    "export": judging.export,
    "report": judging.report,
}
STAGES = tuple(_WORK)
"""In the order of `run`."""


class Pipeline(Run):
    """Runs stages, each checked before and recorded after."""

    def run(self, stages: Sequence[str], done: Callable[[Outcome], None]) -> None:
        """Check what can be checked before any work, then run the stages in order, each recorded as it ends."""
        self.check(stages)
        for stage in stages:
            done(self.stage(stage))

    def check(self, stages: Sequence[str]) -> None:
        """Raise UsageError or RunError for a wrong set-up, with no table touched."""
        if "caption" in stages:
            load_prompt(self.config.caption.prompt)
            self.config.caption.model.model_id()
        if {"embed", "index", "evaluate"} & set(stages):
            self.encoder_id()
        self.tables.prepare()
        if "ingest" in stages:
            intake.raw_sources(self)

    def stage(self, name: str) -> Outcome:
        """Run one stage and record it."""
        return self._recorded(name, _WORK[name])

    def import_captions(self, source: Source) -> Outcome:
        """Take descriptions from elsewhere: rows of item_id and text stand in for the caption stage."""
        raw = sources.read(self.spark, "import-captions", source)
        self.tables.prepare()
        return self._recorded("import_captions", partial(intake.import_captions, raw))

    def _recorded(self, name: str, work: Callable[[Run, Outcome], None]) -> Outcome:
        outcome, started, clock = Outcome(name), datetime.now(UTC), time.monotonic()
        status = "failed"
        try:
            work(self, outcome)
            status = "ok"
        finally:
            outcome.seconds = time.monotonic() - clock
            # A stage that failed before it made anything leaves the tables as they were.
            if status == "ok" or outcome.rows_in:
                self._record(outcome, started, status)
        return outcome

    def _record(self, outcome: Outcome, started: datetime, status: str) -> None:
        # The section `spark` stays out: its conf may hold a secret.
        config = self.config.model_dump_json(exclude={"spark"})
        row = (
            self.run_id, outcome.stage, status, outcome.rows_in, outcome.ok, outcome.failed, outcome.skipped,
            outcome.versions, config, started, outcome.seconds, outcome.device_seconds, outcome.details,
        )  # fmt: skip
        self.tables.insert(schemas.RUNS, self.spark.createDataFrame([row], schemas.RUNS.schema))
