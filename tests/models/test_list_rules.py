"""Rules, variants, caps, alike items, a lowest score and diversity together, against brute force in plain Python."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import Cap, ListRules
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, recommend_lists
from vlm4rec_spark.models.ranking.user_queries import MeanQuery

DIMENSION = 8


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def same_group(offer: ListRules, one: int, other: int) -> bool:
    return offer.variants is not None and offer.variants[one] == offer.variants[other] >= 0


def brute_force(
    vectors: np.ndarray, query: np.ndarray, seen: np.ndarray, offer: ListRules, rules: int, k: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """The list, and (place, item) of what was collapsed."""
    scores = np.round(vectors.astype(np.float64) @ query.astype(np.float64), 6)
    if offer.diversity:
        return diverse(
            vectors.astype(np.float64), scores.tolist(), {*seen.tolist()}, offer, rules | 1, k
        )
    taken, hidden = [], []
    for item in np.lexsort((np.arange(len(vectors)), -scores)).tolist():
        wanted = rules | 1
        if len(taken) == k or (offer.min_score is not None and scores[item] < offer.min_score):
            break
        if offer.passed_rules[item] & wanted != wanted or item in seen:
            continue
        twins = [
            place
            for place, other in enumerate(taken)
            if same_group(offer, item, other)
            or (
                offer.similarity_threshold is not None
                and round(float(vectors[item] @ vectors[other]), 6) > offer.similarity_threshold
            )
        ]
        if twins:
            hidden.append((twins[0], item))
            continue
        if any(
            groups[item] >= 0 and Counter(groups[taken].tolist())[groups[item]] >= most
            for groups, most in offer.caps
        ):
            continue
        taken.append(item)
    return taken, hidden


def diverse(
    vectors: np.ndarray, scores: list[float], seen: set[int], offer: ListRules, wanted: int, k: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """As `brute_force`: out of the 5 k best that there are, else the 20 k best, and so on, always the candidate that
    says most of what isn't said yet."""
    ranked = [
        item
        for item in sorted(range(len(scores)), key=lambda item: (-scores[item], item))
        if offer.passed_rules[item] & wanted == wanted
        and item not in seen
        and (offer.min_score is None or scores[item] >= offer.min_score)
    ]
    pool = 5 * k
    while True:
        left, taken, hidden = ranked[:pool], list[int](), list[tuple[int, int]]()

        def value(item: int, taken: list[int] = taken) -> float:
            nearest = max((float(vectors[item] @ vectors[other]) for other in taken), default=0.0)
            return round((1 - offer.diversity) * scores[item] - offer.diversity * nearest, 6)

        while len(taken) < k:
            fitting = [
                item
                for item in left
                if all(
                    groups[item] < 0 or sum(groups[other] == groups[item] for other in taken) < most
                    for groups, most in offer.caps
                )
            ]
            if not fitting:
                break
            chosen = max(fitting, key=lambda item: (value(item), scores[item], -item))
            twins = [
                item
                for item in left
                if item != chosen
                and (
                    same_group(offer, item, chosen)
                    or (
                        offer.similarity_threshold is not None
                        and round(float(vectors[item] @ vectors[chosen]), 6)
                        > offer.similarity_threshold
                    )
                )
            ]
            hidden += [(len(taken), item) for item in twins]
            taken.append(chosen)
            left = [item for item in left if item != chosen and item not in twins]
        if len(taken) == k or pool >= len(ranked):
            return taken, sorted(hidden, key=lambda pair: ranked.index(pair[1]))
        pool *= 4


