"""What is popular, asked for as tastes are: the same for all users of a segment. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import Candidates
from vlm4rec_spark.models.ranking.user_queries import Explanations, padded, within

_SCORES_AT_ONCE = 2**22


class PopularityQuery:
    """Of users of whose taste nothing is known: an item scores how popular it is with their like."""

    def __init__(self, positions: Sequence[np.ndarray], shares: Sequence[np.ndarray]):
        """Of each user: int64 positions of popular items in the index, sorted, and the float64 share of each."""
        self._positions, self._shares = positions, shares

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, users: np.ndarray) -> PopularityQuery:
        return PopularityQuery(
            [self._positions[user] for user in users], [self._shares[user] for user in users]
        )

    def max_users_per_block(self, items: int) -> int:
        return max(1, _SCORES_AT_ONCE // max(1, *map(len, self._positions), 1))

    def score_all(self, searcher: Searcher, among: np.ndarray | None = None) -> Candidates:
        return padded(
            [
                within(among, mine, shares)[1]
                for mine, shares in zip(self._positions, self._shares, strict=True)
            ]
        )

    def search(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> Candidates:
        return self.score_all(searcher)

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        found = np.full(positions.shape, np.nan)
        for user, (mine, shares) in enumerate(zip(self._positions, self._shares, strict=True)):
            if len(mine):
                place = np.searchsorted(mine, positions[user]).clip(max=len(mine) - 1)
                found[user] = np.where(mine[place] == positions[user], shares[place], np.nan)
        return found

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        return Explanations(np.full(items.shape, -1, np.int64), np.zeros(items.shape, bool))
