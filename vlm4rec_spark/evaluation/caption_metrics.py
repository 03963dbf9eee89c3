"""Metrics of captions: do they tell items apart, are they right, have they changed, do they come
from the photos?

From plain texts and unit vectors, each metric next to a control. Knows neither Spark, nor a
captioner, nor where the texts come from. The same seed gives the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy import ndarray

from vlm4rec_spark.evaluation.inference import bootstrap_interval
from vlm4rec_spark.models.captioning.caption_template import attribute_values, extract_attributes

SPLIT = "captions"
"""The value of the column `split` of `metrics`."""
MIN_ITEMS = 30
"""Fewer items give no number: its interval would say nothing."""
MAX_VALUES = 500
"""An attribute with more values is free text or a number of the item's own, which no caption names.
"""
_TOP = 10


@dataclass(frozen=True)
class Figure:
    """A row of `metrics` without run_id and arm; `value` is None for fewer than MIN_ITEMS items."""

    metric: str
    value: float | None
    items: int
    low: float | None = None
    high: float | None = None
    k: int = 0

    def row(self, captioner: str) -> dict:
        row = asdict(self) | {"split": SPLIT, "arm": captioner, "control": "", "slice": "all"}
        row["users"] = row.pop("items")
        return row


@dataclass(frozen=True)
class Miss:
    """The caption at this index doesn't name the catalogue's value of an attribute."""

    index: int
    attribute: str
    value: str


def mean(
    metric: str,
    values: Sequence[float] | ndarray,
    seed: int,
    k: int = 0,
) -> Figure:
    """The mean over items, with its 95 % bootstrap interval."""
    array = np.asarray(values, float)
    if len(array) < MIN_ITEMS:
        return Figure(metric, None, len(array), k=k)
    low, high = bootstrap_interval(array, seed)
    return Figure(
        metric,
        float(array.mean()),
        len(array),
        low,
        high,
        k,
    )


def derangement(n: int, seed: int) -> ndarray:
    """A permutation of n >= 2 indexes that is one single cycle: no index maps to itself."""
    order = np.random.default_rng(seed).permutation(n)
    successors = np.empty(n, int)
    successors[order] = np.roll(order, 1)
    return successors


def distinct(
    metric: str,
    texts: int,
    captions: int,
) -> Figure:
    """The share of distinct texts. It has no interval: resampling makes duplicates."""
    return Figure(metric, texts / captions if captions >= MIN_ITEMS else None, captions)


def agreement(
    captions: Sequence[str],
    catalogue: Sequence[Mapping[str, str | None]],
    seed: int,
) -> tuple[list[Figure], list[Miss]]:
    """For each attribute, the share of items whose caption names the catalogue's value; and the
    captions that don't.

    The control `agreement_shuffled/…` takes the captions of other items: what captions reach that
    know the catalogue's words but not the photo. Only values that some caption names count, since
    others may not be visible. Attributes with fewer than MIN_ITEMS such items are left out.
    """
    figures: list[Figure] = []
    misses: list[Miss] = []
    if len(captions) < MIN_ITEMS:
        return figures, misses
    shuffled = derangement(len(captions), seed)
    rows = [{name: _normalized(value) for name, value in row.items() if value} for row in catalogue]
    for name, values in sorted(attribute_values(rows).items()):
        if not 2 <= len(values) <= MAX_VALUES:
            continue
        caption_values = _named_values(captions, values)
        nameable = set().union(*caption_values)
        expected = [(n, row[name]) for n, row in enumerate(rows) if row.get(name) in nameable]
        if len(expected) < MIN_ITEMS:
            continue
        hits = [value in caption_values[n] for n, value in expected]
        control = [value in caption_values[shuffled[n]] for n, value in expected]
        figures.append(mean(f"agreement/{name}", hits, seed))
        figures.append(mean(f"agreement_shuffled/{name}", control, seed))
        misses += [Miss(n, name, value) for n, value in expected if value not in caption_values[n]]
    return figures, misses


def _named_values(captions: Sequence[str], values: Sequence[str]) -> list[set[str]]:
    """The values that each caption names."""
    # Each value as an attribute: of one attribute only the first named value would be returned.
    phrases = {value: [value] for value in values}
    return [set(extract_attributes(caption, phrases)) for caption in captions]


def spread(misses: Sequence[Miss], limit: int) -> list[Miss]:
    """The first misses of every attribute in turn, at most one per item."""
    counts: dict[str, int] = {}
    turns = []
    for miss in misses:
        turn = counts.get(miss.attribute, 0)
        counts[miss.attribute] = turn + 1
        turns.append((turn, miss.attribute, miss.index, miss))
    by_item: dict[int, Miss] = {}
    for *_, miss in sorted(turns, key=lambda turn: turn[:3]):
        by_item.setdefault(miss.index, miss)
    return list(by_item.values())[:limit]


def drift(
    before: Sequence[str],
    now: Sequence[str],
    cosines: ndarray,
    seed: int,
) -> list[Figure]:
    """How many captions have changed, and their similarity to the earlier ones; none without
    earlier captions."""
    if not now:
        return []
    changed = [old != new for old, new in zip(before, now, strict=True)]
    return [mean("drift_changed", changed, seed), mean("drift_cosine", cosines, seed)]


def blank(
    captions: Sequence[str],
    vectors: ndarray,
    text: str,
    vector: ndarray,
    seed: int,
) -> list[Figure]:
    """Captions against the caption of a blank photo. As near to it as to each other, they don't
    depend on the photos."""
    figures = [
        mean("blank_equal", [caption == text for caption in captions], seed),
        mean("blank_cosine", vectors @ vector, seed),
    ]
    if len(captions) > 1:
        pairs = (vectors * vectors[derangement(len(captions), seed)]).sum(axis=1)
        figures.append(mean("pair_cosine", pairs, seed))
    return figures


def ranks(
    queries: ndarray,
    captions: ndarray,
    own: ndarray,
) -> ndarray:
    """Rank, from 1, of captions[own[i]] among `captions` (n, d) by cosine with queries[i]; (m, d),
    all of unit length.

    Ties count as the mean rank of the tied, so captions that are all equal give the rank of chance.
    """
    # Equal vectors once: their products with another may differ in the last digit.
    unique, inverse, counts = np.unique(
        captions,
        axis=0,
        return_inverse=True,
        return_counts=True,
    )
    cosines = np.round(queries @ unique.T, 6)
    own_cosines = np.take_along_axis(cosines, inverse.reshape(-1)[own][:, None], axis=1)
    return (cosines > own_cosines) @ counts + ((cosines == own_cosines) @ counts + 1) / 2


def retrieval(
    own_ranks: ndarray,
    captions: int,
    seed: int,
) -> list[Figure]:
    """Self-retrieval from the `ranks` of photos among so many captions, with what chance would
    give."""
    photos = len(own_ranks)
    if not photos:
        return []
    figures = []
    for k in (1, _TOP):
        figures.append(mean(f"self_rank_{k}", own_ranks <= k, seed, k))
        figures.append(Figure(f"self_rank_{k}_chance", min(1.0, k / captions), photos, k=k))
    median = float(np.median(own_ranks)) if photos >= MIN_ITEMS else None
    return [
        *figures,
        Figure("self_median_rank", median, photos),
        Figure("self_median_rank_chance", (captions + 1) / 2, photos),
    ]


def _normalized(text: str) -> str:
    """Values that differ only in case or spaces are one."""
    return " ".join(text.lower().split())
