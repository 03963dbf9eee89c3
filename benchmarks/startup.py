"""How long a newcomer waits: the demo, a first and an unchanged run, and their Spark jobs.

    .venv/bin/python benchmarks/startup.py

Jobs are those that Spark's scheduler has started, in the local session as it is shipped.
- jobs_before_work: those of the unchanged run until its first stage starts.
- jobs_first, jobs_unchanged: all stages of a shop of 60 items, twice.
- unchanged_s: the second of these runs. Its session is warm, but knows no table any more.
- demo_s, demo_again_s: `vlm4rec demo` twice, whole processes. evaluate_s: that stage of the first.
- run_150_s: the first `vlm4rec run` on 150 items, a whole process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlm4rec_spark.config import load
from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.pipeline import STAGES, Pipeline, Reporter
from vlm4rec_spark.spark.session import SparkSettings, session

BOUNDS = {
    "jobs_first": 250,
    "jobs_unchanged": 20,
    "jobs_before_work": 5,
    "unchanged_s": 12,
    "demo_s": 120,
    "demo_again_s": 20,
    "evaluate_s": 60,
    "run_150_s": 60,
}
VLM4REC = Path(sys.executable).with_name("vlm4rec")


def settings(folder: Path, raw: Path) -> list[str]:
    """Of a shop drawn into `raw`, with all that is made in `folder`."""
    return [
        f"tables={folder / 'tables'}",
        f"index.folder={folder / 'index'}",
        f"report.path={folder / 'report.html'}",
        *catalogue.settings(raw),
    ]


@contextmanager
def timed(figures: dict[str, float], name: str) -> Iterator[None]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    figures[name] = round(time.monotonic() - started, 1)


def count_jobs(folder: Path, figures: dict[str, float]) -> None:
    """Two runs on 60 items in one session."""
    raw = folder / "raw"
    catalogue.write(raw, items=60, users=60)
    config = load([], settings(folder, raw))
    spark = session(SparkSettings())
    scheduler = spark.sparkContext._jsc.sc().dagScheduler()
    at_stage: list[int] = []

    def on_stage(run_id: str, stage: str) -> None:
        if stage in STAGES:
            at_stage.append(scheduler.numTotalJobs())

    reporter = Reporter(on_stage, lambda line: None, lambda *arguments: nullcontext())
    pipeline = Pipeline(spark, config, reporter)
    pipeline.run(STAGES)
    figures["jobs_first"] = scheduler.numTotalJobs()
    at_stage.clear()
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()
    with timed(figures, "unchanged_s"):
        pipeline.run(STAGES)
    figures["jobs_unchanged"] = scheduler.numTotalJobs() - figures["jobs_first"]
    figures["jobs_before_work"] = at_stage[0] - figures["jobs_first"]
    spark.stop()


def run(*arguments: str) -> str:
    """Run `vlm4rec`; returns its messages. Raises RuntimeError with them when it fails."""
    done = subprocess.run([VLM4REC, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vlm4rec {' '.join(arguments)}: {done.stderr[-3000:]}")
    return done.stderr


def main() -> None:
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vlm4rec-startup-") as temporary:
        folder = Path(temporary)
        with timed(figures, "demo_s"):
            messages = run("demo", "--out", str(folder / "demo"))
        figures["evaluate_s"] = float(re.findall(r"evaluate: done, ([\d.]+) s", messages)[0])
        with timed(figures, "demo_again_s"):
            run("demo", "--out", str(folder / "demo"))
        shop = folder / "shop"
        catalogue.write(shop / "raw", items=150, users=150)
        sets = [part for line in settings(shop, shop / "raw") for part in ("--set", line)]
        with timed(figures, "run_150_s"):
            run("run", *sets)
        count_jobs(folder / "jobs", figures)
    table = Table("figure", "value", "at most", title="What a newcomer waits for")
    for name, bound in BOUNDS.items():
        table.add_row(name, f"{figures[name]:g}", f"{bound}")
    Console().print(table)
    print(json.dumps({name: figures[name] for name in BOUNDS}))


if __name__ == "__main__":
    main()
