"""What the index is searched for: users' queries.

A query is one vector (mean), a weighted history (max_similarity) or a few vectors (multi_taste).
Imports numpy only, so that a server can search too. Knows vectors and weights, not exclusions or
rules.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy import ndarray

from vlm4rec_spark.models.index.blocks import blocks
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import (
    SCORE_DIGITS,
    Candidates,
    is_in,
    lengths,
    no_candidates,
    no_positions,
    pad_positions,
    take_users,
)

Shape = Literal["mean", "max_similarity", "multi_taste"]
_BLOCK_SCORES = 2**24
"""Exact search holds this many float32 scores, one per query and item: 64 MB."""
_BLOCK_ITEMS = 4_096


class Explanations(NamedTuple):
    """Why items were recommended, both arrays (users, items).

    history_items: int64 position of the history item that speaks most for the item, -1 without one.
    by_item_item: bool, it speaks by the item-item score and not by content.
    """

    history_items: ndarray
    by_item_item: ndarray


class Queries(Protocol):
    """Queries of some users, in an order."""

    def __len__(self) -> int: ...

    def take(self, users: ndarray) -> Self:
        """The queries of the users at these positions (int64)."""

    def max_users_per_block(self, items: int) -> int:
        """How many users can be scored exactly against so many items in memory."""

    def score_all(self, searcher: Searcher, subset: ndarray | None = None) -> Candidates:
        """Every item as a candidate of every user.

        subset: sorted positions; only these items are scored.
        """

    def search(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> Candidates:
        """Approximate candidates with exact scores.

        leaves: of ScaNN's tree, to search. depths: int64 (users,), how many candidates each
        search for a user asks for. A user's candidates don't depend on the other users.
        """

    def scores(self, searcher: Searcher, positions: ndarray) -> ndarray:
        """float64 scores of some items of each user, (users, items).

        A score doesn't depend on what else is scored at the same time.
        """

    def explain(self, searcher: Searcher, items: ndarray) -> Explanations:
        """Why each item was recommended; items: positions (users, items)."""


def explain_by_content(
    histories: Sequence[ndarray],
    weights: Sequence[ndarray] | None,
    searcher: Searcher,
    items: ndarray,
) -> Explanations:
    """The item of the user's history with the highest (weighted) cosine, for each of `items`.

    items: positions (users, items). Of equals the earlier one is returned; -1 without a history.
    """
    nearest = no_positions(items.shape)
    for user, history in enumerate(histories):
        if len(history):
            cosines = searcher.vectors[items[user]] @ searcher.vectors[history].T
            if weights is not None:
                cosines = cosines * weights[user]
            nearest[user] = history[np.round(cosines, SCORE_DIGITS).argmax(axis=1)]
    nearest[items < 0] = -1
    return Explanations(nearest, np.zeros(items.shape, bool))


@dataclass(frozen=True)
class MeanQuery:
    """One unit vector per user. An item scores its cosine with it.

    vectors: float32 (users, dimension). histories: int64 positions of each user's items. They only
    explain, and are None if nobody asks for reasons.
    """

    vectors: ndarray
    histories: Sequence[ndarray] | None

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, users: ndarray) -> Self:
        histories = self.histories and take_users(self.histories, users)
        return replace(self, vectors=self.vectors[users], histories=histories)

    def max_users_per_block(self, items: int) -> int:
        return max(1, _BLOCK_SCORES // items)

    def score_all(self, searcher: Searcher, subset: ndarray | None = None) -> Candidates:
        return searcher.score_all(self.vectors, subset)

    def search(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> Candidates:
        candidates = searcher.search(self.vectors, _deepest(leaves, depths))
        columns = np.arange(candidates.positions.shape[1])
        candidates.positions[columns >= depths[:, None]] = -1
        return candidates

    def scores(self, searcher: Searcher, positions: ndarray) -> ndarray:
        scores = np.empty(positions.shape)
        vectors = self.vectors.astype(np.float64)
        for user, items in enumerate(positions):
            for block in blocks(len(items), _BLOCK_ITEMS):
                item_vectors = searcher.vectors[items[block]].astype(np.float64)
                scores[user, block] = item_vectors @ vectors[user]
        return scores

    def explain(self, searcher: Searcher, items: ndarray) -> Explanations:
        assert self.histories is not None
        return explain_by_content(self.histories, None, searcher, items)


class _UserVectors(NamedTuple):
    """vectors: float32 (vectors, dimension), each once. rows: the rows of each user's vectors."""

    vectors: ndarray
    rows: list[ndarray]


