"""Captions photos in a child process: if it dies, hangs or uses up memory, one batch is lost.

Knows deadlines and suspects. Knows neither Spark nor the model, which `child.py` runs.
"""

import json
import math
import os
import re
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.captioning.captioner import Answer, ModelSettings

_POLL_SECONDS = 0.2
_LOAD_SECONDS = 3_600
"""Weights of 70 GB over a slow network take a while."""
_MAX_LOADS = 3
_MAX_DEATHS = 10
"""So many ends of the child without an answer in between are the model's fault."""
_POINTER = "root cause"
"""vLLM's last line is 'See root cause above' or 'See stack trace (above) for the root cause'."""
_ERROR = re.compile(r"\b\w*(Error|Exception): .+")
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc then reuses freed pages: a small model is 8 % faster on a CPU (benchmarks)."""


@dataclass(frozen=True)
class Photo:
    """A photo's bytes as delivered, its prompt, and the key that its result carries."""

    key: str
    data: bytes
    prompt: str


@dataclass(frozen=True)
class Result(Answer):
    """The outcome of a photo. An error has no tokens.

    `seconds`: the photo's share of the model's work.
    `starved_seconds`: its share of the seconds that the model was idle before the photo's batch.
    """

    seconds: float = 0.0
    starved_seconds: float = 0.0


@dataclass
class InFlight:
    """A photo that was sent to the child and has no result yet."""

    photo: Photo
    suspected: bool = False
    """The child ended once while it worked on this photo."""
    excused: bool = False
    """The child hung once while it decoded this photo and the model had others."""
    state: str = "sent"
    """sent, decoding, decoded or captioning."""


class _ChildEnded(Exception):
    """`error_class` is model_died, model_hung or out_of_memory."""

    def __init__(self, error_class: str, error: str):
        super().__init__(error)
        self.error_class = error_class


class _Child:
    """The child process, the connection to it, and the log of what it prints."""

    def __init__(self, idle_seconds: float, send_seconds: float, environment: dict[str, str]):
        parent_end, child_end = socket.socketpair()
        # A child that hangs doesn't read, so sending needs a limit too.
        limit = struct.pack("ll", math.ceil(send_seconds), 0)
        parent_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        # If the package comes from an archive, only this process knows the path to it.
        path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        # The log's last line says more about an end than a signal's number.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        module = "vlm4rec_spark.models.captioning.child"
        arguments = (child_end.fileno(), os.getpid(), idle_seconds)
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[child_end.fileno()],
                env=_MALLOC | os.environ | environment | {"PYTHONPATH": path},
            )
        self.connection = Connection(parent_end.detach())
        self.statistics = psutil.Process(self.process.pid)
        self.loaded = False
        self.next_memory_check = 0.0

    def memory_bytes(self) -> int:
        """0 if the process has ended: reading its connection says so."""
        try:
            return self.statistics.memory_info().rss
        except psutil.NoSuchProcess:
            return 0

    def end(self) -> _ChildEnded:
        """Why the process ended by itself, as far as can be told."""
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        error = f"the process ended with exit code {code}"
        if code is not None and code < 0:
            error = f"the process ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            error += " (the kernel does that when memory runs out)"
        if last := self.last_words():
            error += f"; its last output: {last}"
        return _ChildEnded("model_died", error)

    def last_words(self) -> str:
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 50_000))
        return last_words(self.log.read().decode(errors="replace"))[:500]

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


