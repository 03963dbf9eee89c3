"""The process around the model: photos' bytes in, captions out, over one socket. Decodes ahead of the model.

Started by `supervisor.py` and by nobody else. It ends when its parent does, whatever either of them is doing.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vlm4rec_spark.models.captioners import Captioner, ModelSettings, load_captioner
from vlm4rec_spark.models.images import PhotoError, decode

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends to a process when its parent ends."""


def main(handle: int, parent: int, idle_seconds: float) -> None:
    """Serve the parent at the socket `handle` until it hangs up, or has had nothing to ask for so long."""
    _end_with(parent)
    _be_the_first_to_go()
    wire = _Wire(handle)
    settings = ModelSettings.model_validate_json(json.dumps(wire.receive()))
    try:
        captioner = load_captioner(settings)
    except Exception as failure:
        wire.send({"cannot_load": f"{type(failure).__name__}: {failure}"[:2_000]})
        return
    wire.send({"loaded": True})
    decoded: queue.Queue[dict] = queue.Queue()
    at_work = threading.Event()
    threading.Thread(target=_decode_ahead, args=(wire, settings.max_side, at_work, decoded), daemon=True).start()
    free_since = time.perf_counter()
    while True:
        try:
            batch = decoded.get(timeout=idle_seconds)
        except queue.Empty:
            if at_work.is_set():
                continue
            return  # the parent may live on with other work, and a GPU's memory isn't there to be held
        began = time.perf_counter()
        if batch["first"]:  # before it nobody waited for this model
            free_since = began
        answer = _answer(captioner, batch)
        ended = time.perf_counter()
        wire.send(answer | {"batch": batch["batch"], "seconds": ended - began, "waited": began - free_since})
        free_since = ended


class _Wire:
    """JSON and bytes, both ways, and nothing that would have to be unpickled. Two threads may send."""

    def __init__(self, handle: int):
        self._ends, self._lock = Connection(handle), threading.Lock()

    def receive(self) -> dict[str, Any]:
        return json.loads(self._ends.recv_bytes())

    def receive_bytes(self) -> bytes:
        return self._ends.recv_bytes()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._ends.send_bytes(json.dumps(message).encode())


def _decode_ahead(wire: _Wire, max_side: int, at_work: threading.Event, decoded: queue.Queue[dict]) -> None:
    """Batches from the wire to images; the parent sees to it that few of them are on their way at once."""
    try:
        while True:
            batch = wire.receive()
            at_work.set()
            photos = [wire.receive_bytes() for _ in batch["keys"]]
            wire.send({"decoding": batch["batch"]})
            batch["images"], batch["bad"] = {}, {}
            for key, data in zip(batch["keys"], photos, strict=True):
                try:
                    batch["images"][key] = decode(data, max_side)
                except PhotoError as bad:
                    batch["bad"][key] = [bad.error_class, str(bad)]
                except Exception as unforeseen:
                    batch["bad"][key] = [error_class(unforeseen), str(unforeseen)]
            wire.send({"decoded": batch["batch"]})
            decoded.put(batch)
            at_work.clear()
    except (EOFError, OSError):  # the parent has hung up
        os._exit(0)


def _answer(captioner: Captioner, batch: dict) -> dict[str, Any]:
    """A caption for every image of the batch, or the error with which the model refused all of it."""
    keys = list(batch["images"])
    try:
        captions = captioner.caption(list(batch["images"].values()), [batch["prompt"]] * len(keys)) if keys else []
        said = {key: [c.text, c.input_tokens, c.output_tokens] for key, c in zip(keys, captions, strict=True)}
    except Exception as failure:
        return {"bad": batch["bad"], "failed": keys, "error_class": error_class(failure), "error": str(failure)}
    return {"bad": batch["bad"], "said": said}


def error_class(failure: Exception) -> str:
    """What the table `captions` calls it."""
    name = type(failure).__name__
    # MemoryError, torch.OutOfMemoryError
    return "out_of_memory" if "Memory" in name else name


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)


def _be_the_first_to_go() -> None:
    """Where memory runs out, the kernel shall end this process: its parent and the executor's JVM can go on."""
    with suppress(OSError):  # elsewhere than on Linux, or in a sandbox
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
