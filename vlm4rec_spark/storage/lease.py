"""One run at a time on the same tables: an expiring lease, a small file beside them.

Its file `_lease-<n>.json` is made only if it isn't there yet, and its holder changes it again and again. Whoever finds
one watches it: a file that changes has a living holder; one that doesn't for the length of the lease has a dead one,
and n + 1 takes over. Nobody compares clocks of two machines. Knows files and threads; knows no stage.
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
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vlm4rec_spark.errors import Busy, RunError

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_NAME = re.compile(r"_lease-(\d{6})\.json")
_BEATS = 4
"""Signs of life within the length of a lease: three may come late or get lost."""


class Lease:
    """Held inside `with`. Raises Busy on entering when another run is at work on these tables."""

    def __init__(self, tables: Tables, run_id: str, seconds: float, say: Callable[[str], None]):
        self._files, self._place = _files(tables), tables.location
        self._spark, self._seconds, self._say = tables.spark, seconds, say
        self._me = {
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": _now(),
            "beat": 0,
        }
        self._number = 0
        self._ended = threading.Event()
        self.lost = False
        """Another run took over, because this one gave no sign of life for too long."""

    def __enter__(self) -> Lease:
        """Raises RunError when nothing can be written beside the tables."""
        try:
            while not self._taken():
                pass
        except Busy:
            raise
        except Exception as refused:
            reason = str(getattr(refused, "java_exception", refused)).splitlines()[0]
            raise RunError(
                f"tables: nothing can be written to {self._place} ({reason}). Check the path and its "
                "permissions, or name another place with --set tables=…"
            ) from None
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if not self.lost:
            self._files.delete(self._number)

    def check(self) -> None:
        """Raise RunError when the lease was lost."""
        if self.lost:
            raise RunError(
                "Another run took over these tables, since this one gave no sign of life for "
                f"{self._seconds:g} s. It stops here; the other goes on."
            )

    def _taken(self) -> bool:
        """Make the file if nobody has it; False when somebody was quicker."""
        there = self._files.numbers()
        last = max(there, default=0)
        if there:
            self._watch(last)
        self._number = last + 1
        if not self._files.create(self._number, json.dumps(self._me)):
            return False
        if set(self._files.numbers()) - {*there, self._number}:
            # Somebody made another number at the same time. Of two who first make and then look, one at least sees
            # the other and steps back.
            self._files.delete(self._number)
            time.sleep(random.uniform(0, self._seconds / _BEATS))
            return False
        for old in there:
            self._files.delete(old)
        return True

    def _watch(self, number: int) -> None:
        """Return when the holder of the file is dead or gone, raise Busy when it lives."""
        first = self._files.read(number)
        holder = _parsed(first)
        if first is None or _died_here(holder):
            return
        who = f"run {holder.get('run_id')} on {holder.get('host')}, since {holder.get('since')}"
        self._say(f"another run holds these tables ({who}); watching whether it lives")
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._seconds / 10))
            now = self._files.read(number)
            if now is None:
                return
            if now != first:
                raise Busy(
                    f"Another run is at work on these tables: {who}. This one ends here and has changed "
                    "nothing; start it again when the other is done."
                )
        self._say(f"its holder gave no sign of life for {self._seconds:g} s; taking over")

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / _BEATS):
            try:
                mine = _parsed(self._files.read(self._number)).get("run_id") == self._me["run_id"]
                if not mine or max(self._files.numbers()) != self._number:
                    self.lost = True
                    self._spark.sparkContext.cancelAllJobs()
                    return
                self._me["beat"] += 1  # type: ignore[operator]
                self._files.replace(self._number, json.dumps(self._me))
            except Exception as refused:  # a full disk, say: the next beat may get through
                self._say(f"the lease couldn't be renewed: {' '.join(str(refused).split())[:200]}")


class _LocalFiles:
    """The lease's files in a folder of this machine, or one that it mounts."""

    def __init__(self, folder: Path):
        self._folder = folder

    def numbers(self) -> list[int]:
        names = [file.name for file in self._folder.iterdir()] if self._folder.is_dir() else []
        return [int(found[1]) for found in map(_NAME.fullmatch, names) if found]

    def create(self, number: int, text: str) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with (self._folder / _name(number)).open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def replace(self, number: int, text: str) -> None:
        # In place: who reads half of it sees a change, which is what it shall see.
        with (self._folder / _name(number)).open("r+") as file:
            file.write(text)
            file.truncate()

    def read(self, number: int) -> str | None:
        try:
            return (self._folder / _name(number)).read_text()
        except FileNotFoundError:
            return None

    def delete(self, number: int) -> None:
        (self._folder / _name(number)).unlink(missing_ok=True)


class _HadoopFiles:
    """The lease's files wherever Hadoop's file systems reach. As sure as their `create` without overwrite."""

    def __init__(self, tables: Tables, folder: str):
        self._path = lambda name: tables.path(f"{folder}/{name}" if name else folder)
        self._fs = tables.filesystem(folder)
        assert tables.spark._jvm is not None
        self._io = tables.spark._jvm.org.apache.commons.io.IOUtils

    def numbers(self) -> list[int]:
        folder = self._path("")
        names = (
            [each.getPath().getName() for each in self._fs.listStatus(folder)]
            if self._fs.exists(folder)
            else []
        )
        return [int(found[1]) for found in map(_NAME.fullmatch, names) if found]

    def create(self, number: int, text: str) -> bool:
        try:
            self._write(number, text, False)
        except Exception as refused:
            if "AlreadyExists" in str(refused):
                return False
            raise
        return True

    def replace(self, number: int, text: str) -> None:
        self._write(number, text, True)

    def read(self, number: int) -> str | None:
        try:
            stream = self._fs.open(self._path(_name(number)))
        except Exception as refused:
            if "FileNotFound" in str(refused):
                return None
            raise
        try:
            return str(self._io.toString(stream, "UTF-8"))
        finally:
            stream.close()

    def delete(self, number: int) -> None:
        self._fs.delete(self._path(_name(number)), False)

    def _write(self, number: int, text: str, overwrite: bool) -> None:
        stream = self._fs.create(self._path(_name(number)), overwrite)
        try:
            stream.write(bytearray(text.encode()))
        finally:
            stream.close()


def _files(tables: Tables) -> _LocalFiles | _HadoopFiles:
    folder = tables.folder()
    local = re.sub(r"^file:/+", "/", folder)
    return _LocalFiles(Path(local)) if local.startswith("/") else _HadoopFiles(tables, folder)


def _name(number: int) -> str:
    return f"_lease-{number:06d}.json"


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:  # half written
        return {}
    return found if isinstance(found, dict) else {}


def _died_here(holder: dict[str, Any]) -> bool:
    """The holder ran on this machine and isn't there any more: a run that is started again needn't wait."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if (
        pid == os.getpid()
    ):  # it had this process's number before, in a container that was started again
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process
        return False
    return False
