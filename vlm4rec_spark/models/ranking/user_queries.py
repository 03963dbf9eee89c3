"""What the index is searched for: users' queries.

A query is one vector (mean), a weighted history (max_similarity) or a few vectors (multi_taste).
Imports numpy only, so that a server can search too. Knows vectors and weights, not exclusions or
rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from vlm4rec_spark.models.index.blocks import blocks
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import (
    SCORE_DIGITS,
    Candidates,
    lengths,
    no_candidates,
    no_positions,
    take_users,
)

Shape = Literal["mean", "max_similarity", "multi_taste"]
_BLOCK_SCORES = 2**24
"""Exact search holds this many float32 scores, one per query and item: 64 MB."""
_BLOCK_ITEMS = 4_096
_BLOCK_FLOATS = 2**20
"""Vectors that are compared at a time stay in the cores' caches."""


class Explanations(NamedTuple):
    """Why items were recommended, both arrays (users, items).

    history_items: int64 position of the history item that speaks most for the item, -1 without one.
    by_item_item: bool, it speaks by the item-item score and not by content.
    """

    history_items: np.ndarray
    by_item_item: np.ndarray


class Queries(Protocol):
    """Queries of some users, in an order."""

    def __len__(self) -> int: ...

    def take(self, users: np.ndarray) -> Queries:
        """The queries of the users at these positions (int64)."""
        ...

    def max_users_per_block(self, items: int) -> int:
        """How many users can be scored exactly against so many items in memory."""
        ...

    def score_all(self, searcher: Searcher, subset: np.ndarray | None = None) -> Candidates:
        """Every item as a candidate of every user.

        subset: sorted positions; only these items are scored.
        """
        ...

    def search(
        self,
        searcher: Searcher,
        effort: Effort,
        extra: np.ndarray,
    ) -> Candidates:
        """Approximate candidates with exact scores.

        extra: int64 (users,), candidates that each user gets beyond the effort's. A user's
        candidates don't depend on the other users.
        """
        ...

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        """float64 scores of some items of each user, (users, items).

        A score doesn't depend on what else is scored at the same time.
        """
        ...

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        """Why each item was recommended; items: positions (users, items)."""
        ...


def nearest_history_items(
    histories: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None,
    searcher: Searcher,
    items: np.ndarray,
) -> np.ndarray:
    """The item of the user's history with the highest (weighted) cosine, for each of `items`.

    items: positions (users, items). Returns positions of the same shape; -1 without a history. Of
    equals the earlier one is returned.
    """
    nearest = no_positions(items.shape)
    dimension = searcher.vectors.shape[1]
    sizes = lengths(histories)
    distinct_sizes = np.unique(sizes[sizes > 0])
    for size in distinct_sizes.tolist():
        same_size = np.flatnonzero(sizes == size)
        vectors_per_user = size + items.shape[1]
        for block in blocks(len(same_size), _BLOCK_FLOATS, dimension * vectors_per_user):
            users = same_size[block]
            history = np.stack(take_users(histories, users))
            history_vectors = searcher.vectors[history].transpose(0, 2, 1)
            item_vectors = searcher.vectors[items[users]]
            cosines = np.matmul(item_vectors, history_vectors)
            if weights is not None:
                user_weights = np.stack(take_users(weights, users))
                cosines = cosines * user_weights[:, None, :]
            columns = np.round(cosines, SCORE_DIGITS).argmax(axis=2)
            nearest[users] = np.take_along_axis(history, columns, 1)
    nearest[items < 0] = -1
    return nearest


def _explain_by_content(
    histories: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None,
    searcher: Searcher,
    items: np.ndarray,
) -> Explanations:
    history_items = nearest_history_items(histories, weights, searcher, items)
    return Explanations(history_items, np.zeros(items.shape, bool))


