"""The k best of a user's candidates, without excluded and ineligible items. Imports numpy only.

Positions are rows of the index, which is sorted by item id: a lower position is a smaller id.
"""

from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from numpy import ndarray

_T = TypeVar("_T")

SCORE_DIGITS = 6
"""Scores are rounded before ties break by item id."""
_SHORTLIST_FACTOR = 4
"""With this many times more candidates than needed, a shortlist is made before the sort."""

_NO_KEY = -np.iinfo(np.int64).max


class Candidates(NamedTuple):
    """Items and their scores, both (users, candidates), or (candidates,) for one user.

    positions: int64; -1 is no candidate.
    """

    positions: ndarray
    scores: ndarray


def look_up(
    candidates: Sequence[Candidates],
    positions: ndarray,
    default: float,
) -> ndarray:
    """float64 scores of some items of each user, of the same shape as the positions.

    candidates: of each user, sorted by position. An item that isn't one has the score `default`.
    """
    scores = np.full(positions.shape, default)
    for user, (ordered, user_scores) in enumerate(candidates):
        if len(ordered):
            index = np.searchsorted(ordered, positions[user]).clip(max=len(ordered) - 1)
            is_candidate = ordered[index] == positions[user]
            scores[user, is_candidate] = user_scores[index[is_candidate]]
    return scores


def lengths(lists: Sequence[Sized]) -> ndarray:
    """int64 (lists,)."""
    return np.array([len(values) for values in lists], np.int64)


def take_users(values: Sequence[_T], users: ndarray) -> list[_T]:
    """The values of these users. users: int64 positions in `values`."""
    return [values[user] for user in users]


def flat_exclusions(excluded: Sequence[ndarray], items: int) -> ndarray:
    """Sorted int64 codes `user * items + position` of the positions that users must not get.

    Each code stands once. A position of -1 is skipped.
    """
    if not len(excluded):
        return np.empty(0, np.int64)
    users = np.arange(len(excluded), dtype=np.int64)
    users = np.repeat(users, lengths(excluded))
    positions = np.concatenate(excluded).astype(np.int64)
    in_index = positions >= 0
    return np.unique(users[in_index] * items + positions[in_index])


def top_k(
    positions: ndarray,
    scores: ndarray,
    exclusions: ndarray,
    eligible: ndarray,
    k: int,
    rescore: Callable[[ndarray], ndarray] | None = None,
) -> Candidates:
    """The best k eligible candidates of every user that aren't excluded.

    positions, scores: (users, candidates), as in `Candidates`; a row has each position once.
    exclusions: as `flat_exclusions` makes them. eligible: bool (items,). rescore: exact scores of
    positions (users, items), for scores whose last digits change with the batch size. Returns
    positions and rounded scores, both (users, k), best first, ties by position. -1 and NaN fill
    short rows.
    """
    items = len(eligible)
    allowed = (positions >= 0) & eligible[positions]
    depth = k + int(np.bincount(exclusions // items).max(initial=0))
    if positions.shape[1] > _SHORTLIST_FACTOR * depth:
        positions, scores = _shortlist(positions, scores, allowed, depth)
        allowed = positions >= 0
    if len(exclusions):
        codes = np.arange(len(positions))[:, None] * items + positions
        allowed &= ~is_in(codes, exclusions)
    if rescore:
        positions = _shortlist(positions, scores, allowed, k).positions
        allowed = positions >= 0
        scores = rescore(positions)
    # Scores as integers: then a candidate's score and position fit in one sort key.
    allowed_scores = np.where(allowed, scores, 0.0).astype(float)
    rounded = np.round(allowed_scores * 10**SCORE_DIGITS).astype(np.int64)
    # A full order, so the cut is stable.
    keys = rounded * items + (items - 1 - positions)
    best = _largest(np.where(allowed, keys, _NO_KEY), k)
    valid = best > _NO_KEY
    best_scores, reversed_positions = np.divmod(best, items)
    best_positions = np.where(valid, items - 1 - reversed_positions, -1)
    return Candidates(best_positions, np.where(valid, best_scores / 10**SCORE_DIGITS, np.nan))


def no_candidates(
    users: int,
    width: int,
    dtype: npt.DTypeLike = np.float64,
) -> Candidates:
    """Arrays (users, width) without a candidate: -1 and NaN."""
    positions = no_positions((users, width))
    scores = np.full(positions.shape, np.nan, dtype)
    return Candidates(positions, scores)


def no_positions(shape: tuple[int, ...]) -> ndarray:
    """-1 everywhere."""
    return np.full(shape, -1, np.int64)


def pad_positions(lists: Sequence[Sized]) -> ndarray:
    """int64, each user's positions as rows of the same length, -1 past the last."""
    padded = no_positions((len(lists), int(lengths(lists).max(initial=0))))
    for user, positions in enumerate(lists):
        padded[user, : len(positions)] = positions
    return padded


def rank_in_group(sizes: ndarray) -> ndarray:
    """The rank of each row within its group, from 0, for sorted groups of these sizes."""
    starts = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) - np.repeat(starts, sizes)


def is_in(values: ndarray, ordered: ndarray) -> ndarray:
    """bool, the values that are in `ordered`, which is sorted and not empty."""
    index = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return ordered[index] == values


def _largest(keys: ndarray, k: int) -> ndarray:
    """The k largest keys of each row, largest first; _NO_KEY where there are fewer."""
    missing = max(0, k - keys.shape[1])
    negated = -np.pad(keys, ((0, 0), (0, missing)), constant_values=_NO_KEY)
    return -np.sort(np.partition(negated, k - 1, axis=1)[:, :k], axis=1)


def _shortlist(
    positions: ndarray,
    scores: ndarray,
    allowed: ndarray,
    depth: int,
) -> Candidates:
    """The `depth` best allowed candidates of each user, and those that rounding may add to them."""
    masked = np.where(allowed, scores, np.float32("-inf"))
    cut = max(masked.shape[1] - depth, 0)
    divided = np.partition(masked, cut, axis=1)
    last_scores = divided[:, cut, None]
    min_scores = last_scores - 2 * 10.0**-SCORE_DIGITS
    rows, columns = np.nonzero(allowed & (masked >= min_scores))
    counts = np.bincount(rows, minlength=len(masked))
    ranks = rank_in_group(counts)
    width = max(int(counts.max(initial=0)), 1)
    shortlist = no_candidates(len(masked), width, scores.dtype)
    shortlist.positions[rows, ranks] = positions[rows, columns]
    shortlist.scores[rows, ranks] = scores[rows, columns]
    return shortlist
