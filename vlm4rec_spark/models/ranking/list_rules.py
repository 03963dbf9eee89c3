"""What a shop lets be on a list: items by rule, and groups of items that share its places. numpy only.

Knows positions of the index; knows neither SQL nor users' ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vlm4rec_spark.models.ranking.top_k import SCORE_DIGITS

AVAILABLE = 1
"""The bit of the rule that holds for everybody: the item is there at all."""
MOST_RULES = 62
"""As many as an int64 has bits for, beside AVAILABLE."""
POOL = 5
"""Times k: diversity chooses from so many of the best candidates; from four times as many, and so on, for a list that
they don't fill."""
_FLOATS_AT_ONCE = 2**20
"""Of candidates' vectors: so many users' at a time, that they stay in the core's caches."""


class Rule(BaseModel):
    """Which items may be recommended, and to whom: SQL predicates over `items` and `users`; null is false."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: str = Field(min_length=1)
    users: str | None = Field(None, min_length=1)


class Selection(NamedTuple):
    """What `ListRules.select` has chosen from ranked candidates of some users.

    ranks: int64 (users, k), -1 where a place is free. collapsed: int64 (n, 3), user, rank on the list and position of each
    hidden variant. complete: bool (users,), the list is made, or further candidates can't fill it.
    """

    ranks: np.ndarray
    collapsed: np.ndarray
    complete: np.ndarray


@dataclass(frozen=True)
class ListRules:
    """By position in the index. allowed: int64 (items,), bit r + 1 says that the item passes rule r, bit 0 AVAILABLE.

    variants: int64 (items,), items of one number take one place, -1: alone. caps: such numbers, and how many of one may
    be on a list. alike: an item of a higher cosine with one on the list counts as its variant. least: lowest score.
    diversity: what unlikeness counts against the score, in [0, 1); 0: lists go by score alone.
    """

    allowed: np.ndarray
    variants: np.ndarray | None = None
    caps: Sequence[tuple[np.ndarray, int]] = ()
    similarity_threshold: float | None = None
    min_score: float | None = None
    diversity: float = 0.0

    @property
    def unrestricted(self) -> bool:
        """Whether a list is simply the best eligible items."""
        by_score = self.min_score is None and not self.diversity
        return (
            self.variants is None
            and not self.caps
            and self.similarity_threshold is None
            and by_score
        )

    def initial_depth(self, k: int) -> int:
        """How many candidates of each user `places` wants to begin with."""
        return POOL * k if self.diversity else k

    def eligible(self, rules: int) -> np.ndarray:
        """bool (items,), for users to whom the rules of these bits apply."""
        wanted = rules | AVAILABLE
        return (self.allowed & wanted) == wanted

    def select(self, top: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int) -> Selection:
        """Which of the ranked candidates, positions `top` and their scores (users, depth), get the k places.

        Taken from the best on: one that is a variant of a taken one is collapsed into its place, one of a full group or
        of too low a score is passed over. Returns ranks (users, k), -1 where a place is free; and the collapsed ones,
        (n, 3): user, place, position; and bool (users,): the list is made, or further candidates can't fill it.
        """
        if self.diversity:
            return self._diverse(top, scores, vectors, k)
        users, depth = top.shape
        ranks, taken = np.full((users, k), -1, np.int64), np.full((users, k), -1, np.int64)
        count, collapsed = np.zeros(users, np.int64), []
        low = np.zeros(users, bool)
        for rank in range(depth):
            item = top[:, rank]
            if self.min_score is not None:
                low |= (item >= 0) & (scores[:, rank] < self.min_score)
            live = (item >= 0) & (count < k) & ~low
            if not live.any():
                break
            twin = live[:, None] & (taken >= 0) & self._same(item, taken, vectors)
            hidden = np.flatnonzero(twin.any(axis=1))
            collapsed.append(np.stack([hidden, twin[hidden].argmax(axis=1), item[hidden]], axis=1))
            live[hidden] = False
            for groups, most in self.caps:
                group = groups[item]
                of_it = ((groups[taken] == group[:, None]) & (taken >= 0)).sum(axis=1)
                live &= (group < 0) | (of_it < most)
            chosen = np.flatnonzero(live)
            ranks[chosen, count[chosen]], taken[chosen, count[chosen]] = rank, item[chosen]
            count[chosen] += 1
        ended = (count == k) | low | (top[:, -1] < 0)
        hidden_items = np.concatenate(collapsed) if collapsed else np.empty((0, 3), np.int64)
        return Selection(ranks, hidden_items, ended)

    def _same(self, item: np.ndarray, taken: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """bool (users, k): the item is a variant of the one in the place."""
        same = np.zeros(taken.shape, bool)
        if self.variants is not None:
            group = self.variants[item]
            same |= (self.variants[taken] == group[:, None]) & (group >= 0)[:, None]
        if self.similarity_threshold is not None:
            for start in range(
                0, len(item), 256
            ):  # so many users' vectors at a time stay in the cores' caches
                part = slice(start, start + 256)
                cosines = np.matmul(vectors[taken[part]], vectors[item[part], :, None])[:, :, 0]
                same[part] |= np.round(cosines, SCORE_DIGITS) > self.similarity_threshold
        return same

    def _diverse(
        self, top: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int
    ) -> Selection:
        """As `places`, by maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): first the best candidate,
        then always the one of highest (1 - diversity) * score - diversity * highest cosine with an item on the list.

        These values are rounded; of equal ones the better ranked is taken. All candidates that are variants of an item
        on the list are collapsed, each into the first such place.
        """
        users, depth = top.shape
        ranks, shared = np.full((users, k), -1, np.int64), np.full((users, depth), -1, np.int64)
        step = max(1, _FLOATS_AT_ONCE // (depth * vectors.shape[1]))
        for start in range(0, users, step):
            part = slice(start, start + step)
            ranks[part], shared[part] = self._spread(top[part], scores[part], vectors, k)
        hidden, rank = np.nonzero(shared >= 0)
        ended = (ranks[:, -1] >= 0) | (top[:, -1] < 0)
        if self.min_score is not None:
            ended |= scores[:, -1] < self.min_score
        collapsed = np.stack([hidden, shared[hidden, rank], top[hidden, rank]], axis=1)
        return Selection(ranks, collapsed, ended)

    def _spread(
        self, top: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks (users, k) of the chosen, -1 where none is left; and the place that each candidate shares, or -1."""
        users = np.arange(len(top))
        near = vectors[top].astype(np.float64)
        ranks, shared = np.full((len(top), k), -1, np.int64), np.full(top.shape, -1, np.int64)
        # As far as can be from a list on which nothing is yet.
        closest = np.full(top.shape, -1.0)
        free = top >= 0 if self.min_score is None else (top >= 0) & (scores >= self.min_score)
        variants = np.full(top.shape, -1) if self.variants is None else self.variants[top]
        groups = [
            (numbers[top], np.zeros(top.shape, np.int64), most) for numbers, most in self.caps
        ]
        for place in range(k):
            allowed = free.copy()
            for group, listed, most in groups:
                allowed &= (group < 0) | (listed < most)
            worth = np.round((1 - self.diversity) * scores - self.diversity * closest, SCORE_DIGITS)
            rank = np.where(allowed, worth, -np.inf).argmax(axis=1)
            found = allowed[users, rank]
            if not found.any():
                break
            ranks[found, place] = rank[found]
            free[users[found], rank[found]] = False
            cosines = np.matmul(near, near[users, rank][:, :, None])[:, :, 0]
            closest = np.maximum(closest, cosines)
            for group, listed, _ in groups:
                listed += group == group[users, rank][:, None]
            twins = (variants == variants[users, rank][:, None]) & (variants >= 0)
            if self.similarity_threshold is not None:
                twins |= np.round(cosines, SCORE_DIGITS) > self.similarity_threshold
            twins &= free & found[:, None]
            shared[twins], free[twins] = place, False
        return ranks, shared
