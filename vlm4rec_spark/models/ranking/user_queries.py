"""What a search is asked with: users' tastes, each one vector (mean), a weighted history (max_similarity) or a few
vectors (multi_taste).

numpy only, so that a server can ask with them too. Knows vectors and weights; knows neither exclusions nor rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import SCORE_DIGITS, Candidates

Shape = Literal["mean", "max_similarity", "multi_taste"]
_SCORES_AT_ONCE = 2**24
"""Exact search holds one float32 per query and item: 64 MB of them at a time."""
_DEPTH_AT_ONCE = 4_096
_FLOATS_AT_ONCE = 2**20
"""Vectors that are compared at a time stay in the cores' caches."""


class Explanations(NamedTuple):
    """Of recommended items, both (users, items): the position of the history item that speaks for each, -1 without one;
    and whether it speaks by co-occurrence (bool) rather than by content."""

    history_items: np.ndarray
    by_item_item: np.ndarray


class Queries(Protocol):
    """Of some users, in an order."""

    def __len__(self) -> int: ...

    def take(self, users: np.ndarray) -> Queries:
        """Those at the positions `users` (int64)."""
        ...

    def max_users_per_block(self, items: int) -> int:
        """How many users can be scored exactly against so many items in the memory that there is for it."""
        ...

    def score_all(self, searcher: Searcher, among: np.ndarray | None = None) -> Candidates:
        """Every item, or those at the sorted positions `among`, as a candidate of every user: positions and scores,
        both (users, items)."""
        ...

    def search(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> Candidates:
        """Approximate candidates with exact scores, both (users, candidates); a position of -1 is none.

        more: int64 (users,), as many candidates each user gets beside the effort's, whoever is asked for besides.
        """
        ...

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        """float64 scores of some items of each user, (users, items), whatever else is scored at the same time."""
        ...

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        """For each item of each user, positions (users, items), that of the history item that speaks for it most, -1
        without one; and whether it speaks by co-occurrence (bool) rather than by content."""
        ...


def nearest(
    histories: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None,
    searcher: Searcher,
    items: np.ndarray,
) -> np.ndarray:
    """For each item of each user, (users, items), the item of the user's history of highest (weighted) cosine; ties:
    the earlier one; -1 without any."""
    because = np.full(items.shape, -1, np.int64)
    sizes = np.array([len(history) for history in histories], np.int64)
    for size in np.unique(sizes[sizes > 0]):
        alike = np.flatnonzero(sizes == size)
        step = max(1, _FLOATS_AT_ONCE // (searcher.vectors.shape[1] * (int(size) + items.shape[1])))
        for start in range(0, len(alike), step):
            users = alike[start : start + step]
            mine = np.stack([histories[user] for user in users])
            near = np.matmul(
                searcher.vectors[items[users]], searcher.vectors[mine].transpose(0, 2, 1)
            )
            if weights is not None:
                near = near * np.stack([weights[user] for user in users])[:, None, :]
            because[users] = np.take_along_axis(
                mine, np.round(near, SCORE_DIGITS).argmax(axis=2), 1
            )
    because[items < 0] = -1
    return because


class MeanQuery:
    """One unit vector per user; an item scores its cosine with it."""

    def __init__(self, vectors: np.ndarray, histories: Sequence[np.ndarray] | None):
        """vectors: float32 (users, dimension). histories: int64 positions of each user's items, for the reasons; None
        where nobody asks for any."""
        self._vectors, self._histories = vectors, histories

    def __len__(self) -> int:
        return len(self._vectors)

    def take(self, users: np.ndarray) -> MeanQuery:
        histories = None if self._histories is None else [self._histories[user] for user in users]
        return MeanQuery(self._vectors[users], histories)

    def max_users_per_block(self, items: int) -> int:
        return max(1, _SCORES_AT_ONCE // items)

    def score_all(self, searcher: Searcher, among: np.ndarray | None = None) -> Candidates:
        return searcher.exact(self._vectors, among)

    def search(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> Candidates:
        positions, scores = searcher.search(self._vectors, effort.with_more(more))
        positions[np.arange(positions.shape[1]) >= effort.candidates + more[:, None]] = -1
        return Candidates(positions, scores)

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        found = np.empty(positions.shape)
        for user, (vector, items) in enumerate(zip(self._vectors, positions, strict=True)):
            for start in range(0, len(items), _DEPTH_AT_ONCE):
                part = slice(start, start + _DEPTH_AT_ONCE)
                found[user, part] = searcher.vectors[items[part]].astype(
                    np.float64
                ) @ vector.astype(np.float64)
        return found

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        none = [np.empty(0, np.int64)] * len(self)
        return Explanations(
            nearest(self._histories or none, None, searcher, items), np.zeros(items.shape, bool)
        )


class _Several(ABC):
    """Some weighted vectors per user; an item scores its highest weighted cosine with one of them."""

    _weights: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self._weights)

    def max_users_per_block(self, items: int) -> int:
        longest = max((len(weights) for weights in self._weights), default=1)
        return max(1, _SCORES_AT_ONCE // items // max(1, longest))

    def score_all(self, searcher: Searcher, among: np.ndarray | None = None) -> Candidates:
        """No candidates (-1) for a user without a history in this index."""
        distinct, rows = self._asked(searcher)
        items = np.arange(len(searcher)) if among is None else among
        _, similar = searcher.exact(distinct, among)
        positions = np.full((len(self), len(items)), -1, np.int64)
        scores = np.full(positions.shape, np.nan, np.float32)
        for user, (mine, weights) in enumerate(zip(rows, self._weights, strict=True)):
            if len(mine):
                positions[user] = items
                scores[user] = (similar[mine] * weights[:, None]).max(axis=0)
        return Candidates(positions, scores)

    def search(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> Candidates:
        """The items nearest to each vector, searched once for all who have it, merged for each user.

        An item of the exact list is among the k + e nearest of the vector that it scores best with, where e of the
        items may not be recommended to the user: with so many candidates only ScaNN's own misses are missing.
        """
        return padded(self._candidates(searcher, effort, more))

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        found = np.full(positions.shape, np.nan)
        for user, (weights, items) in enumerate(zip(self._weights, positions, strict=True)):
            if len(weights):
                mine = self._of(user, searcher).astype(np.float64)
                found[user] = (searcher.vectors[items].astype(np.float64) @ mine.T * weights).max(
                    axis=1
                )
        return found

    def _candidates(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> list[Candidates]:
        """Of each user as `_merged`."""
        distinct, rows = self._asked(searcher)
        found, cosines = searcher.search(distinct, effort.with_more(more))
        cosines, deep = cosines.astype(np.float32), effort.candidates + more
        return [
            _merged(found[mine, :most], cosines[mine, :most] * weights[:, None])
            for mine, weights, most in zip(rows, self._weights, deep.tolist(), strict=True)
        ]

    @abstractmethod
    def _asked(self, searcher: Searcher) -> tuple[np.ndarray, list[np.ndarray]]:
        """The vectors of all users, each once, and per user which of them are theirs."""

    @abstractmethod
    def _of(self, user: int, searcher: Searcher) -> np.ndarray:
        """A user's vectors, (vectors, dimension)."""


class MaxSimilarityQuery(_Several):
    """A weighted history per user; an item scores its highest weighted cosine with one of its items."""

    def __init__(
        self,
        positions: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        neighbors: Neighbors | None = None,
    ):
        """positions: int64, of each user's items in the index; weights: float32, the heaviest of each user is 1;
        neighbours: spare searches, and change no list."""
        self._positions, self._weights, self._neighbours = positions, weights, neighbors

    def take(self, users: np.ndarray) -> MaxSimilarityQuery:
        positions, weights = (
            [each[user] for user in users] for each in (self._positions, self._weights)
        )
        return MaxSimilarityQuery(positions, weights, self._neighbours)

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        return Explanations(
            nearest(self._positions, self._weights, searcher, items), np.zeros(items.shape, bool)
        )

    def _candidates(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> list[Candidates]:
        """Out of the neighbours, where they are deep enough for the user."""
        known, deep = self._neighbours, effort.candidates + more
        if known is None or not known.merged_for(searcher, effort):
            return super()._candidates(searcher, effort, more)
        beyond = np.flatnonzero(deep > known.depth)
        searched = iter(
            super(MaxSimilarityQuery, self.take(beyond))._candidates(searcher, effort, more[beyond])
        )
        return [
            next(searched)
            if most > known.depth
            else _merged(
                known.positions[mine, :most], known.cosines[mine, :most] * weights[:, None]
            )
            for mine, weights, most in zip(
                self._positions, self._weights, deep.tolist(), strict=True
            )
        ]

    def _asked(self, searcher: Searcher) -> tuple[np.ndarray, list[np.ndarray]]:
        flat = np.concatenate(self._positions) if len(self) else np.empty(0, np.int64)
        distinct, rows = np.unique(flat, return_inverse=True)
        return searcher.vectors[distinct], _split(rows, self._positions)

    def _of(self, user: int, searcher: Searcher) -> np.ndarray:
        return searcher.vectors[self._positions[user]]


class MultiInterestQuery(_Several):
    """A few tastes per user: the history divided into groups of items that are alike, each the mean of its items.

    Ward's linkage on unit vectors, as in PinnerSage (Pal et al. 2020); a taste weighs what its heaviest item does.
    """

    def __init__(
        self,
        vectors: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        histories: Sequence[np.ndarray],
    ):
        """vectors: float32 (tastes, dimension) of each user, unit; weights: of each taste, the heaviest of a user is 1;
        histories: int64 positions of each user's items, for the reasons."""
        self._vectors, self._weights, self._histories = vectors, weights, histories

    @classmethod
    def of(
        cls,
        positions: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        searcher: Searcher,
        most: int,
    ) -> MultiInterestQuery:
        """At most `most` tastes of each user, out of the positions and weights of the history's items."""
        made = [
            _clusters(searcher.vectors[mine], heavy, most)
            for mine, heavy in zip(positions, weights, strict=True)
        ]
        return cls([vectors for vectors, _ in made], [heavy for _, heavy in made], positions)

    def take(self, users: np.ndarray) -> MultiInterestQuery:
        mine = (
            [each[user] for user in users]
            for each in (self._vectors, self._weights, self._histories)
        )
        return MultiInterestQuery(*mine)

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        return Explanations(
            nearest(self._histories, None, searcher, items), np.zeros(items.shape, bool)
        )

    def _asked(self, searcher: Searcher) -> tuple[np.ndarray, list[np.ndarray]]:
        empty = np.empty((0, searcher.vectors.shape[1]), np.float32)
        vectors = np.concatenate([empty, *self._vectors])
        return vectors, _split(np.arange(len(vectors)), self._weights)

    def _of(self, user: int, searcher: Searcher) -> np.ndarray:
        return self._vectors[user]


def _clusters(vectors: np.ndarray, weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors and weights of the groups, in the order of their first items."""
    if len(vectors) > most:
        from scipy.cluster.hierarchy import fcluster, linkage

        group = fcluster(linkage(vectors.astype(np.float64), "ward"), most, "maxclust")
    else:
        group = np.arange(len(vectors))
    found, heavy = [], []
    for each in dict.fromkeys(group.tolist()):
        members = group == each
        total = weights[members] @ vectors[members].astype(np.float64)
        found.append(total / max(np.linalg.norm(total), 1e-12))
        heavy.append(weights[members].max())
    return np.asarray(found, np.float32).reshape(-1, vectors.shape[1]), np.asarray(
        heavy, np.float32
    )


def _split(rows: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rows by user, each as many as the user has of `like`."""
    ends = np.cumsum([len(each) for each in like], dtype=np.int64).tolist()
    return [rows[start:end] for start, end in zip([0, *ends][:-1], ends, strict=True)]


def within(
    among: np.ndarray | None, items: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, Candidates]:
    """Where the items stand in `among` (sorted positions, None: all), and those that do, with their scores."""
    if among is None:
        return items, Candidates(items, scores)
    place = np.searchsorted(among, items)
    there = (place < len(among)) & (among[place.clip(max=len(among) - 1)] == items)
    return place[there], Candidates(items[there], scores[there])


def padded(lists: Sequence[Candidates]) -> Candidates:
    """Positions and scores of each user as rows of the same length, -1 and NaN past the last."""
    width = max((len(positions) for positions, _ in lists), default=0)
    positions, scores = (
        np.full((len(lists), width), -1, np.int64),
        np.full((len(lists), width), np.nan, np.float32),
    )
    for user, (mine, best) in enumerate(lists):
        positions[user, : len(mine)], scores[user, : len(mine)] = mine, best
    return Candidates(positions, scores)


def _merged(positions: np.ndarray, scores: np.ndarray) -> Candidates:
    """Each candidate once, with its highest score."""
    flat, best = positions.ravel(), scores.ravel()
    order = np.lexsort((-best, flat))
    flat, best = flat[order], best[order]
    first = (np.diff(flat, prepend=-1) > 0) & (flat >= 0)
    return Candidates(flat[first], best[first])
