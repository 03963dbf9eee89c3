"""Figures on captions: do they tell items apart, are they right, have they changed, do they come from the photos?

From plain texts and unit vectors, each figure beside a control. Knows neither Spark, nor a captioner, nor where the
texts come from. The same seed gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm4rec_spark.evaluation.inference import bootstrap_interval
from vlm4rec_spark.models.captioning.caption_template import attribute_values, extract_attributes

SPLIT = "captions"
"""What stands in the column `split` of `metrics`."""
LEAST_ITEMS = 30
"""Fewer give no number: its interval would say nothing."""
MOST_VALUES = 500
"""An attribute with more is a text or a number of the item's own, which no caption names."""
_CLOSE = 10


@dataclass(frozen=True)
class Figure:
    """A row of `metrics` without run_id and arm; `value` is None for fewer than LEAST_ITEMS items."""

    metric: str
    value: float | None
    items: int
    low: float | None = None
    high: float | None = None
    k: int = 0

    def row(self, arm: str) -> dict:
        return {
            "split": SPLIT,
            "arm": arm,
            "metric": self.metric,
            "k": self.k,
            "slice": "all",
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "users": self.items,
            "control": None,
            "p_value": None,
        }


@dataclass(frozen=True)
class Miss:
    """The caption at a place doesn't name what the catalogue says of its item."""

    place: int
    attribute: str
    value: str


def mean(metric: str, values: Sequence[float] | np.ndarray, seed: int, k: int = 0) -> Figure:
    """The mean over items, with its 95 % bootstrap interval."""
    array = np.asarray(values, float)
    if len(array) < LEAST_ITEMS:
        return Figure(metric, None, len(array), k=k)
    low, high = bootstrap_interval(array, seed)
    return Figure(metric, float(array.mean()), len(array), low, high, k)


def derangement(n: int, seed: int) -> np.ndarray:
    """For each of n >= 2 places another one, so that every place is somebody's: one ring through all of them."""
    order = np.random.default_rng(seed).permutation(n)
    others = np.empty(n, int)
    others[order] = np.roll(order, 1)
    return others


def distinct(metric: str, texts: int, captions: int) -> Figure:
    """The share of distinct texts. Without an interval: resampling makes twins."""
    return Figure(metric, texts / captions if captions >= LEAST_ITEMS else None, captions)


def agreement(
    captions: Sequence[str], catalogue: Sequence[Mapping[str, str | None]], seed: int
) -> tuple[list[Figure], list[Miss]]:
    """Of each attribute the share of items whose caption names the catalogue's value, and where it doesn't.

    Beside each stands `agreement_shuffled/…`, the same with the captions of other items' photos: what captions reach
    that know the catalogue's words but haven't seen the photo. Only values that some caption names count, since of the
    others it isn't known whether they can be seen; attributes with fewer than LEAST_ITEMS items with such a value are
    left out.
    """
    figures: list[Figure] = []
    misses: list[Miss] = []
    if len(captions) < LEAST_ITEMS:
        return figures, misses
    others = derangement(len(captions), seed)
    known = [{name: _plain(value) for name, value in row.items() if value} for row in catalogue]
    for name, values in sorted(attribute_values(known).items()):
        if not 2 <= len(values) <= MOST_VALUES:
            continue
        # Each value under a name of its own: `extract_attributes` then finds all that stand in a caption, not the first only.
        said = [
            set(extract_attributes(caption, {value: [value] for value in values}))
            for caption in captions
        ]
        spoken = set().union(*said)
        judged = [(place, row[name]) for place, row in enumerate(known) if row.get(name) in spoken]
        if len(judged) < LEAST_ITEMS:
            continue
        right = [value in said[place] for place, value in judged]
        figures.append(mean(f"agreement/{name}", right, seed))
        figures.append(
            mean(
                f"agreement_shuffled/{name}",
                [value in said[others[at]] for at, value in judged],
                seed,
            )
        )
        misses += [
            Miss(place, name, value)
            for (place, value), hit in zip(judged, right, strict=True)
            if not hit
        ]
    return figures, misses


def spread(misses: Sequence[Miss], most: int) -> list[Miss]:
    """The first misses of every attribute in turn, one of an item."""
    nth: dict[str, int] = {}
    turns = []
    for miss in misses:
        turns.append((nth.setdefault(miss.attribute, 0), miss.attribute, miss.place))
        nth[miss.attribute] += 1
    by_item: dict[int, Miss] = {}
    for _, miss in sorted(zip(turns, misses, strict=True), key=lambda pair: pair[0]):
        by_item.setdefault(miss.place, miss)
    return list(by_item.values())[:most]


def drift(
    before: Sequence[str], now: Sequence[str], cosines: np.ndarray, seed: int
) -> list[Figure]:
    """How many captions aren't what they were, and how near they are to it; none where no photo had another."""
    if not now:
        return []
    changed = [old != new for old, new in zip(before, now, strict=True)]
    return [mean("drift_changed", changed, seed), mean("drift_cosine", cosines, seed)]


def blank(
    captions: Sequence[str], vectors: np.ndarray, text: str, vector: np.ndarray, seed: int
) -> list[Figure]:
    """Captions beside what is said of a photo that shows nothing: as near to it as to each other, they show nothing."""
    figures = [
        mean("blank_equal", [caption == text for caption in captions], seed),
        mean("blank_cosine", vectors @ vector, seed),
    ]
    if len(captions) > 1:
        pairs = (vectors * vectors[derangement(len(captions), seed)]).sum(axis=1)
        figures.append(mean("pair_cosine", pairs, seed))
    return figures


def ranks(said: np.ndarray, known: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rank, from 1, of known[own[i]] among `known` (n, d) by cosine with said[i]; (m, d), all of unit length.

    Ties count as the mean rank of the tied, so that captions that are all alike give the rank of chance.
    """
    # Equal vectors once: their products with another may differ in the last digit.
    alone, place, count = np.unique(known, axis=0, return_inverse=True, return_counts=True)
    cosines = np.round(said @ alone.T, 6)
    mine = np.take_along_axis(cosines, place.reshape(-1)[own][:, None], axis=1)
    return (cosines > mine) @ count + ((cosines == mine) @ count + 1) / 2


def retrieval(found: np.ndarray, captions: int, seed: int) -> list[Figure]:
    """Self-retrieval from the `ranks` of photos among so many captions, beside what chance would give."""
    if not len(found):
        return []
    figures = []
    for k in (1, _CLOSE):
        figures.append(mean(f"self_rank_{k}", found <= k, seed, k))
        figures.append(Figure(f"self_rank_{k}_chance", min(1.0, k / captions), len(found), k=k))
    median = float(np.median(found)) if len(found) >= LEAST_ITEMS else None
    return [
        *figures,
        Figure("self_median_rank", median, len(found)),
        Figure("self_median_rank_chance", (captions + 1) / 2, len(found)),
    ]


def _plain(text: str) -> str:
    """Values that differ in case or spaces only are one."""
    return " ".join(text.lower().split())
