"""Memory of a Spark driver on this machine, of its Python workers, and of any process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import psutil

GB = 1e9


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peak resident memory in GB while the body runs.

    driver_gb: this Python and its JVM together. worker_gb: the largest Python worker, with its
    model's process.
    """
    peak = {"driver_gb": 0.0, "worker_gb": 0.0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.3):
            now = _measure()
            peak["driver_gb"] = max(peak["driver_gb"], now.driver / GB)
            peak["worker_gb"] = max(peak["worker_gb"], now.largest_worker / GB)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def process_tree_gb(pid: int) -> float:
    """Memory of a process and all its descendants now, in GB. Shared memory counts once."""
    total = 0
    with suppress(psutil.Error):  # it has ended
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / GB


class _Memory(NamedTuple):
    """Resident bytes of the driver with its JVM, and of the largest worker."""

    driver: int
    largest_worker: int


def _measure() -> _Memory:
    driver_process = psutil.Process()
    driver = driver_process.memory_info().rss
    workers: Counter[int] = Counter()
    for process in driver_process.children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            size = process.memory_info().rss
            parent = process.ppid()
        except psutil.Error:  # it has ended
            continue
        if "vlm4rec_spark.models.captioning.child" in command:
            workers[parent] += size
        elif "pyspark.daemon" in command:
            workers[process.pid] += size
        else:
            driver += size
    return _Memory(driver, max(workers.values(), default=0))
