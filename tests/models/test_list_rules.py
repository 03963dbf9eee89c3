"""Rules, variants, caps, a lowest score and diversity together, against brute force in Python."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from small_indexes import EXACT, build_index, nothing, unit

from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import Cap, ListRules
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, recommend_lists
from vlm4rec_spark.models.ranking.user_queries import MeanQuery

DIMENSION = 8


class Expected(NamedTuple):
    """A list, and (rank, item) of each collapsed item."""

    items: list[int]
    collapsed: list[tuple[int, int]]


@dataclass
class BruteForce:
    """The list of one user, item by item."""

    vectors: np.ndarray
    scores: np.ndarray
    excluded: set[int]
    list_rules: ListRules
    rule_bits: int
    k: int

    def ranked(self) -> list[int]:
        """All eligible items, best first."""
        order = np.lexsort((np.arange(len(self.scores)), -self.scores))
        return [item for item in order.tolist() if self.eligible(item)]

    def eligible(self, item: int) -> bool:
        required = self.rule_bits | 1
        min_score = self.list_rules.min_score
        passes = self.list_rules.passed_rules[item] & required == required
        good = min_score is None or self.scores[item] >= min_score
        return bool(passes and good) and item not in self.excluded

    def are_variants(
        self,
        first: int,
        second: int,
    ) -> bool:
        variants = self.list_rules.variants
        threshold = self.list_rules.similarity_threshold
        if variants is not None and variants[first] == variants[second] >= 0:
            return True
        return threshold is not None and round(self.cosine(first, second), 6) > threshold

    def cosine(
        self,
        first: int,
        second: int,
    ) -> float:
        return float(self.vectors[first] @ self.vectors[second])

    def within_caps(
        self,
        item: int,
        items: list[int],
    ) -> bool:
        for groups, limit in self.list_rules.caps:
            listed = Counter(groups[items].tolist())
            if groups[item] >= 0 and listed[groups[item]] >= limit:
                return False
        return True

    def expected(self) -> Expected:
        if self.list_rules.diversity:
            return self.diverse_list()
        items: list[int] = []
        collapsed = []
        for item in self.ranked():
            if len(items) == self.k:
                break
            ranks = [rank for rank, other in enumerate(items) if self.are_variants(item, other)]
            if ranks:
                collapsed.append((ranks[0], item))
            elif self.within_caps(item, items):
                items.append(item)
        return Expected(items, collapsed)

    def diverse_list(self) -> Expected:
        """From the 5 k best candidates; else from the 20 k best, and so on, until it is full."""
        ranked = self.ranked()
        pool = 5 * self.k
        while True:
            expected = self.diverse_items(ranked[:pool])
            if len(expected.items) == self.k or pool >= len(ranked):
                in_order = sorted(expected.collapsed, key=lambda pair: ranked.index(pair[1]))
                return Expected(expected.items, in_order)
            pool *= 4

    def diverse_items(self, candidates: list[int]) -> Expected:
        items: list[int] = []
        collapsed = []
        while len(items) < self.k:
            fitting = [item for item in candidates if self.within_caps(item, items)]
            if not fitting:
                break
            # Of equal values the first, which is ranked better.
            values = [self.value(item, items) for item in fitting]
            chosen = fitting[values.index(max(values))]
            candidates = [item for item in candidates if item != chosen]
            variants = [item for item in candidates if self.are_variants(item, chosen)]
            collapsed += [(len(items), item) for item in variants]
            candidates = [item for item in candidates if item not in variants]
            items.append(chosen)
        return Expected(items, collapsed)

    def value(
        self,
        item: int,
        items: list[int],
    ) -> float:
        diversity = self.list_rules.diversity
        nearest = max((self.cosine(item, other) for other in items), default=0.0)
        return round((1 - diversity) * self.scores[item] - diversity * nearest, 6)


@dataclass
class RandomShop:
    searcher: Searcher
    query_vectors: np.ndarray
    requests: ListRequests
    list_rules: ListRules
    k: int

    def expected(self, user: int) -> Expected:
        requests = self.requests
        excluded = {*requests.excluded[user].tolist()}
        if requests.only is not None and requests.only[user] is not None:
            excluded |= {*range(len(self.searcher))} - {*requests.only[user].tolist()}
        vectors = self.searcher.vectors.astype(np.float64)
        scores = np.round(vectors @ self.query_vectors[user].astype(np.float64), 6)
        if not self.list_rules.diversity:
            vectors = self.searcher.vectors
        rule_bits = int(requests.rules[user])
        return BruteForce(vectors, scores, excluded, self.list_rules, rule_bits, self.k).expected()


def random_shop(folder: Path, seed: int) -> RandomShop:
    rng = np.random.default_rng(seed)
    items = int(rng.integers(1, 120))
    users = 12
    k = int(rng.integers(1, 12))
    kinds = rng.standard_normal((6, DIMENSION))
    noise = rng.choice([0.0, 0.05, 0.5]) * rng.standard_normal((items, DIMENSION))
    vectors = unit(kinds[rng.integers(6, size=items)] + noise)
    list_rules = random_rules(rng, items)
    query_vectors = unit(rng.standard_normal((users, DIMENSION)))
    requests = ListRequests(
        MeanQuery(query_vectors, None),
        [rng.permutation(items)[: rng.integers(0, items + 1) // 3] for _ in range(users)],
        rng.choice([0, 2, 4, 6], users),
        [
            rng.permutation(items)[: rng.integers(0, items + 1)] if rng.random() < 0.2 else None
            for _ in range(users)
        ],
    )
    searcher = build_index(folder / str(seed), vectors, EXACT)
    return RandomShop(searcher, query_vectors, requests, list_rules, k)


def random_rules(rng: np.random.Generator, items: int) -> ListRules:
    # Availability, a rule that few items pass, and one that most pass.
    passed_rules = np.zeros(items, np.int64)
    for bit, share in enumerate((0.9, 0.1, 0.8)):
        passed_rules |= (rng.random(items) < share).astype(np.int64) << bit
    settings: dict[str, object] = {}
    if rng.random() < 0.7:
        settings["variants"] = rng.integers(-1, 1 + items // 2, items)
    settings["caps"] = [
        Cap(rng.integers(-1, 3, items), int(rng.integers(1, 4))) for _ in range(rng.integers(0, 3))
    ]
    if rng.random() < 0.4:
        settings["similarity_threshold"] = float(rng.choice([0.9, 0.99]))
    if rng.random() < 0.4:
        settings["min_score"] = float(rng.choice([-0.2, 0.3]))
    if rng.random() < 0.5:
        settings["diversity"] = float(rng.choice([0.1, 0.5, 0.9]))
    return ListRules(passed_rules, **settings)  # type: ignore[arg-type]


def test_all_rules_together_equal_brute_force(tmp_path):
    counts: Counter[str] = Counter()
    for seed in range(60):
        shop = random_shop(tmp_path, seed)
        lists = recommend_lists(shop.searcher, shop.requests, shop.list_rules, shop.k, None)
        assert (np.isnan(lists.scores) == (lists.items < 0)).all()
        for user, items in enumerate(lists.items.tolist()):
            expected = shop.expected(user)
            length = len(expected.items)
            assert items == expected.items + [-1] * (shop.k - length), seed
            user_rows = lists.collapsed[lists.collapsed[:, 0] == user]
            assert user_rows[:, 1:].tolist() == [list(pair) for pair in expected.collapsed], seed
            counts["listed"] += length
            counts["collapsed"] += len(expected.collapsed)
            counts["short"] += length < shop.k
            # Diversity puts a lower score before a higher one.
            counts["reordered"] += bool((np.diff(lists.scores[user, :length]) > 0).any())
    assert min(counts.values()) > 100
    assert len(counts) == 4


@pytest.mark.parametrize(("leaves", "diversity"), [(1, 0.0), (14, 0.0), (1, 0.5)])
def test_an_approximate_search_fills_each_list_that_can_be_filled(
    tmp_path, leaves: int, diversity: float
):
    rng = np.random.default_rng(1)
    items = np.arange(200)
    k = 10
    searcher = build_index(tmp_path / "x", unit(rng.standard_normal((len(items), DIMENSION))))
    # One item in a hundred passes the rule. A brand may be on a list twice.
    passed_rules = np.where(items % 100 == 7, 3, 1)
    caps = [Cap(items % 5, 2)]
    list_rules = ListRules(passed_rules, items // 4, caps, diversity=diversity)
    queries = MeanQuery(unit(rng.standard_normal((2, DIMENSION))), None)
    requests = ListRequests(queries, [np.arange(3)] * 2, np.array([0, 2]))
    lists = recommend_lists(searcher, requests, list_rules, k, Effort(leaves, k))
    all_items, rule_items = lists.items
    assert sorted(rule_items[rule_items >= 0].tolist()) == [7, 107]
    assert (all_items >= 0).all()
    assert Counter((all_items % 5).tolist()) == dict.fromkeys(range(5), 2)
    assert len(set((all_items // 4).tolist())) == k


def exact_lists(
    searcher: Searcher, query_vectors: np.ndarray, list_rules: ListRules, k: int
) -> list[list[int]]:
    """Lists of users without exclusions."""
    users = len(query_vectors)
    queries = MeanQuery(query_vectors, None)
    requests = ListRequests(queries, nothing(users), np.zeros(users, np.int64))
    return recommend_lists(searcher, requests, list_rules, k, None).items.tolist()


@pytest.mark.parametrize(
    ("diversity", "items"),
    [
        (0.0, [0, 1, 2]),
        # .85 x .9336 - .15 x cos 1° = .6436 is more than .85 x .8660 - .15 x cos 50° = .6397, and
        # that is more than item 2's .6381.
        (0.15, [0, 1, 3]),
        (0.3, [0, 3, 1]),
    ],
)
def test_diversity_prefers_items_unlike_the_listed(tmp_path, diversity: float, items: list[int]):
    # Degrees from the query: three close together on one side, one further off on the other.
    angles = np.radians([20, 21, 22, -30])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    searcher = build_index(tmp_path / "x", vectors, EXACT)
    query = np.array([[1, 0]], np.float32)
    list_rules = ListRules(np.ones(4, np.int64), diversity=diversity)
    assert exact_lists(searcher, query, list_rules, 3) == [items]


def test_a_diverse_list_does_not_depend_on_the_other_users(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    searcher = build_index(tmp_path / "x", unit(rng.standard_normal((400, DIMENSION))), EXACT)
    queries = unit(rng.standard_normal((90, DIMENSION)))
    # Nearly all items are variants of one: some lists are only filled by a deeper search.
    variants = np.where(np.arange(400) % 9 == 0, -1, 0)
    list_rules = ListRules(np.ones(400, np.int64), variants, diversity=0.4)
    lists = exact_lists(searcher, queries, list_rules, 4)
    assert [exact_lists(searcher, query[None], list_rules, 4)[0] for query in queries] == lists
    module = "vlm4rec_spark.models.ranking.list_rules"
    monkeypatch.setattr(f"{module}._BLOCK_FLOATS", 7 * 20 * DIMENSION)
    assert exact_lists(searcher, queries, list_rules, 4) == lists
    scores = queries @ searcher.vectors.T
    ranks = np.argsort(np.argsort(-scores, axis=1), axis=1)
    deepest = np.take_along_axis(ranks, np.array(lists), 1).max(axis=1)
    assert 20 <= (deepest < 20).sum() <= 70
