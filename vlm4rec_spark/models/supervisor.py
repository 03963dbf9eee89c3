"""Captions photos in a child process that may die, hang or eat memory: each time it costs one batch, not the run.

Knows batches, deadlines and who is to blame; knows neither Spark nor which model runs (`child.py` does).
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.captioners import ModelSettings

_IN_FLIGHT = 2
"""Batches at the child's: one that the model works on, one that is decoded meanwhile."""
_POLL_SECONDS = 0.2
_LOAD_SECONDS = 3_600
"""Weights of 70 GB over a slow network take a while."""
_LOAD_TRIES = 3
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc shall keep freed pages for the next tensor: a small model on a CPU is 8 % faster so (benchmarks)."""
_DEATHS_IN_A_ROW = 10
"""So many ends of the child without an answer in between are the model's fault, not the photos'."""


@dataclass(frozen=True)
class Photo:
    """A photo's bytes as delivered, and the key that its result bears."""

    key: str
    data: bytes


@dataclass(frozen=True)
class Result:
    """What became of a photo: a text (which may be empty), or an error and its class. `seconds`: its share of work.

    `waited`: the seconds that the model was idle before the photo's batch, shared among its photos.
    """

    key: str
    text: str | None
    input_tokens: int | None
    output_tokens: int | None
    error_class: str | None
    error: str | None
    seconds: float
    waited: float


@dataclass
class _Batch:
    photos: list[Photo]
    struck: bool = False
    """Whether the child has ended over its one photo before."""
    state: str = "waiting"
    """waiting, decoding or decoded."""


class _End(Exception):
    """The child is no more. `error_class` is model_died, model_hung or out_of_memory."""

    def __init__(self, error_class: str, error: str):
        super().__init__(error)
        self.error_class = error_class


