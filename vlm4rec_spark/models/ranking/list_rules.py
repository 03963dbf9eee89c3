"""A shop's rules for lists: eligible items, variants, caps and diversity. Imports numpy only.

Knows positions of the index, not SQL or users' ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from pydantic import Field

from vlm4rec_spark.models.index.blocks import blocks
from vlm4rec_spark.models.ranking.top_k import SCORE_DIGITS, Candidates, no_positions
from vlm4rec_spark.settings_base import Settings

AVAILABLE = 1
"""The bit of the rule that holds for everybody: the item is available."""
MAX_RULES = 62
"""The bits of an int64, without the sign and AVAILABLE."""
DIVERSITY_POOL = 5
"""Times k: diversity chooses from this many best candidates.

A list that they don't fill gets four times as many, and so on.
"""
_BLOCK_FLOATS = 2**20
"""Of candidates' vectors at a time, so that they stay in the core's caches."""
_BLOCK_USERS = 256
"""Their vectors stay in the cores' caches."""


class Rule(Settings):
    """Which items may be recommended, and to whom: SQL predicates over `items` and `users`.

    Null counts as false.
    """

    items: str = Field(min_length=1)
    users: str | None = Field(None, min_length=1)


class Cap(NamedTuple):
    """A list may have at most `limit` items of a group. groups: int64 (items,), -1: no group."""

    groups: ndarray
    limit: int


class Selection(NamedTuple):
    """Which ranked candidates of some users get on their lists.

    ranks: int64 (users, k), ranks of the candidates, -1 past the end of a list. collapsed: int64
    (n, 3), user, rank on the list and position of each hidden variant. complete: bool (users,), the
    list is full, or further candidates can't fill it.
    """

    ranks: ndarray
    collapsed: ndarray
    complete: ndarray


@dataclass(frozen=True)
class ListRules:
    """The rules, by position in the index.

    passed_rules: int64 (items,); bit r + 1 says that the item passes rule r, bit 0 is AVAILABLE.
    variants: int64 (items,); items of one number are variants of each other, -1 has none.
    caps: how many items of a group a list may have.
    similarity_threshold: items of a higher cosine count as variants. min_score: the lowest score.
    diversity: weight of dissimilarity against the score, in [0, 1); 0 ranks by score alone.
    """

    passed_rules: ndarray
    variants: ndarray | None = None
    caps: Sequence[Cap] = ()
    similarity_threshold: float | None = None
    min_score: float | None = None
    diversity: float = 0.0

    @property
    def unrestricted(self) -> bool:
        """Whether a list is simply the best eligible items."""
        no_variants = self.variants is None and self.similarity_threshold is None
        by_score = self.min_score is None and not self.diversity
        return no_variants and by_score and not self.caps

    def initial_depth(self, k: int) -> int:
        """How many candidates of each user `select` needs at first."""
        return DIVERSITY_POOL * k if self.diversity else k

    def eligible(self, rules: int) -> ndarray:
        """bool (items,), for users to whom the rules of these bits apply."""
        required = rules | AVAILABLE
        return (self.passed_rules & required) == required

    def select(
        self,
        candidates: Candidates,
        vectors: ndarray,
        k: int,
    ) -> Selection:
        """Select k of each user's ranked candidates.

        A variant of a selected item is collapsed into it. An item of a full group or of too low a
        score is skipped.
        """
        select = self._select_diverse if self.diversity else self._select_best
        return select(candidates, vectors, k)

    def _select_best(
        self,
        candidates: Candidates,
        vectors: ndarray,
        k: int,
    ) -> Selection:
        """Go through the candidates from the best on."""
        users, depth = candidates.positions.shape
        ranks = no_positions((users, k))
        listed = no_positions((users, k))
        lengths = np.zeros(users, np.int64)
        hidden_by = no_positions((users, depth))
        too_low = np.zeros(users, bool)
        for rank in range(depth):
            items = candidates.positions[:, rank]
            is_item = items >= 0
            if self.min_score is not None:
                scores = candidates.scores[:, rank]
                too_low |= is_item & (scores < self.min_score)
            fits = is_item & ~too_low & (lengths < k)
            if not fits.any():
                break
            is_variant = self._variants_of(items, listed, vectors)
            is_variant &= fits[:, None] & (listed >= 0)
            is_hidden = is_variant.any(axis=1)
            hidden_by[is_hidden, rank] = is_variant[is_hidden].argmax(axis=1)
            fits &= ~is_hidden & self._within_caps(items, listed)
            columns = lengths[fits]
            ranks[fits, columns] = rank
            listed[fits, columns] = items[fits]
            lengths += fits
        return _selection(candidates, ranks, hidden_by, too_low)

    def _variants_of(
        self,
        items: ndarray,
        listed: ndarray,
        vectors: ndarray,
    ) -> ndarray:
        """bool (users, k): the user's item is a variant of the listed one."""
        is_variant = np.zeros(listed.shape, bool)
        if self.variants is not None:
            group = self.variants[items][:, None]
            is_variant |= (self.variants[listed] == group) & (group >= 0)
        if self.similarity_threshold is not None:
            for block in blocks(len(items), _BLOCK_USERS):
                item_vectors = vectors[items[block], :, None]
                cosines = np.matmul(vectors[listed[block]], item_vectors)
                is_variant[block] |= self.is_similar(cosines[:, :, 0])
        return is_variant

    def is_similar(self, cosines: ndarray) -> ndarray:
        """bool, items of these cosines count as variants."""
        return np.round(cosines, SCORE_DIGITS) > self.similarity_threshold

    def _within_caps(self, items: ndarray, listed: ndarray) -> ndarray:
        """bool (users,): the user's list has room for another item of the item's groups."""
        within = np.ones(len(items), bool)
        for groups, limit in self.caps:
            group = groups[items]
            same_group = (groups[listed] == group[:, None]) & (listed >= 0)
            within &= (group < 0) | (same_group.sum(axis=1) < limit)
        return within

    def _select_diverse(
        self,
        candidates: Candidates,
        vectors: ndarray,
        k: int,
    ) -> Selection:
        """By maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998).

        The first item is the best candidate. The next one always has the highest
        (1 - diversity) * score - diversity * highest cosine with a listed item. These values are
        rounded; of equals the better ranked is selected. All candidates that are variants of a
        selected item are collapsed into the first such item.
        """
        positions, scores = candidates
        users, depth = positions.shape
        ranks = no_positions((users, k))
        hidden_by = no_positions(positions.shape)
        floats_per_user = depth * vectors.shape[1]
        for block in blocks(users, _BLOCK_FLOATS, floats_per_user):
            block_candidates = Candidates(positions[block], scores[block])
            pool = _DiversePool(self, block_candidates, vectors)
            for list_rank in range(k):
                chosen = pool.next_best()
                if chosen.max() < 0:
                    break
                ranks[block, list_rank] = chosen
                hidden_by[block][pool.select(chosen)] = list_rank
        too_low = np.zeros(users, bool)
        if self.min_score is not None:
            too_low = scores[:, -1] < self.min_score
        return _selection(candidates, ranks, hidden_by, too_low)


