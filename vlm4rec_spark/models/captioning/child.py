"""The process around the model: photos' bytes in, captions out, over one socket. Decodes ahead of the model.

Started by `supervisor.py` and by nobody else. It ends when its parent does, whatever either of them is doing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.captioning.backends.batches import error_class
from vlm4rec_spark.models.captioning.captioner import (
    Answer,
    Captioner,
    ModelSettings,
    Request,
    load_captioner,
)
from vlm4rec_spark.models.photos.decode import PhotoError, decode

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends to a process when its parent ends."""
_DECODERS = 2
"""Threads. One decodes 60 JPEGs or 15 PNGs of 2,000 pixels a second (benchmarks/decode.py); a GPU captions 11."""


def main(handle: int, parent: int, idle_seconds: float) -> None:
    """Serve the parent at the socket `handle` until it hangs up, or has had nothing to ask for so long."""
    _end_with(parent)
    _be_the_first_to_go()
    wire = _Wire(handle)
    hello = wire.receive()
    settings = ModelSettings.model_validate_json(json.dumps(hello["model"]))
    try:
        captioner = load_captioner(settings, hello["batch_size"], hello["json_schema"])
    except Exception as failure:
        shared = error_class(failure) == "out_of_memory" and "CUDA" in str(failure)
        hint = (
            " Does another task use this GPU? See spark.task.resource.gpu.amount." if shared else ""
        )
        wire.send({"cannot": f"be loaded: {type(failure).__name__}: {failure}"[:2_000] + hint})
        return
    wire.send({"at_once": captioner.at_once})
    captioner.begins = lambda keys: wire.send({"at_work": list(keys)})
    intake = _Intake()
    threading.Thread(
        target=_decode_ahead, args=(wire, settings.max_side, intake), daemon=True
    ).start()
    try:
        _serve(captioner, intake, wire, idle_seconds)
    except RunError as failure:
        wire.send({"cannot": f"go on: {failure}"[:2_000]})


def _serve(captioner: Captioner, intake: _Intake, wire: _Wire, idle_seconds: float) -> None:
    held, worked, waited = 0, 0.0, 0.0
    while True:
        began = time.perf_counter()
        ready = intake.take(held, captioner.batch, idle_seconds)
        if ready is None:
            return  # the parent may live on with other work, and a GPU's memory isn't there to be held
        for request in ready:
            captioner.add(request)
        held += len(ready)
        if not held:
            continue
        taken = time.perf_counter()
        # Before the first photo of a run nobody waited for this model.
        waited += max(0.0, taken - max(began, intake.since))
        answers = captioner.step()
        worked += time.perf_counter() - taken
        if answers:
            held -= len(answers)
            wire.send(
                {
                    "answers": [_row(answer) for answer in answers],
                    "seconds": worked,
                    "waited": waited,
                }
            )
            worked = waited = 0.0


def _row(answer: Answer) -> list[Any]:
    return [
        answer.key,
        answer.text,
        answer.input_tokens,
        answer.output_tokens,
        answer.error_class,
        answer.error,
    ]


class _Wire:
    """JSON and bytes, both ways, and nothing that would have to be unpickled. Several threads may send."""

    def __init__(self, handle: int):
        self._ends, self._lock = Connection(handle), threading.Lock()

    def receive(self) -> dict[str, Any]:
        return json.loads(self._ends.recv_bytes())

    def receive_bytes(self) -> bytes:
        return self._ends.recv_bytes()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._ends.send_bytes(json.dumps(message).encode())


class _Intake:
    """Photos between the wire and the model; the parent sees to it that they are few."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready: list[Request] = []
        self._undecoded, self._all = 0, False
        self.since = 0.0
        """When the run began that the photos belong to, by time.perf_counter."""

    def comes(self, first: bool) -> None:
        with self._changed:
            self._undecoded, self._all = self._undecoded + 1, False
            if first:
                self.since = time.perf_counter()

    def decoded(self, request: Request | None) -> None:
        """None for a photo that is none."""
        with self._changed:
            self._undecoded -= 1
            self._ready += [request] if request else []
            self._changed.notify()

    def that_is_all(self) -> None:
        """No more are coming until these are answered."""
        with self._changed:
            self._all = True
            self._changed.notify()

    def take(self, held: int, enough: int, idle_seconds: float) -> list[Request] | None:
        """What is decoded, waited for until it makes `enough` with those `held`, or is all that comes.

        None when nothing has come for so long.
        """

        def worth_it() -> bool:
            there = held + len(self._ready)
            return there >= enough or (self._all and not self._undecoded)

        with self._changed:
            while not self._changed.wait_for(worth_it, idle_seconds):
                if not held and not self._ready and not self._undecoded:
                    return None
            ready, self._ready = self._ready, []
            self._all &= bool(held or ready)
            return ready


def _decode_ahead(wire: _Wire, max_side: int, intake: _Intake) -> None:
    """Photos from the wire to images, on other threads than the model's."""

    def one(key: str, prompt: str, data: bytes) -> None:
        wire.send({"decoding": key})
        request, bad = None, None
        try:
            request = Request(key, decode(data, max_side), prompt)
        except PhotoError as refused:
            bad = Answer(key, None, error_class=refused.error_class, error=str(refused))
        except Exception as unforeseen:
            bad = Answer(key, None, error_class=error_class(unforeseen), error=str(unforeseen))
        wire.send({"answers": [_row(bad)]} if bad else {"decoded": key})
        intake.decoded(request)

    decoders = ThreadPoolExecutor(_DECODERS)
    try:
        while True:
            photo = wire.receive()
            if "key" in photo:
                intake.comes(photo["first"])
                decoders.submit(one, photo["key"], photo["prompt"], wire.receive_bytes())
            else:
                intake.that_is_all()
    except (EOFError, OSError):  # the parent has hung up
        os._exit(0)


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)


def _be_the_first_to_go() -> None:
    """Where memory runs out, the kernel shall end this process: its parent and the executor's JVM can go on."""
    with suppress(OSError):  # elsewhere than on Linux, or in a sandbox
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__mp_main__":
    # A process that multiprocessing has started for a backend, with this file in it: vLLM's engine. It would live on
    # after this one is killed, and keep the GPU (vLLM issue 55510).
    _end_with(os.getppid())
if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
