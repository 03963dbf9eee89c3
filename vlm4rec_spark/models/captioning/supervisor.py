"""Captions photos in a child process that may die, hang or eat memory: each time it costs one batch, not the run.

Knows deadlines and who is to blame; knows neither Spark nor which model runs (`child.py` does).
"""

from __future__ import annotations

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
from vlm4rec_spark.models.captioning.captioner import ModelSettings

_POLL_SECONDS = 0.2
_LOAD_SECONDS = 3_600
"""Weights of 70 GB over a slow network take a while."""
_ELSEWHERE = "root cause"
"""Where vLLM's engine ends it says 'See root cause above', or 'See stack trace (above) for the root cause'."""
_ERROR = re.compile(r"\b\w*(Error|Exception): .+")
_LOAD_TRIES = 3
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc shall keep freed pages for the next tensor: a small model on a CPU is 8 % faster so (benchmarks)."""
_DEATHS_IN_A_ROW = 10
"""So many ends of the child without an answer in between are the model's fault, not the photos'."""


@dataclass(frozen=True)
class Photo:
    """A photo's bytes as delivered, the prompt for it, and the key that its result bears."""

    key: str
    data: bytes
    prompt: str


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
class _Flight:
    photo: Photo
    struck: bool = False
    """Whether the child has ended over it before."""
    state: str = "sent"
    """sent, decoding, decoded, at_work."""


class _End(Exception):
    """The child is no more. `error_class` is model_died, model_hung or out_of_memory."""

    def __init__(self, error_class: str, error: str):
        super().__init__(error)
        self.error_class = error_class


