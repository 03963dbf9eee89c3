"""A captioner without a model: says the photo's mean colour, and fails on request. For tests of everything around it.

Its `model` setting is a list of faults joined by `+`: `demo` or any other word for none, `raise` for an exception on
photos that are mostly red, `empty` for an empty answer on photos that are mostly blue, `count=FILE` to append a line
per photo to a file, `die_once=FILE` to end the whole process and `stall_once=FILE` to say nothing for an hour, both in
the one process that gets to make the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from PIL.Image import Image

from vlm4rec_spark.models.captioners import Caption


class FakeCaptioner:
    def __init__(self, faults: str):
        words = faults.split("+")
        self.faults = set(words)
        self.files = dict(word.split("=", 1) for word in words if "=" in word)

    def caption(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Caption]:
        return [self._one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _one(self, image: Image, prompt: str) -> Caption:
        if self._is_first("die_once"):
            os._exit(1)
        if self._is_first("stall_once"):
            time.sleep(3_600)
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        if "count" in self.files:
            # O_APPEND: several workers write to the one file and no line is torn.
            handle = os.open(self.files["count"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, b"1\n")
            os.close(handle)
        if "raise" in self.faults and red > 1.5 * max(green, blue):
            raise RuntimeError("the fake was asked to fail on red photos")
        if "empty" in self.faults and blue > 1.5 * max(red, green):
            return Caption("", len(prompt.split()), 0)
        text = f"A thing of red {red // 32}, green {green // 32} and blue {blue // 32}."
        return Caption(text, len(prompt.split()), len(text.split()))

    def _is_first(self, fault: str) -> bool:
        """Whether this process makes the fault's file: one only, whichever of several workers comes first."""
        try:
            os.close(os.open(self.files[fault], os.O_CREAT | os.O_EXCL))
        except (KeyError, FileExistsError):
            return False
        return True
