"""How good a captioner is: the accuracy of its captions of held-out photos, and that of guesses."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.caption_template import extract_attributes
from vlm4rec_spark.models.captioning.captioner import (
    ModelSettings,
    Request,
    caption_all,
)
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.training.labelled import Labelled

_BATCH = 64
_MAX_PHOTOS = 2_000


@dataclass(frozen=True)
class Share:
    """Shares of `photos` with the true value of an attribute that has so many `values`."""

    photos: int
    values: int
    right: float
    """In the photo's caption."""
    blank: float
    """In a blank photo's caption."""
    majority: float
    """If every photo had the commonest value."""


def describe(
    folder: Path,
    photos: Sequence[Image.Image],
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The captions of the model in `folder`, by the ordinary backend and prompt.

    `progress` gets the number of captions after every batch.
    """
    captioner = load_captioner(ModelSettings(model=str(folder)), _BATCH)
    prompt = load_prompt("describe.1").text
    captions: list[str] = []
    for first in range(0, len(photos), _BATCH):
        batch = enumerate(photos[first : first + _BATCH])
        requests = [Request(str(number), photo, prompt) for number, photo in batch]
        captions += [answer.text or "" for answer in caption_all(captioner, requests).values()]
        progress(len(captions))
    return captions


def shares(
    captions: Sequence[str],
    blank_caption: str,
    truth: Sequence[Mapping[str, str]],
    values: Mapping[str, Sequence[str]],
) -> dict[str, Share]:
    """By attribute, over the photos whose true value is known."""
    named_by_photo = [extract_attributes(caption, values) for caption in captions]
    named_of_blank = extract_attributes(blank_caption, values)
    by_attribute = {}
    for name in values:
        pairs = [
            (in_caption.get(name), row[name])
            for in_caption, row in zip(named_by_photo, truth, strict=True)
            if row.get(name)
        ]
        if pairs:
            true_values = [true for _, true in pairs]
            commonest = Counter(true_values).most_common(1)[0][1]
            by_attribute[name] = Share(
                photos=len(pairs),
                values=len(values[name]),
                right=float(np.mean([value == true for value, true in pairs])),
                blank=float(np.mean([named_of_blank.get(name) == true for true in true_values])),
                majority=commonest / len(pairs),
            )
    return by_attribute


def blank(side: int = 128) -> Image.Image:
    return Image.new("RGB", (side, side), (160, 160, 160))


def held_out(
    folder: Path,
    labelled: Labelled,
    log: Callable[[str], None],
) -> dict[str, Share]:
    """The shares on the held-out photos, 2,000 at most."""
    rows = np.flatnonzero(labelled.held_out)[:_MAX_PHOTOS]
    photos = [Image.fromarray(labelled.photos[row].transpose(1, 2, 0)) for row in rows]
    captions = describe(
        folder,
        [blank(), *photos],
        lambda count: log(f"described {count - 1:,} of {len(rows):,} photos"),
    )
    truth = [
        {
            name: labelled.values[name][labels[row]]
            for name, labels in labelled.labels.items()
            if labels[row] >= 0
        }
        for row in rows
    ]
    return shares(captions[1:], captions[0], truth, labelled.values)
