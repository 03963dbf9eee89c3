"""A captioner without a model: says the photo's mean colour, and fails on request. For tests of everything around it.

Its `model` setting is a list of faults joined by `+`: `demo` or any other word for none, `raise` for an exception on
photos that are mostly red, `empty` for an empty answer on photos that are mostly blue, `count=FILE` to append a line
per photo to a file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL.Image import Image

from vlm4rec_spark.models.captioners import Caption


class FakeCaptioner:
    def __init__(self, faults: str):
        words = faults.split("+")
        self.faults = set(words)
        self.count = next((word.removeprefix("count=") for word in words if word.startswith("count=")), None)

    def caption(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Caption]:
        return [self._one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _one(self, image: Image, prompt: str) -> Caption:
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
        if self.count:
            # O_APPEND: several workers write to the one file and no line is torn.
            handle = os.open(self.count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, b"1\n")
            os.close(handle)
        if "raise" in self.faults and red > 1.5 * max(green, blue):
            raise RuntimeError("the fake was asked to fail on red photos")
        if "empty" in self.faults and blue > 1.5 * max(red, green):
            return Caption("", len(prompt.split()), 0)
        text = f"A thing of red {red // 32}, green {green // 32} and blue {blue // 32}."
        return Caption(text, len(prompt.split()), len(text.split()))
