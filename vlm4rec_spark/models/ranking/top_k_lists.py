"""Tastes to everybody's list: candidates, exclusions, rules and shared places together, until every list is full.

numpy only, so that a server can make lists too. Knows positions of the index; knows no user's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm4rec_spark.models.index.searcher import EXACT_COST, Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k import SPARE, Candidates, flat_exclusions, ordered, top_k
from vlm4rec_spark.models.ranking.user_queries import Queries, padded

_USERS_AT_ONCE = 1_024
_PLACES_AT_ONCE = 2**22
"""Candidates are held at a time, however deep a list has to be ranked."""
_DEEP = 64
"""Times k: where so many candidates haven't filled a list, the search is exact."""


class RankedLists(NamedTuple):
    """Finished lists: positions of items and their scores, both (users, k), -1 and NaN past the end.

    collapsed: int64 (n, 3), user, rank and position of each item that a variant on the list hides.
    """

    items: np.ndarray
    scores: np.ndarray
    collapsed: np.ndarray


def retrieve(
    searcher: Searcher,
    asked: Queries,
    excluded: list[np.ndarray],
    eligible: np.ndarray,
    k: int,
    effort: Effort | None,
) -> Candidates:
    """Positions and scores (users, k) of the best eligible items, -1 and NaN only where the catalogue has no more.

    With an `effort`, as many candidates more are fetched as the user may not get, and users who fall short are searched
    exactly. So is everybody where so few items are eligible that this costs less.
    """
    top, score = np.full((len(asked), k), -1, np.int64), np.full((len(asked), k), np.nan)
    few = np.flatnonzero(eligible)
    if not len(few):
        return Candidates(top, score)
    if effort is not None and EXACT_COST * len(few) < effort.cost(searcher):
        effort = None
    among = few if 2 * len(few) < len(searcher) else None
    rows = (
        asked.max_users_per_block(len(searcher) if among is None else len(few))
        if effort is None
        else _USERS_AT_ONCE
    )
    # Users with as many exclusions stand together: the block's most sets how much is fetched for all of it.
    order = np.argsort([len(positions) for positions in excluded], kind="stable")
    for start in range(0, len(asked), rows):
        users = order[start : start + rows]
        block, block_excluded = asked.take(users), [excluded[user] for user in users]
        exclusions = flat_exclusions(block_excluded, len(searcher))
        if effort is None:
            found = block.score_all(searcher, among)
        else:
            more = np.array([len(positions) for positions in block_excluded], np.int64)
            found = block.search(searcher, effort, more)
        near, scores = top_k(*found, exclusions, eligible, k + SPARE)
        # What a search has scored in float64 is scored for good.
        scores = scores if found.scores.dtype == np.float64 else block.scores(searcher, near)
        top[users], score[users] = ordered(near, scores, k)
    short = np.flatnonzero(top[:, -1] < 0) if k else np.empty(0, np.int64)
    if effort is not None and len(short):
        top[short], score[short] = retrieve(
            searcher, asked.take(short), [excluded[user] for user in short], eligible, k, None
        )
    return Candidates(top, score)


def recommend_lists(
    searcher: Searcher,
    asked: Queries,
    excluded: list[np.ndarray],
    offer: ListRules,
    rules: np.ndarray,
    k: int,
    effort: Effort | None,
    only: Sequence[np.ndarray | None] | None = None,
) -> RankedLists:
    """As `best`, by the offer and the rules (bits, int64 (users,)) of each user; and what was collapsed, (n, 3): user,
    place, position.

    As many candidates are ranked as it takes to fill the places. only: of users who may get no others, the positions of
    their items, -1 for one that the index doesn't hold.
    """
    top, scores = np.full((len(asked), k), -1, np.int64), np.full((len(asked), k), np.nan)
    collapsed = [np.empty((0, 3), np.int64)]
    narrowed = np.array(
        [only is not None and only[user] is not None for user in range(len(asked))], bool
    )

    def ranked(users: np.ndarray, bits: int, depth: int) -> Candidates:
        block, mine, eligible = (
            asked.take(users),
            [excluded[user] for user in users],
            offer.eligible(bits),
        )
        if only is not None and narrowed[users[0]]:
            return _of_these(searcher, block, mine, eligible, depth, [only[user] for user in users])
        deep = (
            Effort(effort.leaves, effort.candidates + depth - k)
            if effort and depth <= _DEEP * k
            else None
        )
        return retrieve(searcher, block, mine, eligible, depth, deep)

    for bits, narrow in sorted({*zip(rules.tolist(), narrowed.tolist(), strict=True)}):
        waiting, depth = (
            np.flatnonzero((rules == bits) & (narrowed == narrow)),
            offer.initial_depth(k),
        )
        while len(waiting):
            left, step = [np.empty(0, np.int64)], max(1, _PLACES_AT_ONCE // depth)
            for users in (waiting[start : start + step] for start in range(0, len(waiting), step)):
                near, near_scores = ranked(users, bits, depth)
                if offer.unrestricted:
                    top[users], scores[users] = near, near_scores
                    continue
                ranks, twins, ended = offer.select(near, near_scores, searcher.vectors, k)
                ended |= depth >= len(searcher)
                done = users[ended]
                there = ranks[ended] >= 0
                top[done] = np.where(there, np.take_along_axis(near[ended], ranks[ended], 1), -1)
                scores[done] = np.where(
                    there, np.take_along_axis(near_scores[ended], ranks[ended], 1), np.nan
                )
                twins = twins[ended[twins[:, 0]]]
                collapsed.append(np.column_stack([users[twins[:, 0]], twins[:, 1:]]))
                left.append(users[~ended])
            waiting, depth = np.concatenate(left), min(4 * depth, len(searcher))
    return RankedLists(top, scores, np.concatenate(collapsed))


def _of_these(
    searcher: Searcher,
    asked: Queries,
    excluded: list[np.ndarray],
    eligible: np.ndarray,
    k: int,
    only: Sequence[np.ndarray | None],
) -> Candidates:
    """As `best`, each user's list out of the items that are theirs alone."""
    mine = [
        np.unique(items[items >= 0]) if items is not None else np.empty(0, np.int64)
        for items in only
    ]
    candidates, _ = padded([Candidates(items, np.zeros(len(items))) for items in mine])
    if not candidates.shape[1]:
        return Candidates(np.full((len(asked), k), -1, np.int64), np.full((len(asked), k), np.nan))
    scores = asked.scores(searcher, candidates)
    there = np.where(np.isnan(scores), -1, candidates)  # of what a user's taste says nothing
    top, _ = top_k(there, scores, flat_exclusions(excluded, len(searcher)), eligible, k)
    return ordered(top, asked.scores(searcher, top), k)
