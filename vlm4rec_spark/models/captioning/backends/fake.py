"""A captioner without a model: says the photo's mean colour, and fails on request. For tests of everything around it.

Where JSON is asked for it says the same in JSON.

Its `model` setting is a list of requests joined by `+`; any other word is none. `FAULT` or `FAULT:COLOUR`, colour being
red, green or blue, is for photos that are mostly of this colour:

- raise (an exception; red when no colour is named), empty (no text; blue), refuse, echo (the prompt), loop (a sentence
  again and again)
- exit (the process ends), hang (it says nothing for an hour), eat (it takes memory until it is ended)

And `NAME=VALUE`: ms (milliseconds that a call takes at least), fits (photos in a call for which there is memory), count
(a file that gets a line per photo), says (one text for every photo, as of a model that doesn't look), gpus (a file that
gets, per process, the GPUs that it may see), and, both in the one process that gets to make the file, die_once (the
parent is killed, a Python worker of Spark) and stall_once (it says nothing for an hour).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import Answer, Request

_COLOURS = {"raise": "red", "empty": "blue"}


class FakeCaptioner(BatchCaptioner):
    def __init__(self, requests: str, batch_size: int, json_schema: dict[str, Any] | None = None):
        super().__init__(batch_size)
        self.json = json_schema is not None
        words = requests.split("+")
        self.values = dict(word.split("=", 1) for word in words if "=" in word)
        if "gpus" in self.values:
            _append(self.values["gpus"], os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        faults = [word.partition(":") for word in words if "=" not in word]
        self.faults = {(name, colour or _COLOURS.get(name, "red")) for name, _, colour in faults}

    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        began = time.perf_counter()
        if len(batch) > int(self.values.get("fits", len(batch))):
            raise MemoryError(f"{len(batch)} photos don't fit")
        answers = [self._one(request.key, request.image, request.prompt) for request in batch]
        time.sleep(
            max(0.0, float(self.values.get("ms", 0)) / 1_000 - (time.perf_counter() - began))
        )
        return answers

    def _one(self, key: str, image: Image, prompt: str) -> Answer:
        if self._is_first("die_once"):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3_600)  # its own end is on the way
        if self._is_first("stall_once"):
            time.sleep(3_600)
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        if "count" in self.values:
            _append(self.values["count"], "1")
        text = self.values.get(
            "says", f"A thing of red {red // 32}, green {green // 32} and blue {blue // 32}."
        )
        if self.json:
            text = json.dumps({"kind": "thing", "colour": text[11:-1], "style": "unknown"})
        shades = {"red": red, "green": green, "blue": blue}
        for fault, colour in self.faults:
            others = (shade for name, shade in shades.items() if name != colour)
            if colour in shades and shades[colour] > 1.5 * max(others):
                text = _fail(fault, prompt, text)
        return Answer(key, text, len(prompt.split()), len(text.split()))

    def _is_first(self, fault: str) -> bool:
        """Whether this process makes the fault's file: one only, whichever of several comes first."""
        try:
            os.close(os.open(self.values[fault], os.O_CREAT | os.O_EXCL))
        except (KeyError, FileExistsError):
            return False
        return True


def _append(file: str, line: str) -> None:
    # O_APPEND: several processes write to the one file and no line is torn.
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def _fail(fault: str, prompt: str, text: str) -> str:
    """What is said in place of `text`, if anything is."""
    match fault:
        case "raise":
            raise RuntimeError("the fake was asked to fail on this photo")
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(3_600)
        case "eat":
            eaten = []
            while True:
                eaten.append(b"\1" * 10_000_000)
                time.sleep(0.002)
    said = {
        "empty": "",
        "refuse": "I'm sorry, I can't help with that.",
        "echo": prompt,
        "loop": 9 * text,
    }
    return said.get(fault, text)
