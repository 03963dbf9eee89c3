"""Candidates and exclusions to the final list. numpy only, so that a server can rank with it too.

Positions are rows of the index, which is sorted by item id: a lower position is a smaller id.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SCORE_DIGITS = 6
"""Scores are rounded before ties break by item id."""
_FEW = 4
"""From so many times as many candidates as are needed on, most are put aside before the rest are ordered."""
SPARE = 8
"""So many more than k are taken by float32 scores, whose last digits change with the batch size, and scored again."""


class Candidates(NamedTuple):
    """Items of users or queries: positions int64, -1 for none, and scores, both (users, candidates)."""

    positions: np.ndarray
    scores: np.ndarray


def flat_exclusions(excluded: list[np.ndarray], items: int) -> np.ndarray:
    """Sorted int64 codes `user * items + position` of the positions that each user must not get, each once; -1 is
    skipped."""
    sizes = [len(positions) for positions in excluded]
    users = np.repeat(np.arange(len(excluded), dtype=np.int64), sizes)
    positions = np.concatenate(excluded).astype(np.int64) if sizes else np.empty(0, np.int64)
    known = positions >= 0
    return np.unique(users[known] * items + positions[known])


def top_k(
    positions: np.ndarray, scores: np.ndarray, exclusions: np.ndarray, eligible: np.ndarray, k: int
) -> Candidates:
    """The best k eligible candidates of every user that aren't excluded.

    positions, scores: (users, candidates); a position of -1 is no candidate; no position may stand twice in a row.
    exclusions: as `flat_exclusions` makes them. eligible: bool (items,). Returns positions and rounded scores, both
    (users, k), best first, ties by position; -1 and NaN where a user has fewer.
    """
    users, items = len(positions), len(eligible)
    allowed = (positions >= 0) & eligible[positions]
    depth = k + int(np.bincount(exclusions // items).max()) if len(exclusions) else k
    if positions.shape[1] > _FEW * depth:
        positions, scores = _shortlist(positions, scores, allowed, depth)
        allowed = positions >= 0
    codes = np.arange(users, dtype=np.int64)[:, None] * items + positions
    if len(exclusions):
        found = np.searchsorted(exclusions, codes)
        allowed &= exclusions[np.minimum(found, len(exclusions) - 1)] != codes
    # One integer per candidate that orders by rounded score, then by position: a full order, so the cut is stable.
    rounded = np.round(np.where(allowed, scores, 0.0).astype(np.float64) * 10**SCORE_DIGITS).astype(
        np.int64
    )
    order = np.where(allowed, rounded * items + (items - 1 - positions), -np.iinfo(np.int64).max)
    width = min(k, positions.shape[1])
    part = (
        np.argpartition(-order, width - 1, axis=1)[:, :width]
        if width < positions.shape[1]
        else None
    )
    chosen = (
        np.broadcast_to(np.arange(positions.shape[1]), positions.shape) if part is None else part
    )
    chosen = np.take_along_axis(
        chosen, np.argsort(-np.take_along_axis(order, chosen, 1), axis=1, kind="stable"), 1
    )
    kept = np.take_along_axis(allowed, chosen, 1)
    top = np.full((users, k), -1, np.int64)
    best = np.full((users, k), np.nan)
    top[:, :width] = np.where(kept, np.take_along_axis(positions, chosen, 1), -1)
    best[:, :width] = np.where(
        kept, np.take_along_axis(rounded, chosen, 1) / 10**SCORE_DIGITS, np.nan
    )
    return Candidates(top, best)


def _shortlist(
    positions: np.ndarray, scores: np.ndarray, allowed: np.ndarray, depth: int
) -> Candidates:
    """The `depth` best allowed candidates of each user and those that rounding may put among them; -1 past the last."""
    masked = np.where(allowed, scores, np.float32("-inf"))
    last = masked.shape[1] - depth
    least = np.partition(masked, last, axis=1)[:, last, None] - 2 * 10.0**-SCORE_DIGITS
    rows, columns = np.nonzero(allowed & (masked >= least))
    sizes = np.bincount(rows, minlength=len(masked))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = len(masked), max(int(sizes.max(initial=0)), 1)
    near, near_scores = np.full(shape, -1, np.int64), np.full(shape, np.nan, scores.dtype)
    near[rows, place], near_scores[rows, place] = positions[rows, columns], scores[rows, columns]
    return Candidates(near, near_scores)


def ordered(positions: np.ndarray, scores: np.ndarray, k: int) -> Candidates:
    """The first k of the positions, (users, candidates), by their scores; ordered and padded as by `top_k`."""
    rounded = np.round(np.where(positions >= 0, scores, -np.inf), SCORE_DIGITS)
    chosen = np.lexsort((positions, -rounded), axis=1)[:, :k]
    top = np.take_along_axis(positions, chosen, 1)
    return Candidates(top, np.where(top >= 0, np.take_along_axis(rounded, chosen, 1), np.nan))
