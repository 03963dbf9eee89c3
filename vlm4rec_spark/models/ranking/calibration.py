"""The effort that an approximate search needs, measured against exact search."""

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from vlm4rec_spark.models.index.searcher import EXACT_COST, Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, recommend_lists

_CANDIDATE_FACTORS = (1, 2, 4, 8, 16)
"""Times k: candidates that are rescored, in addition to a user's exclusions."""


@dataclass(frozen=True)
class EffortTrial:
    """An effort, the recall@k measured with it, its lower 95 % bound, and lists per second."""

    effort: Effort
    recall: float
    low: float
    per_second: float


@dataclass(frozen=True)
class Calibration:
    """The search to use (None: exact), and the recall@k with its lower 95 % bound on `users` users.

    trials: the measured efforts. exact_per_second: lists per second of an exact search.
    """

    effort: Effort | None
    recall: float
    low: float
    users: int
    trials: tuple[EffortTrial, ...] = ()
    exact_per_second: float | None = None

    def describe(self, leaves: int) -> str:
        """The search in words; leaves: those of the index."""
        effort = self.effort
        if effort is None:
            return "exact"
        return f"ScaNN, {effort.leaves} of {leaves} leaves, {effort.candidates} candidates"


def cheapest_effort(
    searcher: Searcher,
    requests: ListRequests,
    list_rules: ListRules,
    k: int,
    promise: float,
) -> Calibration:
    """The cheapest effort whose lower 95 % bound of recall@k is at least `promise`.

    Recall is measured on eligible items before variants are collapsed. Search is exact if no effort
    reaches the promise, or none that does is cheaper. Costs are computed, not timed. So the same
    index and queries give the same effort.
    """
    eligibility = ListRules(list_rules.passed_rules)
    started = time.monotonic()
    exact_lists = recommend_lists(searcher, requests, eligibility, k, None).items
    exact_per_second = len(requests) / (time.monotonic() - started)
    users = int((exact_lists >= 0).any(axis=1).sum())
    if not users:
        return Calibration(None, 1.0, 1.0, len(requests))

    trials: list[EffortTrial] = []
    best = Calibration(None, 1.0, 1.0, users)
    min_cost = float(EXACT_COST * len(searcher))
    for factor in _CANDIDATE_FACTORS:
        effort = Effort(1, factor * k)
        while effort.leaves < searcher.leaf_count and effort.cost(searcher) < min_cost:
            trial = _measure(searcher, requests, eligibility, effort, exact_lists)
            trials.append(trial)
            if trial.low >= promise:
                best = Calibration(effort, trial.recall, trial.low, users)
                min_cost = effort.cost(searcher)
            effort = Effort(2 * effort.leaves, effort.candidates)
    return replace(best, trials=tuple(trials), exact_per_second=exact_per_second)


def _measure(
    searcher: Searcher,
    requests: ListRequests,
    eligibility: ListRules,
    effort: Effort,
    exact_lists: ndarray,
) -> EffortTrial:
    started = time.monotonic()
    k = exact_lists.shape[1]
    lists = recommend_lists(searcher, requests, eligibility, k, effort).items
    seconds = time.monotonic() - started
    recalls = _recalls(lists, exact_lists)
    mean = float(recalls.mean())
    margin = 1.96 * recalls.std() / np.sqrt(len(recalls))
    return EffortTrial(effort, mean, float(mean - margin), len(requests) / seconds)


def _recalls(lists: ndarray, exact_lists: ndarray) -> ndarray:
    """The share of each user's exact list that was found. Users without a list are left out."""
    is_item = exact_lists >= 0
    hits = (lists[:, :, None] == exact_lists[:, None, :]) & is_item[:, None, :]
    lengths = is_item.sum(axis=1)
    hit_counts = hits.any(axis=1).sum(axis=1)
    has_list = lengths > 0
    return hit_counts[has_list] / lengths[has_list]