class Supervisor:
    """One model in one child process, started when the first photo comes and kept until `close`."""

    def __init__(
        self,
        model: ModelSettings,
        batch_size: int,
        batch_seconds: float,
        memory_bytes: int | None = None,
        gpu: str | None = None,
        json_schema: dict[str, Any] | None = None,
    ):
        """`batch_seconds` is the longest without an answer, `memory_bytes` the most that the child may hold.

        `gpu` is the address of the only GPU that it shall see; None: all that there are.
        `json_schema` is what answers shall be like, where the backend can see to it.
        Without `memory_bytes` it is four fifths of the machine's, or of the container's.
        """
        self._model, self._batch_size, self._json_schema = model, batch_size, json_schema
        self._batch_seconds = max(batch_seconds, model.longest_silence)
        self._gpu = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self._memory = memory_bytes or int(0.8 * _memory_here())
        self._child: subprocess.Popen | None = None
        self._deaths, self._failed_loads, self._at_once = 0, 0, 1
        self._flying: dict[str, _Flight] = {}
        self._told_all, self._last = False, 0.0
        self.idle_seconds = 60.0
        """After so long without a photo the child ends; Spark ends an idle Python worker after as much."""
        self.run = ""
        """Another run begins where this changes: what the model waited before doesn't count."""
        self._counted = ""

    def caption(
        self, photos: Iterable[Photo], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Result]:
        """A result for every photo, in any order. Once `stop()` holds, no further photo is begun: the rest has none.

        Photos over which the child ends are tried again one by one, and one over which it ends a second time is an
        error. Raises RunError when the model can't be loaded, or can serve no photo at all. When the child ends ten
        times in a row the rest has no result either.
        """
        source, again, self._deaths = iter(photos), deque[_Flight](), 0
        try:
            while True:
                try:
                    while self._has_room(again) and self._deaths < _DEATHS_IN_A_ROW and not stop():
                        if again:
                            self._send(again.popleft())
                        elif (photo := self._next(source)) is not None:
                            self._send(_Flight(photo))
                        else:
                            break
                    if not self._flying:
                        return
                    self._tell_all()
                    yield from self._results(self._receive())
                except _End as end:
                    yield from self._after(end, again)
        finally:
            if (
                self._flying
            ):  # whoever asked has gone, and the answers would be taken for the next one's
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

    def _next(self, source: Iterator[Photo]) -> Photo | None:
        began = time.monotonic()
        photo = next(source, None)
        # The time in which a photo was fetched isn't the model's.
        self._last += time.monotonic() - began
        return photo

    def _has_room(self, again: deque[_Flight]) -> bool:
        # A photo under suspicion is tried with no other on its way, so that the child's end can be put down to it.
        coming = [*self._flying.values(), *([again[0]] if again else [])]
        suspected = any(flight.struck for flight in coming)
        return len(self._flying) < (1 if suspected else self._at_once)

    def _send(self, flight: _Flight) -> None:
        self._flying[flight.photo.key] = flight
        if self._child is None:
            self._start()
        if len(self._flying) == 1:
            self._last = time.monotonic()
        head = {
            "key": flight.photo.key,
            "prompt": flight.photo.prompt,
            "first": self.run != self._counted,
        }
        self._say(head, flight.photo.data)
        self._counted, self._told_all = self.run, False

    def _tell_all(self) -> None:
        """Where fewer photos are on their way than there is room for, the model needn't wait for more."""
        if len(self._flying) < self._at_once and not self._told_all:
            self._say({"all": True})
            self._told_all = True

    def _say(self, message: dict[str, Any], data: bytes | None = None) -> None:
        try:
            self._wire.send_bytes(json.dumps(message).encode())
            if data is not None:
                self._wire.send_bytes(data)
        except BlockingIOError:
            raise self._hung() from None
        except OSError:
            raise self._ended() from None

    def _start(self) -> None:
        """Start the child and wait until it has loaded the model. Raises RunError when it can't, _End when it ends."""
        ours, theirs = socket.socketpair()
        # A child that hangs doesn't read either.
        ours.setsockopt(
            socket.SOL_SOCKET,
            socket.SO_SNDTIMEO,
            struct.pack("ll", math.ceil(self._batch_seconds), 0),
        )
        # Where the package has come by an archive, only this process knows the way to it.
        path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        # What it writes goes to a file, whose last line says more of its end than a signal's number.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        with theirs:
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vlm4rec_spark.models.captioning.child",
                    *map(str, (theirs.fileno(), os.getpid(), self.idle_seconds)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
                env=_MALLOC | os.environ | self._gpu | {"PYTHONPATH": path},
            )
        self._wire, self._process = Connection(ours.detach()), psutil.Process(self._child.pid)
        self._loaded, self._last, self._look = False, time.monotonic(), 0.0
        try:
            hello = {
                "model": self._model.model_dump(mode="json"),
                "batch_size": self._batch_size,
                "json_schema": self._json_schema,
            }
            self._wire.send_bytes(json.dumps(hello).encode())
        except OSError:
            raise self._ended() from None
        self._at_once = self._receive()["at_once"]
        self._loaded, self._failed_loads = True, 0

    def _receive(self) -> dict[str, Any]:
        """The child's next message. Raises _End, or RunError when it says that it can't serve."""
        while not self._wire.poll(_POLL_SECONDS):
            self._watch()
        self._watch()
        try:
            message = json.loads(self._wire.recv_bytes())
        except (EOFError, OSError):
            raise self._ended() from None
        if "cannot" in message:
            cause = f" {self._last_words()}" if _ELSEWHERE in message["cannot"] else ""
            self.close()
            self._flying.clear()
            raise RunError(f"The captioner can't {message['cannot']}{cause}")
        return message

    def _results(self, message: dict[str, Any]) -> Iterator[Result]:
        """What a message means."""
        self._last = time.monotonic()
        if "answers" not in message:
            ((state, keys),) = message.items()
            for key in [keys] if isinstance(keys, str) else keys:
                self._flying[key].state = state
            return
        answers = message["answers"]
        if "seconds" in message:  # they come from the model
            self._deaths = 0
        seconds, waited = (message.get(name, 0.0) / len(answers) for name in ("seconds", "waited"))
        for key, text, tokens_in, tokens_out, error_class, error in answers:
            del self._flying[key]
            if text is None:
                yield Result(key, None, None, None, error_class, error, seconds, waited)
            else:
                yield Result(key, text, tokens_in, tokens_out, None, None, seconds, waited)

    def _after(self, end: _End, again: deque[_Flight]) -> Iterator[Result]:
        """Blame the photos that the model worked on and those that were being decoded; the others come again."""
        was_loaded, flying = self._loaded, list(self._flying.values())
        self.close()
        self._flying.clear()
        if not was_loaded:
            self._failed_loads += 1
            if self._failed_loads == _LOAD_TRIES:
                raise RunError(
                    f"The captioner's process ended {_LOAD_TRIES} times while it loaded the model: {end}"
                )
        suspects, others = list[_Flight](), list[_Flight]()
        for flight in flying:
            blamed = flight.state in ("decoding", "at_work")
            if blamed and flight.struck:
                yield Result(
                    flight.photo.key, None, None, None, end.error_class, str(end), 0.0, 0.0
                )
            elif blamed:
                suspects.append(_Flight(flight.photo, struck=True))
            else:
                others.append(_Flight(flight.photo, flight.struck))
        self._deaths += was_loaded
        again.extendleft(reversed(suspects + others))

    def _watch(self) -> None:
        """End a child that takes too long or holds too much. Raises _End."""
        limit = self._batch_seconds if self._loaded else _LOAD_SECONDS
        if time.monotonic() - self._last > limit:
            raise self._hung()
        if time.monotonic() < self._look:  # a message for each photo comes in between
            return
        self._look = time.monotonic() + _POLL_SECONDS
        try:
            held = self._process.memory_info().rss
        except psutil.NoSuchProcess:  # reading its socket will say so
            return
        if held > self._memory:
            self.close()
            raise _End(
                "out_of_memory",
                f"the process held {held / 1e9:.1f} GB, more than {self._memory / 1e9:.1f} GB, "
                "and was ended",
            )

    def _ended(self) -> _End:
        """Why the child is no more, as far as can be told."""
        assert self._child is not None
        try:
            code = self._child.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        last = self._last_words()
        how = (
            f"by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"with exit code {code}"
        )
        if code == -signal.SIGKILL:
            how += " (the kernel does that where memory runs out)"
        return _End(
            "model_died",
            f"the process ended {how}" + (f"; it said last: {last[:500]}" if last else ""),
        )

    def _last_words(self) -> str:
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 50_000))
        return last_words(self._said.read().decode(errors="replace"))[:500]

    def _hung(self) -> _End:
        self.close()
        limit = self._batch_seconds if self._loaded else _LOAD_SECONDS
        return _End("model_hung", f"no answer within {limit:g} s; the process was ended")


def last_words(said: str) -> str:
    """Of what a process wrote the last line; where that only points to an error above it, that error's."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines or _ELSEWHERE not in lines[-1]:
        return lines[-1] if lines else ""
    errors = (_ERROR.search(line) for line in reversed(lines) if _ELSEWHERE not in line)
    return next((error[0] for error in errors if error), lines[-1])


def _memory_here() -> int:
    """Bytes that this machine has, or that the container may use."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total