def _selection(
    candidates: Candidates,
    ranks: ndarray,
    hidden_by: ndarray,
    too_low: ndarray,
) -> Selection:
    """The lists of these ranks.

    hidden_by: int64 (users, candidates), the rank on the list of the item that hides the candidate,
    -1 for none. too_low: bool (users,), further candidates have too low a score.
    """
    users, columns = np.nonzero(hidden_by >= 0)
    variants = candidates.positions[users, columns]
    collapsed = np.stack([users, hidden_by[users, columns], variants], axis=1)
    is_full = ranks[:, -1] >= 0
    exhausted = candidates.positions[:, -1] < 0
    return Selection(ranks, collapsed, is_full | too_low | exhausted)


class _DiversePool:
    """The candidates of some users that aren't listed or hidden yet, all arrays (users, depth)."""

    def __init__(
        self,
        rules: ListRules,
        candidates: Candidates,
        vectors: ndarray,
    ):
        positions, scores = candidates
        self.rules = rules
        self.users = np.arange(len(positions))
        self.vectors = vectors[positions].astype(np.float64)
        self.relevance = (1 - rules.diversity) * scores
        # -1: the highest cosine with an empty list is as low as can be.
        self.highest_cosines = np.full(positions.shape, -1.0)
        self.free = positions >= 0
        if rules.min_score is not None:
            self.free &= scores >= rules.min_score
        self.variants = no_positions(positions.shape)
        if rules.variants is not None:
            self.variants = rules.variants[positions]
        # Of each cap, every candidate's group, and how many more of the group may be listed.
        self.caps = [
            (groups[positions], np.full(positions.shape, limit)) for groups, limit in rules.caps
        ]

    def next_best(self) -> ndarray:
        """The rank of each user's next candidate; -1 if there is none."""
        allowed = self.free.copy()
        for groups, room in self.caps:
            allowed &= (groups < 0) | (room > 0)
        redundancy = self.rules.diversity * self.highest_cosines
        rounded = np.round(self.relevance - redundancy, SCORE_DIGITS)
        ranks = np.where(allowed, rounded, -np.inf).argmax(axis=1)
        return np.where(allowed[self.users, ranks], ranks, -1)

    def select(self, ranks: ndarray) -> ndarray:
        """List the candidates of these ranks, -1: none. Returns the variants that they hide."""
        selected = ranks >= 0
        self.free[self.users[selected], ranks[selected]] = False
        cells = (self.users, ranks)
        selected_vectors = self.vectors[cells][:, :, None]
        cosines = np.matmul(self.vectors, selected_vectors)[:, :, 0]
        self.highest_cosines = np.maximum(self.highest_cosines, cosines)
        for groups, room in self.caps:
            room -= groups == groups[cells][:, None]
        hidden = self.variants == self.variants[cells][:, None]
        hidden &= self.variants >= 0
        if self.rules.similarity_threshold is not None:
            hidden |= self.rules.is_similar(cosines)
        hidden &= self.free & selected[:, None]
        self.free[hidden] = False
        return hidden
