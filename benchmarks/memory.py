"""Memory of a Spark driver on this machine, of its Python workers with the models' processes, and of any process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

GB = 1e9


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peak resident memory in GB while the body runs.

    driver_gb: this Python and its JVM together; worker_gb: the largest Python worker with its model's process.
    """
    peak, stop = {"driver_gb": 0.0, "worker_gb": 0.0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.3):
            driver, workers = _now()
            peak["driver_gb"] = max(peak["driver_gb"], driver / GB)
            peak["worker_gb"] = max(peak["worker_gb"], max(workers, default=0) / GB)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def held_gb(pid: int) -> float:
    """What a process and all below it hold now, in GB: memory that several of them share counts once."""
    held = 0
    with suppress(psutil.Error):  # it has ended
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                held += one.memory_full_info().pss
    return held / GB


def _now() -> tuple[int, list[int]]:
    me, workers = psutil.Process(), dict[int, int]()
    driver = me.memory_info().rss
    for one in me.children(recursive=True):
        try:
            words, size, parent = " ".join(one.cmdline()), one.memory_info().rss, one.ppid()
        except psutil.Error:  # it has ended
            continue
        if "vlm4rec_spark.models.captioning.child" in words:
            workers[parent] = workers.get(parent, 0) + size
        elif "pyspark.daemon" in words:
            workers[one.pid] = workers.get(one.pid, 0) + size
        else:
            driver += size
    return driver, list(workers.values())
