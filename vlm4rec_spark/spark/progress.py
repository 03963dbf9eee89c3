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


HowFar = Callable[[], tuple[float, str]]
"""Rows done, and what else there is to say."""


@contextmanager
def watch(
    spark: SparkSession,
    console: Console | None,
    say: Callable[[str], None],
    label: str,
    rows: int,
    how_far: HowFar | None = None,
) -> Iterator[None]:
    """While the body's Spark job runs, show `label` and how many of its `rows` are done: finished tasks, or `how_far`.

    A bar on a console that is a terminal, else a line now and then.
    """
    stop = threading.Event()
    ask = how_far or (lambda: (rows * _done_share(spark), ""))
    if console is not None and console.is_terminal:
        thread = threading.Thread(
            target=_bar, args=(ask, console, f"  {label}", rows, stop), daemon=True
        )
    else:
        thread = threading.Thread(target=_lines, args=(ask, say, label, rows, stop), daemon=True)
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


def _bar(ask: HowFar, console: Console, label: str, rows: int, stop: threading.Event) -> None:
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
            found, more = ask()
            done = max(progress.tasks[task].completed, found)
            rate = f"{_rate(done / (time.monotonic() - started))}  {more}" if done else more
            progress.update(task, completed=done, rate=rate)


def _lines(
    ask: HowFar, say: Callable[[str], None], label: str, rows: int, stop: threading.Event
) -> None:
    started, furthest = time.monotonic(), 0.0
    while not stop.wait(_LINE_SECONDS):
        found, more = ask()
        furthest = max(furthest, found)
        if furthest:
            rate = furthest / (time.monotonic() - started)
            left = (rows - furthest) / rate
            said = f"{label}: {furthest:,.0f} of {rows:,}, {_rate(rate)}, {left:,.0f} s left"
            say(f"{said}, {more}" if more else said)


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
