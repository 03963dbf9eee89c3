"""Queries to everybody's list: candidates, exclusions and rules together, until every list is full.

Imports numpy only, so that a server can make lists too. Knows positions of the index, no user's id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import numpy as np
from numpy import ndarray

from vlm4rec_spark.models.index.blocks import blocks
from vlm4rec_spark.models.index.searcher import EXACT_COST, Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import ListRules, Selection
from vlm4rec_spark.models.ranking.top_k import (
    Candidates,
    flat_exclusions,
    lengths,
    no_candidates,
    pad_positions,
    take_users,
    top_k,
)
from vlm4rec_spark.models.ranking.user_queries import Queries

_BLOCK_USERS = 1_024
_BLOCK_CANDIDATES = 2**22
"""Candidates in memory at a time, however deep a list has to be ranked."""
_MAX_SEARCH_DEPTH = 64
"""Times k: if so many candidates haven't filled a list, its search is exact."""


class RankedLists(NamedTuple):
    """Finished lists: positions of items and scores, both (users, k), -1 and NaN past the end.

    collapsed: int64 (n, 3), user, rank on the list and position of each item that is hidden as a
    variant.
    """

    items: ndarray
    scores: ndarray
    collapsed: ndarray


@dataclass(frozen=True)
class ListRequests:
    """What lists are made from, for each user.

    excluded: int64 positions of items that the user must not get; -1 is skipped. rules: int64
    (users,), bits of the rules that apply to the user. only: the positions that a user may get, -1
    for an item outside the index; None for a user who may get all.
    """

    queries: Queries
    excluded: Sequence[ndarray]
    rules: ndarray
    only: Sequence[ndarray | None] | None = None

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, users: ndarray) -> Self:
        return replace(
            self,
            queries=self.queries.take(users),
            excluded=take_users(self.excluded, users),
            rules=self.rules[users],
            only=self.only and take_users(self.only, users),
        )

    def has_only(self) -> ndarray:
        """bool (users,): the user may get some items only."""
        if self.only is None:
            return np.zeros(len(self), bool)
        return np.array([items is not None for items in self.only], bool)


def retrieve(
    searcher: Searcher,
    queries: Queries,
    excluded: Sequence[ndarray],
    eligible: ndarray,
    k: int,
    effort: Effort | None,
) -> Candidates:
    """The best eligible items, (users, k). -1 and NaN fill a row only if the catalogue has no more.

    excluded: as in `ListRequests`. With an `effort`, as many additional candidates are searched as
    the user has exclusions. Users whose list isn't full are then searched exactly. So is everybody
    if so few items are eligible that this costs less.
    """
    best = no_candidates(len(queries), k)
    if not eligible.any():
        return best
    eligible_items = np.flatnonzero(eligible)
    if effort is not None and EXACT_COST * len(eligible_items) < effort.cost(searcher):
        effort = None
    subset = eligible_items if 2 * len(eligible_items) < len(searcher) else None
    search = _Retrieval(searcher, eligible, subset, effort)
    # Users with as many exclusions share a block: the most of them decide on its depth.
    order = np.argsort(lengths(excluded), kind="stable")
    for block in blocks(len(queries), search.max_users(queries)):
        users = order[block]
        block_excluded = take_users(excluded, users)
        top = search.top_k(queries.take(users), block_excluded, k)
        best.positions[users], best.scores[users] = top
    is_short = (best.positions < 0).any(axis=1)
    if effort is not None and is_short.any():
        users = np.flatnonzero(is_short)
        exact = retrieve(
            searcher,
            queries.take(users),
            take_users(excluded, users),
            eligible,
            k,
            None,
        )
        best.positions[users], best.scores[users] = exact
    return best


