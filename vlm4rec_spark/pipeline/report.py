"""Report: one HTML page of what the tables hold."""

import hashlib
from pathlib import Path

from vlm4rec_spark import report as page
from vlm4rec_spark.pipeline.context import RunContext, StageResult


def report(context: RunContext, result: StageResult) -> None:
    path = page.write(context.tables, context.states(), context.config.report)
    result.details = {"path": str(path.resolve())}


def inputs_fingerprint(context: RunContext) -> object:
    """The last good run of every other stage, and the page as it is.

    `state` has these runs, so no job reads `runs`.
    """
    settings = context.config.report
    states = context.states()
    run_ids = {stage: state.run_id for stage, state in states.items() if stage != "report"}
    path = Path(settings.path)
    written = "none"
    if path.is_file():
        written = hashlib.sha256(path.read_bytes()).hexdigest()
    return [settings.model_dump(mode="json"), run_ids, written]