def test_all_together_equal_brute_force(tmp_path: Path) -> None:
    filled = collapsed = short = moved = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        items, users, k = int(rng.integers(1, 120)), 12, int(rng.integers(1, 12))
        kinds = rng.standard_normal((6, DIMENSION))
        noise = rng.choice([0.0, 0.05, 0.5]) * rng.standard_normal((items, DIMENSION))
        vectors = unit(kinds[rng.integers(6, size=items)] + noise)
        folder = tmp_path / str(seed)
        Searcher.build(
            folder, str(seed), [f"{n:04d}" for n in range(items)], vectors, [""] * items, 2**62
        )
        # A rule that leaves few, one that leaves most, and availability.
        shares = ((0, 0.9), (1, 0.1), (2, 0.8))
        allowed = sum((rng.random(items) < share).astype(np.int64) << bit for bit, share in shares)
        offer = ListRules(
            allowed,
            rng.integers(-1, 1 + items // 2, items) if rng.random() < 0.7 else None,
            [
                Cap(rng.integers(-1, 3, items), int(rng.integers(1, 4)))
                for _ in range(rng.integers(0, 3))
            ],
            float(rng.choice([0.9, 0.99])) if rng.random() < 0.4 else None,
            float(rng.choice([-0.2, 0.3])) if rng.random() < 0.4 else None,
            float(rng.choice([0.1, 0.5, 0.9])) if rng.random() < 0.5 else 0.0,
        )
        queries, rules = (
            unit(rng.standard_normal((users, DIMENSION))),
            rng.choice([0, 2, 4, 6], users),
        )
        seen = [rng.permutation(items)[: rng.integers(0, items + 1) // 3] for _ in range(users)]
        asked = MeanQuery(queries, [np.empty(0, np.int64)] * users)
        only = [
            rng.permutation(items)[: rng.integers(0, items + 1)] if rng.random() < 0.2 else None
            for _ in range(users)
        ]
        top, scores, hidden = recommend_lists(
            Searcher.open(folder), ListRequests(asked, seen, rules, only), offer, k, None
        )
        for user in range(users):
            mine = only[user]
            barred = (
                seen[user]
                if mine is None
                else np.append(seen[user], np.setdiff1d(np.arange(items), mine))
            )
            expected, twins = brute_force(
                vectors, queries[user], barred, offer, int(rules[user]), k
            )
            assert top[user].tolist() == expected + [-1] * (k - len(expected)), seed
            assert [
                (place, item) for who, place, item in hidden.tolist() if who == user
            ] == twins, seed
            assert (np.isnan(scores[user]) == (top[user] < 0)).all()
            filled, collapsed, short = (
                filled + len(expected),
                collapsed + len(twins),
                short + (len(expected) < k),
            )
            moved += (np.diff(scores[user, : len(expected)]) > 0).any()
    assert min(filled, collapsed, short, moved) > 100


@pytest.mark.parametrize(("leaves", "diversity"), [(1, 0.0), (14, 0.0), (1, 0.5)])
def test_an_approximate_search_fills_every_place_that_can_be_filled(
    tmp_path: Path, leaves: int, diversity: float
) -> None:
    rng, items, k = np.random.default_rng(1), 200, 10
    vectors = unit(rng.standard_normal((items, DIMENSION)))
    Searcher.build(
        tmp_path / "x", "x", [f"{n:04d}" for n in range(items)], vectors, [""] * items, 16
    )
    # One in a hundred passes the rule; brands of which one may stand there twice.
    allowed = np.ones(items, np.int64) | ((np.arange(items) % 100 == 7).astype(np.int64) << 1)
    offer = ListRules(
        allowed, np.arange(items) // 4, [Cap(np.arange(items) % 5, 2)], diversity=diversity
    )
    rules, asked = (
        np.array([0, 2]),
        MeanQuery(unit(rng.standard_normal((2, DIMENSION))), [np.empty(0, np.int64)] * 2),
    )
    requests = ListRequests(asked, [np.arange(3)] * 2, rules)
    searcher = Searcher.open(tmp_path / "x")
    top = recommend_lists(searcher, requests, offer, k, Effort(leaves, k)).items
    assert sorted(top[1][top[1] >= 0].tolist()) == [7, 107]
    assert (top[0] >= 0).all()
    assert Counter((top[0] % 5).tolist()) == dict.fromkeys(range(5), 2)
    assert len(set((top[0] // 4).tolist())) == k


def lists(
    folder: Path, vectors: np.ndarray, queries: np.ndarray, offer: ListRules, k: int
) -> list[list[int]]:
    if not folder.exists():
        Searcher.build(
            folder,
            "x",
            [f"{n:04d}" for n in range(len(vectors))],
            vectors,
            [""] * len(vectors),
            2**62,
        )
    nothing = [np.empty(0, np.int64)] * len(queries)
    asked, rules = MeanQuery(queries, nothing), np.zeros(len(queries), np.int64)
    requests = ListRequests(asked, nothing, rules)
    return recommend_lists(Searcher.open(folder), requests, offer, k, None).items.tolist()


def test_diversity_says_what_is_not_said_yet(tmp_path: Path) -> None:
    # In degrees from the query: three near it on one side, that lie together, and one further off on the other.
    angles = np.radians([20, 21, 22, -30])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    query, everything = np.array([[1, 0]], np.float32), np.ones(4, np.int64)

    def made(diversity: float) -> list[int]:
        return lists(tmp_path / "x", vectors, query, ListRules(everything, diversity=diversity), 3)[
            0
        ]

    assert made(0.0) == [0, 1, 2]
    # .85 x .9336 - .15 x cos 1° = .6436 is more than .85 x .8660 - .15 x cos 50° = .6397, and that than item 2's .6381.
    assert made(0.15) == [0, 1, 3]
    assert made(0.3) == [0, 3, 1]


def test_a_list_is_chosen_out_of_the_best_of_its_user_whoever_is_asked_for_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    vectors, queries = (
        unit(rng.standard_normal((400, DIMENSION))),
        unit(rng.standard_normal((90, DIMENSION))),
    )
    # Some find their places among the first only when they look deeper, since nearly all items are one's variants.
    offer = ListRules(
        np.ones(400, np.int64), np.where(np.arange(400) % 9 == 0, -1, 0), diversity=0.4
    )
    together = lists(tmp_path / "x", vectors, queries, offer, 4)
    assert [
        lists(tmp_path / "x", vectors, query[None], offer, 4)[0] for query in queries
    ] == together
    monkeypatch.setattr("vlm4rec_spark.models.ranking.list_rules._BLOCK_FLOATS", 7 * 20 * DIMENSION)
    assert lists(tmp_path / "x", vectors, queries, offer, 4) == together
    ranked = np.argsort(np.argsort(-(queries @ vectors.T), axis=1), axis=1)
    deepest = np.take_along_axis(ranked, np.array(together), 1).max(axis=1)
    assert 20 <= (deepest < 20).sum() <= 70