class MeanQuery:
    """One unit vector per user. An item scores its cosine with it."""

    def __init__(self, vectors: np.ndarray, histories: Sequence[np.ndarray] | None):
        """vectors: float32 (users, dimension). histories: int64 positions of each user's items.

        Histories only explain. They are None if nobody asks for reasons.
        """
        self._vectors = vectors
        self._histories = histories

    def __len__(self) -> int:
        return len(self._vectors)

    def take(self, users: np.ndarray) -> MeanQuery:
        histories = self._histories and take_users(self._histories, users)
        return MeanQuery(self._vectors[users], histories)

    def max_users_per_block(self, items: int) -> int:
        return max(1, _BLOCK_SCORES // items)

    def score_all(self, searcher: Searcher, subset: np.ndarray | None = None) -> Candidates:
        return searcher.score_all(self._vectors, subset)

    def search(
        self,
        searcher: Searcher,
        effort: Effort,
        extra: np.ndarray,
    ) -> Candidates:
        candidates = searcher.search(self._vectors, effort.with_extra(extra))
        depths = effort.candidates + extra
        columns = np.arange(candidates.positions.shape[1])
        candidates.positions[columns >= depths[:, None]] = -1
        return candidates

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        scores = np.empty(positions.shape)
        vectors = self._vectors.astype(np.float64)
        for user, items in enumerate(positions):
            for block in blocks(len(items), _BLOCK_ITEMS):
                item_vectors = searcher.vectors[items[block]].astype(np.float64)
                scores[user, block] = item_vectors @ vectors[user]
        return scores

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        histories = self._histories or [np.empty(0, np.int64)] * len(self)
        return _explain_by_content(histories, None, searcher, items)


class _UserVectors(NamedTuple):
    """vectors: float32 (vectors, dimension), each once. rows: the rows of each user's vectors."""

    vectors: np.ndarray
    rows: list[np.ndarray]


class _MultiVectorQuery(ABC):
    """Some weighted vectors per user. An item scores its highest weighted cosine with one."""

    _weights: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self._weights)

    def max_users_per_block(self, items: int) -> int:
        longest = int(lengths(self._weights).max(initial=1))
        return max(1, _BLOCK_SCORES // items // longest)

    def score_all(self, searcher: Searcher, subset: np.ndarray | None = None) -> Candidates:
        """No candidates (-1) for a user without a history in this index."""
        vectors, rows = self._all_vectors(searcher)
        items, cosines = searcher.score_all(vectors, subset)
        candidates = no_candidates(len(self), items.shape[1], np.float32)
        for user, weights in enumerate(self._weights):
            if len(weights):
                weighted = cosines[rows[user]] * weights[:, None]
                candidates.positions[user] = items[rows[user][0]]
                candidates.scores[user] = weighted.max(axis=0)
        return candidates

    def search(
        self,
        searcher: Searcher,
        effort: Effort,
        extra: np.ndarray,
    ) -> Candidates:
        """The nearest items of each vector, merged for each user. Each vector is searched once.

        With e of the items excluded for a user, each item of the exact list is among the k + e
        nearest of its best vector. So only what ScaNN itself misses can be missing.
        """
        return pad(self._search_users(searcher, effort, extra))

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        scores = np.full(positions.shape, np.nan)
        for user, weights in enumerate(self._weights):
            if len(weights):
                vectors = self._vectors_of(user, searcher).astype(np.float64)
                item_vectors = searcher.vectors[positions[user]].astype(np.float64)
                cosines = item_vectors @ vectors.T
                scores[user] = (cosines * weights).max(axis=1)
        return scores

    def _search_users(
        self,
        searcher: Searcher,
        effort: Effort,
        extra: np.ndarray,
    ) -> list[Candidates]:
        vectors, rows = self._all_vectors(searcher)
        items, cosines = searcher.search(vectors, effort.with_extra(extra))
        cosines = cosines.astype(np.float32)
        depths = effort.candidates + extra
        merged = []
        for user, depth in enumerate(depths.tolist()):
            cells = (rows[user], slice(depth))
            weights = self._weights[user][:, None]
            merged.append(_merge(items[cells], cosines[cells] * weights))
        return merged

    @abstractmethod
    def _all_vectors(self, searcher: Searcher) -> _UserVectors:
        """The vectors of all users."""

    @abstractmethod
    def _vectors_of(self, user: int, searcher: Searcher) -> np.ndarray:
        """One user's vectors, (vectors, dimension)."""


class MaxSimilarityQuery(_MultiVectorQuery):
    """A weighted history per user. An item scores its highest weighted cosine with one item."""

    def __init__(
        self,
        histories: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        neighbors: Neighbors | None = None,
    ):
        """histories: int64 positions of each user's items.

        weights: float32 of each item, a user's heaviest is 1. neighbors: save searches, and change
        no list.
        """
        self._histories = histories
        self._weights = weights
        self._neighbors = neighbors

    def take(self, users: np.ndarray) -> MaxSimilarityQuery:
        histories = take_users(self._histories, users)
        weights = take_users(self._weights, users)
        return MaxSimilarityQuery(histories, weights, self._neighbors)

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        return _explain_by_content(self._histories, self._weights, searcher, items)

    def _search_users(
        self,
        searcher: Searcher,
        effort: Effort,
        extra: np.ndarray,
    ) -> list[Candidates]:
        """From the stored neighbors, if they are deep enough for the user."""
        neighbors = self._neighbors
        if neighbors is None or not neighbors.replace_search(searcher, effort):
            return super()._search_users(searcher, effort, extra)
        depths = effort.candidates + extra
        too_deep = np.flatnonzero(depths > neighbors.depth)
        without_neighbors = MaxSimilarityQuery(self._histories, self._weights)
        deep_queries = without_neighbors.take(too_deep)
        searched = deep_queries._search_users(searcher, effort, extra[too_deep])
        candidates = dict(zip(too_deep.tolist(), searched, strict=True))
        for user, depth in enumerate(depths.tolist()):
            if depth <= neighbors.depth:
                cells = (self._histories[user], slice(depth))
                weights = self._weights[user][:, None]
                cosines = neighbors.cosines[cells] * weights
                candidates[user] = _merge(neighbors.positions[cells], cosines)
        return [candidates[user] for user in range(len(self))]

    def _all_vectors(self, searcher: Searcher) -> _UserVectors:
        items = np.concatenate([np.empty(0, np.int64), *self._histories])
        distinct, rows = np.unique(items, return_inverse=True)
        vectors = searcher.vectors[distinct]
        return _UserVectors(vectors, _split(rows, self._histories))

    def _vectors_of(self, user: int, searcher: Searcher) -> np.ndarray:
        return searcher.vectors[self._histories[user]]


class MultiTasteQuery(_MultiVectorQuery):
    """A few tastes per user: groups of similar items of the history, each as its mean.

    Ward's linkage on unit vectors, as in PinnerSage (Pal et al. 2020). An taste has the weight
    of its heaviest item.
    """

    def __init__(
        self,
        vectors: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        histories: Sequence[np.ndarray],
    ):
        """vectors: float32 (tastes, dimension) of each user, unit.

        weights: of each taste, a user's heaviest is 1. histories: int64 positions of each user's
        items, for the reasons.
        """
        self._vectors = vectors
        self._weights = weights
        self._histories = histories

    @classmethod
    def from_histories(
        cls,
        histories: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        searcher: Searcher,
        max_tastes: int,
    ) -> MultiTasteQuery:
        """Cluster each user's history; histories and weights as in `MaxSimilarityQuery`."""
        vectors = []
        taste_weights = []
        for history, item_weights in zip(histories, weights, strict=True):
            tastes = _cluster(searcher.vectors[history], item_weights, max_tastes)
            vectors.append(tastes.vectors)
            taste_weights.append(tastes.weights)
        return cls(vectors, taste_weights, histories)

    def take(self, users: np.ndarray) -> MultiTasteQuery:
        return MultiTasteQuery(
            take_users(self._vectors, users),
            take_users(self._weights, users),
            take_users(self._histories, users),
        )

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        return _explain_by_content(self._histories, None, searcher, items)

    def _all_vectors(self, searcher: Searcher) -> _UserVectors:
        dimension = searcher.vectors.shape[1]
        no_vectors = np.empty((0, dimension), np.float32)
        vectors = np.concatenate([no_vectors, *self._vectors])
        rows = np.arange(len(vectors))
        return _UserVectors(vectors, _split(rows, self._weights))

    def _vectors_of(self, user: int, searcher: Searcher) -> np.ndarray:
        return self._vectors[user]


class _Tastes(NamedTuple):
    """Unit vectors, float32 (tastes, dimension), and their weights."""

    vectors: np.ndarray
    weights: np.ndarray


def _cluster(
    vectors: np.ndarray,
    weights: np.ndarray,
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


def _split(rows: np.ndarray, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Divide the rows into groups of the same sizes."""
    ends = np.cumsum(lengths(groups))
    return np.split(rows, ends)[:-1]


def restrict(candidates: Candidates, subset: np.ndarray | None) -> Candidates:
    """One user's candidates that are in `subset` (sorted positions; None: all)."""
    if subset is None:
        return candidates
    index = np.searchsorted(subset, candidates.positions)
    index = index.clip(max=len(subset) - 1)
    inside = subset[index] == candidates.positions
    return Candidates(candidates.positions[inside], candidates.scores[inside])


def pad(lists: Sequence[Candidates]) -> Candidates:
    """Each user's candidates as rows of the same length, -1 and NaN past the last."""
    sizes = lengths([candidates.positions for candidates in lists])
    width = int(sizes.max(initial=0))
    padded = no_candidates(len(lists), width, np.float32)
    for user, (positions, scores) in enumerate(lists):
        padded.positions[user, : len(positions)] = positions
        padded.scores[user, : len(positions)] = scores
    return padded


def pad_positions(lists: Sequence[np.ndarray]) -> np.ndarray:
    """Each user's positions as rows of the same length, -1 past the last."""
    padded = no_positions((len(lists), int(lengths(lists).max(initial=0))))
    for user, positions in enumerate(lists):
        padded[user, : len(positions)] = positions
    return padded


def _merge(positions: np.ndarray, scores: np.ndarray) -> Candidates:
    """Each candidate once, with its highest score, sorted by position."""
    flat_positions = positions.ravel()
    flat_scores = scores.ravel()
    order = np.lexsort((-flat_scores, flat_positions))
    flat_positions = flat_positions[order]
    flat_scores = flat_scores[order]
    is_new = np.diff(flat_positions, prepend=-1) > 0
    is_first = is_new & (flat_positions >= 0)
    return Candidates(flat_positions[is_first], flat_scores[is_first])
