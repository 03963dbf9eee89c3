"""How good a captioner is: what its captions say of photos that it never saw, beside what guessing gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm4rec_spark.models.captioning.caption_template import extract_attributes
from vlm4rec_spark.models.captioning.captioner import (
    ModelSettings,
    Request,
    caption_all,
    load_captioner,
)
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.training.labelled import Labelled

_TOGETHER = 64
_MOST = 2_000


@dataclass(frozen=True)
class Share:
    """Of an attribute: in how many of `photos` the caption names the true value; the same where every caption is that
    of a blank photo; and where each says the commonest value."""

    photos: int
    values: int
    right: float
    blank: float
    majority: float


def describe(
    folder: Path, photos: Iterable[Image.Image], say: Callable[[int], None] = lambda done: None
) -> list[str]:
    """The captions of the model in `folder`, by the ordinary backend and prompt; `say` is told how many are done."""
    captioner = load_captioner(ModelSettings(model=str(folder)), _TOGETHER)
    prompt, found, batch = load_prompt("describe.1").text, list[str](), list[Request]()
    for photo in photos:
        batch.append(Request(str(len(found) + len(batch)), photo, prompt))
        if len(batch) == _TOGETHER:
            found += _texts(captioner, batch)
            batch = []
            say(len(found))
    return found + _texts(captioner, batch)


def _texts(captioner, batch: Sequence[Request]) -> list[str]:  # type: ignore[no-untyped-def]
    return [answer.text or "" for answer in caption_all(captioner, batch).values()]


def shares(
    captions: Sequence[str],
    blank: str,
    truth: Sequence[Mapping[str, str]],
    values: Mapping[str, Sequence[str]],
) -> dict[str, Share]:
    """By attribute, over the photos whose true value is known."""
    said, nothing, found = (
        [extract_attributes(caption, values) for caption in captions],
        extract_attributes(blank, values),
        {},
    )
    for name in values:
        known = [
            (told.get(name), true[name])
            for told, true in zip(said, truth, strict=True)
            if true.get(name)
        ]
        if known:
            commonest = Counter(true for _, true in known).most_common(1)[0][1]
            found[name] = Share(
                len(known),
                len(values[name]),
                float(np.mean([told == true for told, true in known])),
                float(np.mean([nothing.get(name) == true for _, true in known])),
                commonest / len(known),
            )
    return found


def blank(side: int = 128) -> Image.Image:
    return Image.new("RGB", (side, side), (160, 160, 160))


def held_out(folder: Path, labelled: Labelled, say: Callable[[str], None]) -> dict[str, Share]:
    """The shares on the photos that the training kept for validation, 2,000 at most."""
    rows = np.flatnonzero(labelled.held_out)[:_MOST]
    pictures = [Image.fromarray(labelled.photos[row].transpose(1, 2, 0)) for row in rows]
    captions = describe(
        folder,
        [blank(), *pictures],
        lambda done: say(f"described {done:,} of {len(rows):,} photos"),
    )
    truth = [
        {
            name: labelled.values[name][each[row]]
            for name, each in labelled.labels.items()
            if each[row] >= 0
        }
        for row in rows
    ]
    return shares(captions[1:], captions[0], truth, labelled.values)
