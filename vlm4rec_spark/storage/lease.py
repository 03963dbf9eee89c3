"""One run at a time on the same tables: an expiring lease, a small file next to them.

A run creates `_lease-<n>.json` only if nobody else has, and then rewrites it every few seconds.
Another run that finds the file watches it. A file that changes has a living holder. One that stays
the same for the length of the lease has a dead holder, and n + 1 takes over.
No clocks of two machines are compared. Knows files and threads; knows no stage.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psutil

from vlm4rec_spark.errors import Busy, RunError

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_NAME = re.compile(r"_lease-(\d{6})\.json")
_BEATS = 4
"""Renewals within the length of a lease: three may come late or get lost."""


class Lease:
    """Held inside `with`. Raises Busy on entering when another run is at work on these tables."""

    def __init__(self, tables: Tables, run_id: str, seconds: float, say: Callable[[str], None]):
        self._spark = tables.spark
        self._location = tables.location
        self._folder = tables.folder()
        self._files = tables.filesystem(self._folder)
        self._seconds = seconds
        self._say = say
        self._holder = {
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            "beat": 0,
        }
        self._number = 0
        self._ended = threading.Event()
        self.lost = False
        """Another run took over, because this one didn't renew its lease in time."""

    def __enter__(self) -> Lease:
        """Raises RunError when the folder of the tables can't be written."""
        try:
            while not self._acquire():
                pass
        except Busy:
            raise
        except Exception as error:
            reason = str(getattr(error, "java_exception", error)).splitlines()[0]
            raise RunError(
                f"tables: nothing can be written to {self._location} ({reason}). Check the path "
                "and its permissions, or name another place with --set tables=…"
            ) from None
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if not self.lost:
            self._files.delete(self._uri(self._number))

    def check(self) -> None:
        """Raise RunError when the lease was lost."""
        if self.lost:
            raise RunError(
                "Another run took over these tables, because this one gave no sign of life for "
                f"{self._seconds:g} s. This run stops here; the other one goes on."
            )

    def _acquire(self) -> bool:
        """Create the next file; False if another run was quicker. Raises Busy if a holder lives."""
        numbers = self._numbers()
        last = max(numbers, default=0)
        if numbers:
            self._require_dead(last)
        self._number = last + 1
        if not self._files.create(self._uri(self._number), json.dumps(self._holder)):
            return False
        if set(self._numbers()) - {*numbers, self._number}:
            # Another run created another number at the same time. Both create first and list
            # then, so at least one of the two sees the other and steps back.
            self._files.delete(self._uri(self._number))
            time.sleep(random.uniform(0, self._seconds / _BEATS))
            return False
        for number in numbers:
            self._files.delete(self._uri(number))
        return True

    def _require_dead(self, number: int) -> None:
        """Return when the holder of the file is dead or gone. Raises Busy when it is alive."""
        first = self._files.read(self._uri(number))
        holder = _parsed(first)
        if first is None or _died_here(holder):
            return
        self._say(
            f"another run holds these tables ({_told(holder)}); waiting to see whether it is alive"
        )
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._seconds / 10))
            latest = self._files.read(self._uri(number))
            if latest is None:
                return
            if latest != first:
                raise Busy(
                    f"Another run is at work on these tables: {_told(_parsed(latest) or holder)}. "
                    "This run ends here and has changed nothing. Start it again when the other "
                    "one is done."
                )
        self._say(f"the other run gave no sign of life for {self._seconds:g} s; taking over")

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / _BEATS):
            try:
                holder = _parsed(self._files.read(self._uri(self._number)))
                replaced = holder.get("run_id") != self._holder["run_id"]
                if replaced or max(self._numbers()) != self._number:
                    self.lost = True
                    self._spark.sparkContext.cancelAllJobs()
                    return
                self._holder["beat"] += 1  # type: ignore[operator]
                # In place: a reader of half a file sees a change, and that is all it looks for.
                self._files.replace(self._uri(self._number), json.dumps(self._holder))
            except Exception as error:  # such as a full disk: the next renewal may succeed
                self._say(f"the lease couldn't be renewed: {' '.join(str(error).split())[:200]}")

    def _numbers(self) -> list[int]:
        matches = map(_NAME.fullmatch, self._files.names(self._folder))
        return [int(match[1]) for match in matches if match]

    def _uri(self, number: int) -> str:
        return f"{self._folder}/_lease-{number:06d}.json"


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        holder = json.loads(text or "{}")
    except ValueError:  # half written
        return {}
    return holder if isinstance(holder, dict) else {}


def _told(holder: dict[str, Any]) -> str:
    if not holder:  # its file is there, its content not yet
        return "a run that is just starting"
    return f"run {holder.get('run_id')} on {holder.get('host')}, since {holder.get('since')}"


def _died_here(holder: dict[str, Any]) -> bool:
    """The holder ran on this machine and is gone: a run that is started again needn't wait."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    # It may have had this process's number before, in a container that was started again.
    return pid == os.getpid() or not psutil.pid_exists(pid)