class Supervisor:
    """One model in one child process, started for the first photo and kept until `close`."""

    def __init__(
        self,
        model: ModelSettings,
        batch_size: int,
        batch_seconds: float,
        memory_bytes: int | None = None,
        gpu: str | None = None,
        json_schema: dict[str, Any] | None = None,
    ):
        """`batch_seconds`: the longest time without an answer.
        `memory_bytes`: the child's limit; by default 80 % of the machine or container.
        `gpu`: the address of the only GPU that the child sees; None for all.
        `json_schema`: the schema of the answers, in backends that can enforce it.
        """
        self._settings = {
            "model": model.model_dump(mode="json"),
            "batch_size": batch_size,
            "json_schema": json_schema,
        }
        self._batch_seconds = max(batch_seconds, model.max_silence_seconds)
        self._environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self._memory_limit = memory_bytes or int(0.8 * _machine_memory())
        self._child: _Child | None = None
        self._in_flight: dict[str, InFlight] = {}
        self._max_in_flight = 1
        self._deaths = 0
        self._failed_loads = 0
        self._announced_end = False
        self._last_message = 0.0
        self.idle_seconds = 60.0
        """The child ends after this long without a photo, as Spark's idle Python workers do."""
        self.run = ""
        """The id of the run. The model's idle time before a new run doesn't count."""
        self._last_run = ""

    def caption(
        self, photos: Iterable[Photo], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Result]:
        """One result per photo, in any order. Photos not begun when `stop()` turns true have none.

        Photos that the child worked on when it ended are retried one by one.
        If it ends again, that photo's result is an error.
        After ten ends in a row the remaining photos have no result.
        Raises RunError when the model can't be loaded, or can serve no photo at all.
        """
        source = iter(photos)
        retries = deque[InFlight]()
        self._deaths = 0
        try:
            while True:
                try:
                    self._fill(source, retries, stop)
                    if not self._in_flight:
                        return
                    self._announce_end()
                    yield from self._results(self._receive())
                except _ChildEnded as end:
                    yield from self._after(end, retries)
        finally:
            # The caller is gone. The next one must not get its answers.
            if self._in_flight:
                self.close()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
        self._child = None
        self._in_flight.clear()

    @property
    def pid(self) -> int | None:
        """The child's process id, if there is a child."""
        return self._child.process.pid if self._child else None

    def _fill(
        self, source: Iterator[Photo], retries: deque[InFlight], stop: Callable[[], bool]
    ) -> None:
        """Send photos while there is room. Retries go first."""
        while self._has_room(retries) and self._deaths < _MAX_DEATHS and not stop():
            flight = retries.popleft() if retries else self._next(source)
            if flight is None:
                return
            self._send(flight)

    def _has_room(self, retries: deque[InFlight]) -> bool:
        # A suspect travels alone, so that another end of the child is clearly its fault.
        suspected = any(flight.suspected for flight in self._in_flight.values())
        alone = suspected or bool(retries and retries[0].suspected)
        return len(self._in_flight) < (1 if alone else self._max_in_flight)

    def _next(self, source: Iterator[Photo]) -> InFlight | None:
        began = time.monotonic()
        photo = next(source, None)
        # The model isn't to blame for the time it takes to fetch a photo.
        self._last_message += time.monotonic() - began
        return InFlight(photo) if photo else None

    def _send(self, flight: InFlight) -> None:
        photo = flight.photo
        self._in_flight[photo.key] = flight
        child = self._child or self._start()
        if len(self._in_flight) == 1:
            self._last_message = time.monotonic()
        first_of_run = self.run != self._last_run
        header = {"key": photo.key, "prompt": photo.prompt, "first_of_run": first_of_run}
        self._write(child, header, photo.data)
        self._last_run = self.run
        self._announced_end = False

    def _announce_end(self) -> None:
        """Tell the child not to wait for more photos, if there is room that none fills."""
        assert self._child
        if len(self._in_flight) < self._max_in_flight and not self._announced_end:
            self._write(self._child, {"end": True})
            self._announced_end = True

    def _write(self, child: _Child, message: dict[str, Any], *photos: bytes) -> None:
        try:
            for content in (json.dumps(message).encode(), *photos):
                child.connection.send_bytes(content)
        except BlockingIOError:
            raise self._hung(child) from None
        except OSError:
            raise child.end() from None

    def _start(self) -> _Child:
        """Start the child and wait for its model. Raises RunError if the model can't be loaded."""
        child = _Child(self.idle_seconds, self._batch_seconds, self._environment)
        self._child = child
        self._last_message = time.monotonic()
        self._write(child, self._settings)
        self._max_in_flight = self._receive()["max_in_flight"]
        child.loaded = True
        self._failed_loads = 0
        return child

    def _receive(self) -> dict[str, Any]:
        """The child's next message. Raises _ChildEnded, or RunError if it can't serve any photo."""
        child = self._child
        assert child
        # A message that waits here is a sign of life, however late this process reads it.
        while not child.connection.poll(_POLL_SECONDS):
            if time.monotonic() - self._last_message > self._limit(child):
                raise self._hung(child)
            self._check_memory(child)
        self._check_memory(child)
        try:
            message = json.loads(child.connection.recv_bytes())
        except (EOFError, OSError):
            raise child.end() from None
        if "cannot" in message:
            error = f"The captioner can't {message['cannot']}"
            if _POINTER in error:
                error += f" {child.last_words()}"
            self.close()
            raise RunError(error)
        return message

    def _results(self, message: dict[str, Any]) -> Iterator[Result]:
        """The results in a message; none if it reports photos' states."""
        self._last_message = time.monotonic()
        if "state" in message:
            for key in message["keys"]:
                self._in_flight[key].state = message["state"]
            return
        answers = message["answers"]
        # Without a time they come from the decoder: the model may still be broken.
        if "seconds" in message:
            self._deaths = 0
        seconds = message.get("seconds", 0.0) / len(answers)
        starved_seconds = message.get("starved_seconds", 0.0) / len(answers)
        for answer in answers:
            del self._in_flight[answer["key"]]
            if answer["text"] is None:
                answer |= {"input_tokens": None, "output_tokens": None}
            yield Result(**answer, seconds=seconds, starved_seconds=starved_seconds)

    def _after(self, end: _ChildEnded, retries: deque[InFlight]) -> Iterator[Result]:
        """Queue the photos in flight again, suspects first. A second suspicion is an error."""
        assert self._child
        loaded = self._child.loaded
        in_flight = list(self._in_flight.values())
        self.close()
        if loaded:
            self._deaths += 1
        else:
            self._failed_loads += 1
            if self._failed_loads == _MAX_LOADS:
                raise RunError(
                    f"The captioner's process ended {_MAX_LOADS} times "
                    f"while it loaded the model: {end}"
                )
        blamed = suspects(in_flight, hung=end.error_class == "model_hung")
        failed = [flight for flight in blamed if flight.suspected]
        retried = [flight for flight in in_flight if flight not in failed]
        retried.sort(key=lambda flight: flight not in blamed)
        for flight in retried:
            flight.suspected |= flight in blamed
            flight.state = "sent"
        retries.extendleft(reversed(retried))
        for flight in failed:
            key = flight.photo.key
            yield Result(key, None, error_class=end.error_class, error=str(end))

    def _check_memory(self, child: _Child) -> None:
        # Not for every message: each photo has several.
        if time.monotonic() < child.next_memory_check:
            return
        child.next_memory_check = time.monotonic() + _POLL_SECONDS
        used = child.memory_bytes()
        if used > self._memory_limit:
            raise _ChildEnded(
                "out_of_memory",
                f"the process used {used / 1e9:.1f} GB, more than its limit of "
                f"{self._memory_limit / 1e9:.1f} GB, and was killed",
            )

    def _limit(self, child: _Child) -> float:
        """Seconds without a message."""
        return self._batch_seconds if child.loaded else _LOAD_SECONDS

    def _hung(self, child: _Child) -> _ChildEnded:
        error = f"no answer within {self._limit(child):g} s; the process was killed"
        return _ChildEnded("model_hung", error)


def suspects(in_flight: list[InFlight], hung: bool) -> list[InFlight]:
    """The photos that may have ended the child: those it captioned and those it decoded.

    If it `hung` while it captioned, decoding is excused once: a busy machine decodes late.
    """
    captioning = hung and any(flight.state == "captioning" for flight in in_flight)
    blamed = []
    for flight in in_flight:
        if captioning and flight.state == "decoding" and not flight.excused:
            flight.excused = True
        elif flight.state in ("decoding", "captioning"):
            blamed.append(flight)
    return blamed


def last_words(output: str) -> str:
    """A process's last line of output. If it points to an error above, the last error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines or _POINTER not in lines[-1]:
        return lines[-1] if lines else ""
    errors = (_ERROR.search(line) for line in reversed(lines) if _POINTER not in line)
    return next((error[0] for error in errors if error), lines[-1])


def _machine_memory() -> int:
    """Bytes that this machine has, or that its container may use."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total
