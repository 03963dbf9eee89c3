"""How hard an approximate search has to try, measured on some users' tastes against exact search. numpy only."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from vlm4rec_spark.models.index.searcher import EXACT_COST, Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k_lists import recommend_lists
from vlm4rec_spark.models.ranking.user_queries import Queries

_CANDIDATES = (1, 2, 4, 8, 16)
"""Times k: candidates that are rescored, beside those that the user may not get."""


@dataclass(frozen=True)
class Tried:
    """An effort, the recall@k measured with it, its lower 95 % bound, and lists a second on the driver."""

    effort: Effort
    recall: float
    low: float
    per_second: float


@dataclass(frozen=True)
class Calibration:
    """The search to use (None: exact) and the recall@k measured on `users` profiles with its lower 95 % bound.

    `tried`: the efforts that were measured on the way; `exact_per_second`: lists of an exact search.
    """

    effort: Effort | None
    recall: float
    low: float
    users: int
    tried: tuple[Tried, ...] = ()
    exact_per_second: float | None = None

    def words(self, leaves: int) -> str:
        if self.effort is None:
            return "exact"
        return (
            f"ScaNN, {self.effort.leaves} of {leaves} leaves, {self.effort.candidates} candidates"
        )


def cheapest(
    searcher: Searcher,
    asked: Queries,
    excluded: list[np.ndarray],
    offer: ListRules,
    rules: np.ndarray,
    k: int,
    promise: float,
) -> Calibration:
    """The cheapest effort whose lower 95 % bound of recall@k against exact search holds the promise.

    Recall is that of the best eligible items, before any share a place. Exact search when no effort holds it, or when
    none that does is cheaper. Costs are reckoned, not timed, so that the same index and tastes give the same effort.
    """
    started = time.monotonic()
    bare = ListRules(offer.allowed)
    truth = recommend_lists(searcher, asked, excluded, bare, rules, k, None).items
    exact_per_second = len(asked) / (time.monotonic() - started)
    if (truth < 0).all():
        return Calibration(None, 1.0, 1.0, len(asked))

    def measure(effort: Effort) -> Tried:
        started = time.monotonic()
        found = recommend_lists(searcher, asked, excluded, bare, rules, k, effort).items
        seconds = time.monotonic() - started
        shares = _recall(found, truth)
        low = shares.mean() - 1.96 * shares.std() / np.sqrt(len(shares))
        return Tried(effort, float(shares.mean()), float(low), len(asked) / seconds)

    tried: list[Tried] = []
    chosen, least = None, float(EXACT_COST * len(searcher))
    for candidates in (k * factor for factor in _CANDIDATES):
        leaves = 1
        while (
            leaves < searcher.manifest["leaves"]
            and Effort(leaves, candidates).cost(searcher) < least
        ):
            tried.append(measure(Effort(leaves, candidates)))
            if tried[-1].low >= promise:
                chosen, least = tried[-1], tried[-1].effort.cost(searcher)
            leaves *= 2
    there = len(_recall(truth, truth))
    if chosen is None:
        return Calibration(None, 1.0, 1.0, there, tuple(tried), exact_per_second)
    return Calibration(
        chosen.effort, chosen.recall, chosen.low, there, tuple(tried), exact_per_second
    )


def _recall(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of each user's exact list that was found; users without a list are left out."""
    hits = (found[:, :, None] == truth[:, None, :]) & (truth[:, None, :] >= 0)
    length = (truth >= 0).sum(axis=1)
    return hits.any(axis=1).sum(axis=1)[length > 0] / length[length > 0]
