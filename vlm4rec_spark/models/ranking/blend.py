"""Tastes by content, blended with what is found together with users' histories. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import Candidates
from vlm4rec_spark.models.ranking.user_queries import Explanations, Queries, padded, within


class BlendedQuery:
    """Content and co-occurrence: an item scores (1 - share) x its content score + share x how strongly it is found with
    the user's history, the strongest 1. Without anything found the order is that of the content; with a share of 1 only
    what is found is recommended.
    """

    def __init__(
        self,
        content: Queries,
        cooccurrence: ItemItemScores,
        share: float,
        positions: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
    ):
        """positions: int64, of each user's items in the index, latest first; weights: of each of them."""
        self._content, self._cooccurrence, self._share = content, cooccurrence, share
        self._positions, self._weights = positions, weights

    def __len__(self) -> int:
        return len(self._content)

    def take(self, users: np.ndarray) -> BlendedQuery:
        mine = ([each[user] for user in users] for each in (self._positions, self._weights))
        return BlendedQuery(self._content.take(users), self._cooccurrence, self._share, *mine)

    def max_users_per_block(self, items: int) -> int:
        return self._content.max_users_per_block(items)

    def score_all(self, searcher: Searcher, among: np.ndarray | None = None) -> Candidates:
        if self._share == 1:
            return padded([within(among, *self._found(user))[1] for user in range(len(self))])
        positions, scores = self._content.score_all(searcher, among)
        scores = (1 - self._share) * scores
        for user in range(len(self)):
            columns, (found, strong) = within(among, *self._found(user))
            if len(found) and positions[user, 0] < 0:  # no content to speak
                positions[user, columns], scores[user, columns] = found, 0
            scores[user, columns] += self._share * strong.astype(np.float32)
        return Candidates(positions, scores)

    def search(self, searcher: Searcher, effort: Effort, more: np.ndarray) -> Candidates:
        """The best of either part, as many of each as the effort asks for, scored by both."""
        if self._share == 1:
            return self.score_all(searcher)
        near, _ = self._content.search(searcher, effort, more)
        wanted = []
        for user in range(len(self)):
            found, strong = self._found(user)
            strongest = found[np.argsort(-strong, kind="stable")[: effort.candidates + more[user]]]
            wanted.append(np.union1d(near[user][near[user] >= 0], strongest))
        positions, _ = padded([Candidates(mine, np.zeros(len(mine))) for mine in wanted])
        return Candidates(positions, self.scores(searcher, positions).astype(np.float32))

    def scores(self, searcher: Searcher, positions: np.ndarray) -> np.ndarray:
        found = self._share * self._strengths(range(len(self)), positions)
        if self._share == 1:
            return found
        return (1 - self._share) * np.nan_to_num(self._content.scores(searcher, positions)) + found

    def explain(self, searcher: Searcher, items: np.ndarray) -> Explanations:
        """Co-occurrence where it makes more of the score; then the item of the history that adds most to it."""
        because, _ = self._content.explain(searcher, items)
        strong = self._strengths(range(len(self)), items)
        content = np.nan_to_num(self._content.scores(searcher, items))
        by = (self._share * strong > (1 - self._share) * content) & (strong > 0)
        for user in np.flatnonzero(by.any(axis=1)).tolist():
            history = self._positions[user]
            near, weighted = self._cooccurrence.positions[history], self._weights[user][:, None]
            each = self._cooccurrence.strengths[history] * weighted
            adds = np.array(
                [np.where(near == item, each, 0).max(axis=1) for item in items[user, by[user]]]
            )
            because[user, by[user]] = history[adds.argmax(axis=1)]
        return Explanations(because, by)

    def _found(self, user: int) -> Candidates:
        return self._cooccurrence.scores_for(self._positions[user], self._weights[user])

    def _strengths(self, users: Sequence[int] | range, positions: np.ndarray) -> np.ndarray:
        """float64, of the same shape as the positions (users, items)."""
        strengths = np.zeros(positions.shape)
        for row, user in enumerate(users):
            found, strong = self._found(user)
            if len(found):
                place = np.searchsorted(found, positions[row]).clip(max=len(found) - 1)
                strengths[row] = np.where(found[place] == positions[row], strong[place], 0)
        return strengths
