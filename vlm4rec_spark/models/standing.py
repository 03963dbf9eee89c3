"""Which lists may stand though items have come, gone or changed since they were made. numpy only.

Knows positions of the index and marks of its items; whether a user has changed is decided before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vlm4rec_spark.models.offer import Offer
from vlm4rec_spark.models.searcher import Searcher
from vlm4rec_spark.models.tastes import Tastes

_MARGIN = 1e-5
"""More than the error of a float32 score and of its rounding: who is that near is ranked again."""
_ROWS_AT_ONCE = 2**16


def marks(searcher: Searcher, offer: Offer, said: np.ndarray) -> np.ndarray:
    """int64 (items,): of each item of the index a hash of all that lists depend on: its vector and words, the group of
    its variants, and `said` (int64, of its row in the catalogue)."""
    names = pd.util.hash_array(searcher.ids)
    # A group is known by its first item, so that one that comes changes it for as few others as possible.
    group = names
    if offer.variants is not None:
        of, first, number = np.unique(offer.variants, return_index=True, return_inverse=True)
        group = np.where(of[number] >= 0, names[first[number]], names)
    words = np.append(pd.util.hash_array(np.asarray(searcher.vocabulary.to_pylist(), dtype=object)), np.uint64(0))
    found = np.empty(len(searcher), np.int64)
    for start in range(0, len(searcher), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        beside = np.column_stack([words[searcher.words[part]], group[part], said[part].view(np.uint64)])
        for row, (vector, more) in enumerate(zip(searcher.vectors[part], beside, strict=True), start):
            digest = hashlib.blake2b(vector.tobytes() + more.tobytes(), digest_size=8).digest()
            found[row] = int.from_bytes(digest, "little", signed=True)
    return found


def changed(searcher: Searcher, now: np.ndarray, ids: Sequence[str], before: np.ndarray) -> tuple[np.ndarray, int]:
    """bool (items,): whose mark is another than `before` (int64, of the items `ids`) or is new; and how many of `ids`
    the index has no more."""
    place = searcher.positions(ids)
    there = place >= 0
    same = np.zeros(len(searcher), bool)
    same[place[there]] = now[place[there]] == before[there]
    return ~same, int((~there).sum())


def stand(
    searcher: Searcher, asked: Tastes, offer: Offer, rules: np.ndarray, news: np.ndarray,
    held: Sequence[np.ndarray], last: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """bool (users,): the list would come out the same, though the items `news` (bool (items,)) have changed.

    held: int64 positions of what each list and history holds, -1 for an item of the list that is gone. last: float64
    score of the list's last place, -inf where a place is free. A list stands when nothing it holds has changed and no
    changed item that may be on it reaches its last place; what was passed over or hidden there had reached it too.
    """
    standing = np.array([not len(mine) or not ((mine < 0) | news[mine]).any() for mine in held], bool)
    least = last if offer.least is None else np.maximum(last, offer.least)
    for bits in np.unique(rules[standing]).tolist():
        among = np.flatnonzero(news & offer.eligible(bits))
        waiting = np.flatnonzero(standing & (rules == bits))
        if not len(among):
            continue
        step = asked.at_once(len(among))
        for users in (waiting[start : start + step] for start in range(0, len(waiting), step)):
            _, scores = asked.part(users).exact(searcher, among)
            best = np.nan_to_num(scores, nan=-np.inf).max(axis=1, initial=-np.inf)
            standing[users] = best < least[users] - _MARGIN
    return standing
