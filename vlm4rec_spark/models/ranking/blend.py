"""Queries that blend content with items found together in histories. Imports numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy import ndarray

from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.top_k import Candidates, look_up, pad_positions, take_users
from vlm4rec_spark.models.ranking.user_queries import Explanations, Queries, pad, restrict


@dataclass(frozen=True)
class BlendedQuery:
    """An item scores (1 - share) x its content score + share x its item-item score.

    A user's strongest item-item score is 1. A user without any gets the order of the content. With
    a share of 1 only items with an item-item score are recommended.

    histories: int64 positions of each user's items, latest first. weights: of each item.
    """

    content: Queries
    item_item: ItemItemScores
    share: float
    histories: Sequence[ndarray]
    weights: Sequence[ndarray]

    def __len__(self) -> int:
        return len(self.content)

    def take(self, users: ndarray) -> Self:
        return replace(
            self,
            content=self.content.take(users),
            histories=take_users(self.histories, users),
            weights=take_users(self.weights, users),
        )

    def max_users_per_block(self, items: int) -> int:
        return self.content.max_users_per_block(items)

    def score_all(self, searcher: Searcher, subset: ndarray | None = None) -> Candidates:
        item_item = [restrict(candidates, subset) for candidates in self._item_item_candidates()]
        if self.share == 1:
            return pad(item_item)
        content = self.content.score_all(searcher, subset)
        positions = content.positions
        scores = (1 - self.share) * content.scores
        for user, candidates in enumerate(item_item):
            columns = candidates.positions
            if subset is not None:
                columns = np.searchsorted(subset, columns)
            if len(columns) and positions[user, 0] < 0:  # the user has no content score
                positions[user, columns] = candidates.positions
                scores[user, columns] = 0
            item_item_scores = candidates.scores.astype(np.float32)
            scores[user, columns] += self.share * item_item_scores
        return Candidates(positions, scores)

    def search(
        self,
        searcher: Searcher,
        leaves: int,
        depths: ndarray,
    ) -> Candidates:
        """The best candidates of each part, scored by both parts."""
        if self.share == 1:
            return self.score_all(searcher)
        content = self.content.search(searcher, leaves, depths)
        unions = []
        for user, item_item in enumerate(self._item_item_candidates()):
            order = np.argsort(-item_item.scores, kind="stable")
            strongest = item_item.positions[order[: depths[user]]]
            content_items = content.positions[user]
            content_items = content_items[content_items >= 0]
            unions.append(np.union1d(content_items, strongest))
        positions = pad_positions(unions)
        scores = self.scores(searcher, positions)
        return Candidates(positions, scores.astype(np.float32))

    def scores(self, searcher: Searcher, positions: ndarray) -> ndarray:
        item_item = self.share * look_up(self._item_item_candidates(), positions, 0.0)
        if self.share == 1:
            return item_item
        content = np.nan_to_num(self.content.scores(searcher, positions))
        return (1 - self.share) * content + item_item

    def explain(self, searcher: Searcher, items: ndarray) -> Explanations:
        """By item-item scores where they are the larger part of the score.

        Then the history item is the one that adds most to it.
        """
        history_items = self.content.explain(searcher, items).history_items
        item_item = look_up(self._item_item_candidates(), items, 0.0)
        content = np.nan_to_num(self.content.scores(searcher, items))
        larger = self.share * item_item > (1 - self.share) * content
        by_item_item = larger & (item_item > 0)
        for user in np.flatnonzero(by_item_item.any(axis=1)).tolist():
            columns = by_item_item[user]
            history_items[user, columns] = self._strongest_item(user, items[user, columns])
        return Explanations(history_items, by_item_item)

    def _strongest_item(self, user: int, items: ndarray) -> ndarray:
        """The item of the user's history that adds most to the item-item score of each item."""
        history = self.histories[user]
        neighbors = self.item_item.positions[history]
        weights = self.weights[user][:, None]
        strengths = self.item_item.strengths[history] * weights
        added = [np.where(neighbors == item, strengths, 0) for item in items]
        strongest = np.max(added, axis=2).argmax(axis=1)
        return history[strongest]

    def _item_item_candidates(self) -> list[Candidates]:
        """Items with an item-item score of each user, by position."""
        users = zip(self.histories, self.weights, strict=True)
        return [self.item_item.scores_for(history, weights) for history, weights in users]
