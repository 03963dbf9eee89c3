"""The process around the model: photos' bytes in, captions out, over one socket.

Decodes ahead of the model. Only `supervisor.py` starts it. It always ends when its parent does.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.backends.batches import error_class, failed
from vlm4rec_spark.models.captioning.captioner import (
    Answer,
    Captioner,
    ModelSettings,
    Request,
)
from vlm4rec_spark.models.photos.decode import decode

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends to a process when its parent ends."""
_DECODERS = 2
"""Threads. One decodes 60 JPEGs or 15 PNGs of 2,000 pixels a second; a GPU captions 11 photos.

Measured by benchmarks/decode.py.
"""


def main(handle: int, parent: int, idle_seconds: float) -> None:
    """Serve the parent at socket `handle` until it hangs up or is silent for `idle_seconds`."""
    _end_with(parent)
    _offer_to_the_oom_killer()
    channel = _Channel(handle)
    settings = channel.receive()
    model = ModelSettings.model_validate(settings["model"])
    try:
        captioner = load_captioner(model, settings["batch_size"], settings["json_schema"])
    except Exception as failure:
        error = f"be loaded: {type(failure).__name__}: {failure}"[:2_000]
        if error_class(failure) == "out_of_memory" and "CUDA" in str(failure):
            error += " Does another task use this GPU? See spark.task.resource.gpu.amount."
        channel.send({"cannot": error})
        return
    channel.send({"max_in_flight": captioner.max_in_flight})
    captioner.on_begin = lambda keys: channel.send_state("captioning", keys)
    queue = _DecodedQueue()
    decoding = threading.Thread(
        target=_decode_ahead, args=(channel, model.max_side, queue), daemon=True
    )
    decoding.start()
    try:
        _serve(captioner, queue, channel, idle_seconds)
    except RunError as failure:
        channel.send({"cannot": f"go on: {failure}"[:2_000]})


class _Channel:
    """JSON and bytes in both directions, without pickles. Several threads may send."""

    def __init__(self, handle: int):
        self._connection = Connection(handle)
        self._lock = threading.Lock()

    def receive(self) -> dict[str, Any]:
        return json.loads(self.receive_bytes())

    def receive_bytes(self) -> bytes:
        return self._connection.recv_bytes()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._connection.send_bytes(json.dumps(message).encode())

    def send_state(self, state: str, keys: Sequence[str]) -> None:
        self.send({"state": state, "keys": list(keys)})

    def send_answers(self, answers: Sequence[Answer], **times: float) -> None:
        self.send({"answers": [vars(answer) for answer in answers], **times})


class _DecodedQueue:
    """Photos between the channel and the model. The parent limits their number."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._decoded: list[Request] = []
        self._decoding = 0
        self._ended = False
        self.run_began = 0.0
        """When the photos' run began, by time.perf_counter."""

    def announce(self, first_of_run: bool) -> None:
        """A photo has arrived and will be decoded."""
        with self._changed:
            self._decoding += 1
            self._ended = False
            if first_of_run:
                self.run_began = time.perf_counter()

    def put(self, request: Request | None) -> None:
        """Add a decoded photo; None for one that can't be decoded."""
        with self._changed:
            self._decoding -= 1
            if request:
                self._decoded.append(request)
            self._changed.notify()

    def end(self) -> None:
        """No more photos come until the present ones are answered."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def take(self, in_model: int, batch_size: int, idle_seconds: float) -> list[Request] | None:
        """The decoded photos, once they make a batch with those `in_model`, or no more come.

        None if nothing came for `idle_seconds`.
        """

        def ready() -> bool:
            full = in_model + len(self._decoded) >= batch_size
            return full or (self._ended and not self._decoding)

        with self._changed:
            while not self._changed.wait_for(ready, idle_seconds):
                if not in_model and not self._decoded and not self._decoding:
                    return None
            requests = self._decoded
            self._decoded = []
            if not in_model and not requests:
                self._ended = False
            return requests


def _serve(
    captioner: Captioner, queue: _DecodedQueue, channel: _Channel, idle_seconds: float
) -> None:
    in_model = 0
    worked = 0.0
    starved_seconds = 0.0
    while True:
        began = time.perf_counter()
        requests = queue.take(in_model, captioner.batch_size, idle_seconds)
        if requests is None:
            return  # an idle model shouldn't occupy a GPU while the parent does other work
        for request in requests:
            captioner.add(request)
        in_model += len(requests)
        if not in_model:
            continue
        ready = time.perf_counter()
        # Before the first photo of a run nobody waited for this model.
        starved_seconds += max(0.0, ready - max(began, queue.run_began))
        answers = captioner.step()
        worked += time.perf_counter() - ready
        if answers:
            in_model -= len(answers)
            channel.send_answers(answers, seconds=worked, starved_seconds=starved_seconds)
            worked = 0.0
            starved_seconds = 0.0


def _decode_ahead(channel: _Channel, max_side: int, queue: _DecodedQueue) -> None:
    """Decode the channel's photos, on other threads than the model's."""

    def decode_one(key: str, prompt: str, data: bytes) -> None:
        channel.send_state("decoding", [key])
        request = None
        try:
            request = Request(key, decode(data, max_side), prompt)
        except Exception as failure:
            channel.send_answers([failed(key, failure)])
        else:
            channel.send_state("decoded", [key])
        queue.put(request)

    decoders = ThreadPoolExecutor(_DECODERS)
    try:
        while True:
            header = channel.receive()
            if "key" in header:
                queue.announce(header["first_of_run"])
                data = channel.receive_bytes()
                decoders.submit(decode_one, header["key"], header["prompt"], data)
            else:
                queue.end()
    except (EOFError, OSError):  # the parent has hung up
        os._exit(0)


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)


def _offer_to_the_oom_killer() -> None:
    """If memory runs out, the kernel ends this process. Its parent and the executor's JVM go on."""
    with suppress(OSError):  # not on Linux, or in a sandbox
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__mp_main__":
    # multiprocessing started this process for a backend, with this file in it: vLLM's engine.
    # It would outlive its killed parent and keep the GPU (vLLM issue 55510).
    _end_with(os.getppid())
if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