@dataclass(frozen=True)
class _Retrieval:
    """How the eligible items are searched.

    subset: their positions, if it pays to score these items only. effort: None is exact.
    """

    searcher: Searcher
    eligible: ndarray
    subset: ndarray | None
    effort: Effort | None

    def max_users(self, queries: Queries) -> int:
        """Users per block."""
        if self.effort is not None:
            return _BLOCK_USERS
        scored = self.searcher if self.subset is None else self.subset
        return queries.max_users_per_block(len(scored))

    def top_k(
        self,
        queries: Queries,
        excluded: Sequence[ndarray],
        k: int,
    ) -> Candidates:
        if self.effort is None:
            candidates = queries.score_all(self.searcher, self.subset)
        else:
            depths = self.effort.candidates + lengths(excluded)
            candidates = queries.search(self.searcher, self.effort.leaves, depths)
        exclusions = flat_exclusions(excluded, len(self.searcher))
        # Exact search scores in float32, whose last digits change with the batch size.
        is_float64 = candidates.scores.dtype == np.float64
        rescore = None if is_float64 else partial(queries.scores, self.searcher)
        return top_k(*candidates, exclusions, self.eligible, k, rescore)


class _Lists:
    """Lists of all users while they are made."""

    def __init__(self, users: int, k: int):
        self.best = no_candidates(users, k)
        self.collapsed = [np.empty((0, 3), np.int64)]

    def write(
        self,
        users: ndarray,
        candidates: Candidates,
        selection: Selection,
    ) -> None:
        """Write the lists of some users, to whom candidates and selection belong.

        A list that isn't complete yet is overwritten later.
        """
        ranks = selection.ranks
        is_item = ranks >= 0
        positions = np.take_along_axis(candidates.positions, ranks, 1)
        scores = np.take_along_axis(candidates.scores, ranks, 1)
        self.best.positions[users] = np.where(is_item, positions, -1)
        self.best.scores[users] = np.where(is_item, scores, np.nan)
        hidden = selection.collapsed[selection.complete[selection.collapsed[:, 0]]]
        hidden[:, 0] = users[hidden[:, 0]]
        self.collapsed.append(hidden)


def recommend_lists(
    searcher: Searcher,
    requests: ListRequests,
    list_rules: ListRules,
    k: int,
    effort: Effort | None,
) -> RankedLists:
    """The k best items of each user by the rules. Ranks as many candidates as that takes."""
    lists = _Lists(len(requests), k)
    for group in _groups(requests):
        eligible = list_rules.eligible(int(requests.rules[group[0]]))
        depth = list_rules.initial_depth(k)
        while len(group):
            incomplete = [np.empty(0, np.int64)]
            for block in blocks(len(group), _BLOCK_CANDIDATES, depth):
                users = group[block]
                block_requests = requests.take(users)
                deeper = _deepen(effort, k, depth)
                candidates = _rank(searcher, block_requests, eligible, depth, deeper)
                if list_rules.unrestricted:
                    lists.best.positions[users], lists.best.scores[users] = candidates
                    continue
                selection = list_rules.select(candidates, searcher.vectors, k)
                if depth >= len(searcher):
                    selection.complete[:] = True
                lists.write(users, candidates, selection)
                incomplete.append(users[~selection.complete])
            group = np.concatenate(incomplete)
            depth = min(4 * depth, len(searcher))
    return RankedLists(*lists.best, np.concatenate(lists.collapsed))


def _groups(requests: ListRequests) -> list[ndarray]:
    """The users divided by the rules that apply, and by whether they may get some items only."""
    keys = np.stack([requests.rules, requests.has_only()], axis=1)
    distinct = np.unique(keys, axis=0)
    return [np.flatnonzero((keys == key).all(axis=1)) for key in distinct]


def _deepen(
    effort: Effort | None,
    k: int,
    depth: int,
) -> Effort | None:
    """The effort for lists of `depth` items instead of k; None if exact search is better."""
    if effort is None or depth > _MAX_SEARCH_DEPTH * k:
        return None
    return Effort(effort.leaves, effort.candidates + depth - k)


def _rank(
    searcher: Searcher,
    requests: ListRequests,
    eligible: ndarray,
    k: int,
    effort: Effort | None,
) -> Candidates:
    """As `retrieve`, for one of `_groups`: all its users have an `only`, or none has."""
    if not requests.has_only().any():
        return retrieve(searcher, requests.queries, requests.excluded, eligible, k, effort)
    restrictions = [items for items in requests.only or () if items is not None]
    positions = pad_positions([np.unique(items[items >= 0]) for items in restrictions])
    scores = requests.queries.scores(searcher, positions)
    positions = np.where(np.isnan(scores), -1, positions)
    exclusions = flat_exclusions(requests.excluded, len(searcher))
    return top_k(positions, scores, exclusions, eligible, k)