@dataclass(frozen=True)
class _MultiVectorQuery(ABC):
    """Some weighted vectors per user. An item scores its highest weighted cosine with one.

    rows: int64, each user's rows of `_table`. weights: float32, of each row.
    """

    rows: Sequence[ndarray]
    weights: Sequence[ndarray]

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, users: ndarray) -> Self:
        rows = take_users(self.rows, users)
        return replace(self, rows=rows, weights=take_users(self.weights, users))

    def max_users_per_block(self, items: int) -> int:
        longest = int(lengths(self.weights).max(initial=1))
        return max(1, _BLOCK_SCORES // items // longest)

    def score_all(self, searcher: Searcher, subset: ndarray | None = None) -> Candidates:
        """No candidates (-1) for a user without a history in this index."""
        vectors, rows = self._distinct_vectors(searcher)
        items, cosines = searcher.score_all(vectors, subset)
        candidates = no_candidates(len(self), items.shape[1], np.float32)
        for user, weights in enumerate(self.weights):
            if len(weights):
                weighted = cosines[rows[user]] * weights[:, None]
                candidates.positions[user] = items[rows[user][0]]
                candidates.scores[user] = weighted.max(axis=0)
        return candidates

    def search(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> Candidates:
        """The nearest items of each vector, merged for each user. Each vector is searched once.

        With e of the items excluded for a user, each item of the exact list is among the k + e
        nearest of its best vector. So only what ScaNN itself misses can be missing.
        """
        return pad(self._search_users(searcher, leaves, depths))

    def scores(self, searcher: Searcher, positions: ndarray) -> ndarray:
        scores = np.full(positions.shape, np.nan)
        table = self._table(searcher)
        for user, weights in enumerate(self.weights):
            if len(weights):
                vectors = table[self.rows[user]].astype(np.float64)
                item_vectors = searcher.vectors[positions[user]].astype(np.float64)
                cosines = item_vectors @ vectors.T
                scores[user] = (cosines * weights).max(axis=1)
        return scores

    def _search_users(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> list[Candidates]:
        vectors, rows = self._distinct_vectors(searcher)
        nearest = searcher.search(vectors, _deepest(leaves, depths))
        nearest = nearest._replace(scores=nearest.scores.astype(np.float32))
        return [
            _merge(nearest, rows[user], self.weights[user], depth)
            for user, depth in enumerate(depths.tolist())
        ]

    def _distinct_vectors(self, searcher: Searcher) -> _UserVectors:
        """The vectors of all users."""
        rows = np.concatenate([np.empty(0, np.int64), *self.rows])
        distinct, inverse = np.unique(rows, return_inverse=True)
        return _UserVectors(self._table(searcher)[distinct], _split(inverse, self.rows))

    @abstractmethod
    def _table(self, searcher: Searcher) -> ndarray:
        """The vectors that `rows` count, float32 (vectors, dimension)."""


@dataclass(frozen=True)
class MaxSimilarityQuery(_MultiVectorQuery):
    """A weighted history per user. An item scores its highest weighted cosine with one item.

    rows: positions of each user's items. weights: of each item, a user's heaviest is 1. neighbors:
    save searches, and change no list.
    """

    neighbors: Neighbors | None = None

    def explain(self, searcher: Searcher, items: ndarray) -> Explanations:
        return explain_by_content(self.rows, self.weights, searcher, items)

    def _search_users(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> list[Candidates]:
        """From the stored neighbors, if they are deep enough for the user."""
        neighbors = self.neighbors
        if neighbors is None or not neighbors.replace_search(searcher, leaves):
            return super()._search_users(searcher, leaves, depths)
        too_deep = np.flatnonzero(depths > neighbors.depth)
        deep_queries = replace(self.take(too_deep), neighbors=None)
        searched = deep_queries._search_users(searcher, leaves, depths[too_deep])
        candidates = dict(zip(too_deep.tolist(), searched, strict=True))
        nearest = Candidates(neighbors.positions, neighbors.cosines)
        for user, depth in enumerate(depths.tolist()):
            if depth <= neighbors.depth:
                candidates[user] = _merge(nearest, self.rows[user], self.weights[user], depth)
        return [candidates[user] for user in range(len(self))]

    def _table(self, searcher: Searcher) -> ndarray:
        return searcher.vectors


@dataclass(frozen=True)
class MultiTasteQuery(_MultiVectorQuery):
    """A few tastes per user: groups of similar items of the history, each as its mean.

    Ward's linkage on unit vectors, as in PinnerSage (Pal et al. 2020). A taste has the weight of
    its heaviest item. vectors: float32 (tastes, dimension) of all users, unit. histories: int64
    positions of each user's items, for the reasons.
    """

    vectors: ndarray
    histories: Sequence[ndarray]

    @classmethod
    def from_histories(
        cls,
        histories: Sequence[ndarray],
        weights: Sequence[ndarray],
        searcher: Searcher,
        max_tastes: int,
    ) -> Self:
        """Cluster each user's history; histories and weights as in `MaxSimilarityQuery`."""
        vectors = [np.empty((0, searcher.vectors.shape[1]), np.float32)]
        taste_weights = []
        for history, item_weights in zip(histories, weights, strict=True):
            tastes = _cluster(searcher.vectors[history], item_weights, max_tastes)
            vectors.append(tastes.vectors)
            taste_weights.append(tastes.weights)
        table = np.concatenate(vectors)
        rows = _split(np.arange(len(table)), taste_weights)
        return cls(rows, taste_weights, table, histories)

    def take(self, users: ndarray) -> Self:
        return replace(super().take(users), histories=take_users(self.histories, users))

    def explain(self, searcher: Searcher, items: ndarray) -> Explanations:
        return explain_by_content(self.histories, None, searcher, items)

    def _table(self, searcher: Searcher) -> ndarray:
        return self.vectors


class _Tastes(NamedTuple):
    """Unit vectors, float32 (tastes, dimension), and their weights."""

    vectors: ndarray
    weights: ndarray


def _cluster(
    vectors: ndarray,
    weights: ndarray,
    max_tastes: int,
) -> _Tastes:
    """The tastes of one user, in the order of their first items."""
    groups = np.arange(len(vectors))
    if len(vectors) > max_tastes:
        from scipy.cluster.hierarchy import fcluster, linkage

        tree = linkage(vectors.astype(np.float64), "ward")
        groups = fcluster(tree, max_tastes, "maxclust")
    distinct = dict.fromkeys(groups.tolist())
    centers = np.empty((len(distinct), vectors.shape[1]), np.float32)
    center_weights = np.empty(len(centers), np.float32)
    for row, group in enumerate(distinct):
        members = groups == group
        total = weights[members] @ vectors[members].astype(np.float64)
        length = np.linalg.norm(total)
        centers[row] = total / max(length, 1e-12)
        center_weights[row] = weights[members].max()
    return _Tastes(centers, center_weights)


def _deepest(leaves: int, depths: ndarray) -> Effort:
    """The effort of the query that needs most candidates: ScaNN takes one for all."""
    return Effort(leaves, int(depths.max(initial=0)))


def _split(rows: ndarray, groups: Sequence[ndarray]) -> list[ndarray]:
    """Divide the rows into groups of the same sizes."""
    return np.split(rows, np.cumsum(lengths(groups)))[:-1]


def restrict(candidates: Candidates, subset: ndarray | None) -> Candidates:
    """One user's candidates that are in `subset` (sorted positions; None: all)."""
    if subset is None:
        return candidates
    inside = is_in(candidates.positions, subset)
    return Candidates(candidates.positions[inside], candidates.scores[inside])


def pad(lists: Sequence[Candidates]) -> Candidates:
    """Each user's candidates as rows of the same length, -1 and NaN past the last."""
    positions = pad_positions([candidates.positions for candidates in lists])
    scores = np.full(positions.shape, np.nan, np.float32)
    for user, candidates in enumerate(lists):
        scores[user, : len(candidates.scores)] = candidates.scores
    return Candidates(positions, scores)


def _merge(
    nearest: Candidates,
    rows: ndarray,
    weights: ndarray,
    depth: int,
) -> Candidates:
    """The first candidates of one user's rows, each once, sorted by position.

    weights: of each row. A candidate has its highest weighted score.
    """
    weighted = nearest.scores[rows, :depth] * weights[:, None]
    positions = nearest.positions[rows, :depth].ravel()
    scores = weighted.ravel()
    order = np.lexsort((-scores, positions))
    positions = positions[order]
    is_new = np.diff(positions, prepend=-1) > 0
    is_first = is_new & (positions >= 0)
    return Candidates(positions[is_first], scores[order][is_first])
