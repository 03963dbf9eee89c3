"""Queries of users without a usable history: they get what is popular. Imports numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy import ndarray

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.top_k import (
    Candidates,
    lengths,
    look_up,
    no_positions,
    take_users,
)
from vlm4rec_spark.models.ranking.user_queries import Explanations, pad, restrict

_BLOCK_SCORES = 2**22


@dataclass(frozen=True)
class PopularityQuery:
    """An item scores its popularity in the user's segment.

    popular: items of each user, sorted by position, with their float64 popularity.
    """

    popular: Sequence[Candidates]

    def __len__(self) -> int:
        return len(self.popular)

    def take(self, users: ndarray) -> Self:
        return type(self)(take_users(self.popular, users))

    def max_users_per_block(self, items: int) -> int:
        sizes = lengths([popular.positions for popular in self.popular])
        longest = int(sizes.max(initial=1))
        return max(1, _BLOCK_SCORES // longest)

    def score_all(self, searcher: Searcher, subset: ndarray | None = None) -> Candidates:
        return pad([restrict(popular, subset) for popular in self.popular])

    def search(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> Candidates:
        return self.score_all(searcher)

    def scores(self, searcher: Searcher, positions: ndarray) -> ndarray:
        return look_up(self.popular, positions, np.nan)

    def explain(self, searcher: Searcher, items: ndarray) -> Explanations:
        return Explanations(no_positions(items.shape), np.zeros(items.shape, bool))