class Supervisor:
    """One model in one child process, started when the first photo comes and kept until `close`."""

    def __init__(
        self, model: ModelSettings, prompt: str, batch_size: int, batch_seconds: float, memory_bytes: int | None = None
    ):
        """`batch_seconds` is the longest that a batch may take, `memory_bytes` the most that the child may hold.

        Without the latter it is four fifths of the machine's, or of the container's.
        """
        self._model, self._prompt, self._batch_size = model, prompt, batch_size
        self._batch_seconds, self._memory = batch_seconds, memory_bytes or int(0.8 * _memory_here())
        self._child: subprocess.Popen | None = None
        self._number, self._deaths, self._failed_loads = 0, 0, 0
        self._flying: dict[int, _Batch] = {}
        self.idle_seconds = 60.0
        """After so long without a photo the child ends; Spark ends an idle Python worker after as much."""
        self.run = ""
        """Another run begins where this changes: what the model waited before doesn't count."""
        self._counted = ""

    def caption(self, photos: Iterable[Photo], stop: Callable[[], bool] = lambda: False) -> Iterator[Result]:
        """A result for every photo, in any order. Once `stop()` holds, no further batch is begun: the rest has none.

        A batch over which the child ends, or that the model refuses, is tried again photo by photo, and a photo over
        which it ends a second time is an error. Raises RunError when the model can't be loaded. When the child ends
        ten times in a row the rest has no result either.
        """
        source, again, self._deaths = iter(photos), deque[_Batch](), 0
        try:
            while True:
                try:
                    while self._has_room(again) and self._deaths < _DEATHS_IN_A_ROW and not stop():
                        if again:
                            self._send(again.popleft())
                        elif some := list(islice(source, self._batch_size)):
                            self._send(_Batch(some))
                        else:
                            break
                    if not self._flying:
                        return
                    yield from self._results(self._receive(), again)
                except _End as end:
                    yield from self._after(end, again)
        finally:
            if self._flying:  # whoever asked has gone, and the answers would be taken for the next one's
                self.close()
                self._flying.clear()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._wire.close()
            self._child.kill()
            self._child.wait()
            self._said.close()
            self._child = None

    @property
    def pid(self) -> int | None:
        """The child's, where there is one."""
        return self._child.pid if self._child else None

    def _has_room(self, again: deque[_Batch]) -> bool:
        # A photo under suspicion is tried with no other on its way, so that the child's end can be put down to it.
        coming = [*self._flying.values(), *([again[0]] if again else [])]
        suspected = any(batch.struck for batch in coming)
        return len(self._flying) < (1 if suspected else _IN_FLIGHT)

    def _send(self, batch: _Batch) -> None:
        self._number += 1
        self._flying[self._number] = batch
        if self._child is None:
            self._start()
        if len(self._flying) == 1:
            self._last = time.monotonic()
        keys, first = [photo.key for photo in batch.photos], self.run != self._counted
        head, self._counted = {"batch": self._number, "keys": keys, "prompt": self._prompt, "first": first}, self.run
        try:
            self._wire.send_bytes(json.dumps(head).encode())
            for photo in batch.photos:
                self._wire.send_bytes(photo.data)
        except BlockingIOError:
            raise self._hung() from None
        except OSError:
            raise self._ended() from None

    def _start(self) -> None:
        """Start the child and wait until it has loaded the model. Raises RunError when it can't, _End when it ends."""
        ours, theirs = socket.socketpair()
        # A child that hangs doesn't read either.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(self._batch_seconds), 0))
        # Where the package has come by an archive, only this process knows the way to it.
        path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        # What it writes goes to a file, whose last line says more of its end than a signal's number.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "vlm4rec_spark.models.child", *map(str, (theirs.fileno(), os.getpid(),
                                                                               self.idle_seconds))],
                stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, pass_fds=[theirs.fileno()],
                env=_MALLOC | os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
        self._wire, self._process = Connection(ours.detach()), psutil.Process(self._child.pid)
        self._loaded, self._last = False, time.monotonic()
        try:
            self._wire.send_bytes(self._model.model_dump_json().encode())
        except OSError:
            raise self._ended() from None
        answer = self._receive()
        if "cannot_load" in answer:
            self.close()
            raise RunError(f"The captioner can't be loaded: {answer['cannot_load']}")
        self._loaded, self._failed_loads = True, 0

    def _receive(self) -> dict[str, Any]:
        """The child's next message. Raises _End."""
        while not self._wire.poll(_POLL_SECONDS):
            self._watch()
        self._watch()
        try:
            return json.loads(self._wire.recv_bytes())
        except (EOFError, OSError):
            raise self._ended() from None

    def _results(self, message: dict[str, Any], again: deque[_Batch]) -> Iterator[Result]:
        """What a message means; a batch that the model refused goes to `again`, photo by photo."""
        self._last = time.monotonic()
        for state in ("decoding", "decoded"):
            if state in message:
                self._flying[message[state]].state = state
        if "batch" not in message:
            return
        self._deaths = 0
        batch = self._flying.pop(message["batch"])
        seconds, waited = (message[name] / len(batch.photos) for name in ("seconds", "waited"))
        for key, (name, error) in message["bad"].items():
            yield Result(key, None, None, None, name, error, 0.0, waited)
        for key, (text, asked, said) in message.get("said", {}).items():
            yield Result(key, text, asked, said, None, None, seconds, waited)
        failed = message.get("failed", [])
        if len(failed) == 1:
            yield Result(failed[0], None, None, None, message["error_class"], message["error"], seconds, waited)
        else:
            again.extendleft(_Batch([photo]) for photo in reversed(batch.photos) if photo.key in failed)

    def _after(self, end: _End, again: deque[_Batch]) -> Iterator[Result]:
        """Blame the batch that the model worked on and the one that was being decoded; the others come again."""
        was_loaded, flying = self._loaded, list(self._flying.values())
        self.close()
        self._flying.clear()
        if not was_loaded:
            self._failed_loads += 1
            if self._failed_loads == _LOAD_TRIES:
                raise RunError(f"The captioner's process ended {_LOAD_TRIES} times while it loaded the model: {end}")
        at_work = next((batch for batch in flying if batch.state == "decoded"), None)
        retried: list[_Batch] = []
        for batch in flying:
            blamed = batch is at_work or batch.state == "decoding"
            if blamed and batch.struck:
                yield Result(batch.photos[0].key, None, None, None, end.error_class, str(end), 0.0, 0.0)
            elif blamed:
                retried += [_Batch([photo], struck=True) for photo in batch.photos]
            else:
                retried.append(_Batch(batch.photos, batch.struck))
        self._deaths += was_loaded
        again.extendleft(reversed(retried))

    def _watch(self) -> None:
        """End a child that takes too long or holds too much. Raises _End."""
        limit = self._batch_seconds if self._loaded else _LOAD_SECONDS
        if time.monotonic() - self._last > limit:
            raise self._hung()
        try:
            held = self._process.memory_info().rss
        except psutil.NoSuchProcess:  # reading its socket will say so
            return
        if held > self._memory:
            self.close()
            raise _End("out_of_memory", f"the process held {held / 1e9:.1f} GB, more than {self._memory / 1e9:.1f} GB, "
                       "and was ended")  # fmt: skip

    def _ended(self) -> _End:
        """Why the child is no more, as far as can be told."""
        assert self._child is not None
        try:
            code = self._child.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 2_000))
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        if code == -signal.SIGKILL:
            how += " (the kernel does that where memory runs out)"
        return _End("model_died", f"the process ended {how}" + (f"; it said last: {last[:500]}" if last else ""))

    def _hung(self) -> _End:
        self.close()
        limit = self._batch_seconds if self._loaded else _LOAD_SECONDS
        return _End("model_hung", f"no answer within {limit:g} s; the process was ended")


def _memory_here() -> int:
    """Bytes that this machine has, or that the container may use."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total
