"""A captioner without a model, for tests: describes the photo's mean colour and fails on request.

With a JSON schema it gives the same description in JSON.
Its `model` setting joins instructions by `+`.

`FAULT` or `FAULT:COLOUR`, for photos that are mostly red, green or blue.
The default is red, or blue for `empty`.
- raise: an exception. empty: no text. refuse: a refusal. echo: the prompt. loop: a repetition.
- exit: the process ends. hang: no answer for an hour. eat: it takes memory until it is killed.

`NAME=VALUE`:
- ms: the shortest time of a call in milliseconds. fits: the photos of a call that memory allows.
- says: one text for all photos. count: a file that gets a line per photo.
- gpus: a file that gets a line per process with its visible GPUs.
- die_once, stall_once: the process that creates this file kills its parent, or hangs for an hour.

Any other word has no effect.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlm4rec_spark.models.captioning.backends.batches import BatchCaptioner
from vlm4rec_spark.models.captioning.captioner import Answer, Request


class FakeCaptioner(BatchCaptioner):
    def __init__(
        self, instructions: str, batch_size: int, json_schema: dict[str, Any] | None = None
    ):
        super().__init__(batch_size)
        self.json = json_schema is not None
        words = instructions.split("+")
        self.values = dict(word.split("=", 1) for word in words if "=" in word)
        self._log("gpus", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
        faults = [word.partition(":") for word in words if "=" not in word]
        self.faults = {
            (name, colour or ("blue" if name == "empty" else "red")) for name, _, colour in faults
        }

    def describe(self, batch: Sequence[Request]) -> list[Answer]:
        began = time.perf_counter()
        if len(batch) > int(self.values.get("fits", len(batch))):
            raise MemoryError(f"{len(batch)} photos don't fit")
        answers = [self._answer(request.key, request.image, request.prompt) for request in batch]
        shortest = float(self.values.get("ms", 0)) / 1_000
        time.sleep(max(0.0, shortest - (time.perf_counter() - began)))
        return answers

    def _answer(self, key: str, image: Image, prompt: str) -> Answer:
        if self._is_first("die_once"):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3_600)  # until it is killed too
        if self._is_first("stall_once"):
            time.sleep(3_600)
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        self._log("count", "1")
        colour = f"red {red // 32}, green {green // 32} and blue {blue // 32}"
        text = self.values.get("says", f"A thing of {colour}.")
        if self.json:
            text = json.dumps({"kind": "thing", "colour": colour, "style": "unknown"})
        shades = {"red": red, "green": green, "blue": blue}
        for fault, fault_colour in self.faults:
            rest = (shade for name, shade in shades.items() if name != fault_colour)
            if fault_colour in shades and shades[fault_colour] > 1.5 * max(rest):
                text = _fail(fault, prompt, text)
        return Answer(key, text, len(prompt.split()), len(text.split()))

    def _is_first(self, fault: str) -> bool:
        """Whether this process, as the first of several, creates the fault's file."""
        try:
            Path(self.values[fault]).touch(exist_ok=False)
        except (KeyError, FileExistsError):
            return False
        return True

    def _log(self, value: str, line: str) -> None:
        """Add a line to the file that the value names, if it is given."""
        if value in self.values:
            # Several processes write to the same file: lines stay whole in this mode.
            with Path(self.values[value]).open("a") as log:
                log.write(f"{line}\n")


def _fail(fault: str, prompt: str, text: str) -> str:
    """The text that the fault gives instead of `text`, if it gives any."""
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
    texts = {
        "empty": "",
        "refuse": "I'm sorry, I can't help with that.",
        "echo": prompt,
        "loop": 9 * text,
    }
    return texts.get(fault, text)
