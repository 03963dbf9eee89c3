"""Shows the progress of a running Spark job: rows done, rate, time left.

Knows Spark's status tracker and the terminal.
"""

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
            _bar(_measurements(measure, _POLL_SECONDS, stop), console, f"  {label}", rows)
        else:
            _lines(_measurements(measure, _LINE_SECONDS, stop), say, label, rows)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _measurements(
    measure: Progressed,
    seconds: float,
    stop: threading.Event,
) -> Iterator[tuple[float, str, float]]:
    """Rows done, further text and rows per second, every so many seconds until the stop."""
    started = time.monotonic()
    completed = 0.0
    while not stop.wait(seconds):
        measured, text = measure()
        completed = max(completed, measured)
        yield completed, text, completed / (time.monotonic() - started)


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
    measurements: Iterator[tuple[float, str, float]],
    console: Console,
    label: str,
    rows: int,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=rows, rate="")
        for completed, text, rate in measurements:
            if completed:
                text = f"{_per_second(rate)}  {text}"
            progress.update(task, completed=completed, rate=text)


def _lines(
    measurements: Iterator[tuple[float, str, float]],
    say: Callable[[str], None],
    label: str,
    rows: int,
) -> None:
    for completed, text, rate in measurements:
        if completed:
            seconds = (rows - completed) / rate
            line = (
                f"{label}: {completed:,.0f} of {rows:,}, {_per_second(rate)}, {seconds:,.0f} s left"
            )
            say(f"{line}, {text}" if text else line)


def _per_second(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
