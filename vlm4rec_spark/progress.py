"""Shows how far a running Spark job is: rows done, rate, time left. Knows Spark's status tracker and the terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_POLL_SECONDS = 0.5
_LINE_SECONDS = 30
"""Where no terminal is, a scheduler's log gets a line this often instead of a bar."""


@contextmanager
def watch(
    spark: SparkSession, console: Console | None, say: Callable[[str], None], label: str, rows: int
) -> Iterator[None]:
    """While the body's Spark job runs, show `label` and how many of its `rows` are done, by finished tasks.

    A bar on a console that is a terminal, else a line now and then.
    """
    stop = threading.Event()
    if console is not None and console.is_terminal:
        thread = threading.Thread(target=_bar, args=(spark, console, f"  {label}", rows, stop), daemon=True)
    else:
        thread = threading.Thread(target=_lines, args=(spark, say, label, rows, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _done_share(spark: SparkSession) -> float:
    """Share of tasks done in the widest stage that runs now."""
    tracker = spark.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
    done = [(stage.numTasks, stage.numCompletedTasks) for stage in stages if stage is not None]
    tasks, completed = max(done, default=(0, 0))
    return completed / tasks if tasks else 0.0


def _bar(spark: SparkSession, console: Console, label: str, rows: int, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=rows, rate="")
        while not stop.wait(_POLL_SECONDS):
            done = max(progress.tasks[task].completed, rows * _done_share(spark))
            rate = f"{done / (time.monotonic() - started):,.0f}/s" if done else ""
            progress.update(task, completed=done, rate=rate)


def _lines(spark: SparkSession, say: Callable[[str], None], label: str, rows: int, stop: threading.Event) -> None:
    started, furthest = time.monotonic(), 0.0
    while not stop.wait(_LINE_SECONDS):
        furthest = max(furthest, rows * _done_share(spark))
        if furthest:
            rate = furthest / (time.monotonic() - started)
            left = (rows - furthest) / rate
            say(f"{label}: {furthest:,.0f} of {rows:,}, {rate:,.0f}/s, {left:,.0f} s left")
