"""Shows the progress of a running Spark job: rows done, rate, time left.

Knows Spark's status tracker and the terminal.
"""

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
"""Without a terminal, the log gets a line this often instead of a bar."""


Progressed = Callable[[], tuple[float, str]]
"""Returns the rows done so far, and a further text to show."""


@contextmanager
def watch(
    spark: SparkSession,
    console: Console | None,
    say: Callable[[str], None],
    label: str,
    rows: int,
    progressed: Progressed | None = None,
) -> Iterator[None]:
    """While the body's Spark job runs, show `label` and how many of its `rows` are done.

    A bar if the console is a terminal, else a line now and then. Rows done are those that
    `progressed` returns; without it they are estimated by finished tasks.
    """
    stop = threading.Event()
    measure = progressed or (lambda: (rows * _done_share(spark), ""))

    def show() -> None:
        if console is not None and console.is_terminal:
            _bar(measure, console, f"  {label}", rows, stop)
        else:
            _lines(measure, say, label, rows, stop)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _done_share(spark: SparkSession) -> float:
    """Share of tasks done in the running stage with the most tasks."""
    tracker = spark.sparkContext.statusTracker()
    infos = map(tracker.getStageInfo, tracker.getActiveStageIds())
    stages = [info for info in infos if info is not None and info.numTasks]
    if not stages:
        return 0.0
    largest = max(stages, key=lambda info: (info.numTasks, info.numCompletedTasks))
    return largest.numCompletedTasks / largest.numTasks


def _bar(
    measure: Progressed, console: Console, label: str, rows: int, stop: threading.Event
) -> None:
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
            measured, text = measure()
            completed = max(progress.tasks[task].completed, measured)
            if completed:
                text = f"{_per_second(completed / (time.monotonic() - started))}  {text}"
            progress.update(task, completed=completed, rate=text)


def _lines(
    measure: Progressed,
    say: Callable[[str], None],
    label: str,
    rows: int,
    stop: threading.Event,
) -> None:
    started = time.monotonic()
    completed = 0.0
    while not stop.wait(_LINE_SECONDS):
        measured, text = measure()
        completed = max(completed, measured)
        if completed:
            rate = completed / (time.monotonic() - started)
            seconds = (rows - completed) / rate
            line = (
                f"{label}: {completed:,.0f} of {rows:,}, {_per_second(rate)}, {seconds:,.0f} s left"
            )
            say(f"{line}, {text}" if text else line)


def _per_second(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
