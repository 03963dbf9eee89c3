"""Rules, variants, caps, alike items and a lowest score together, against brute force in plain Python."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlm4rec_spark.models.lists import listed
from vlm4rec_spark.models.offer import Offer
from vlm4rec_spark.models.searcher import Effort, Searcher
from vlm4rec_spark.models.tastes import Means

DIMENSION = 8


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def same_group(offer: Offer, one: int, other: int) -> bool:
    return offer.variants is not None and offer.variants[one] == offer.variants[other] >= 0


def brute_force(
    vectors: np.ndarray, query: np.ndarray, seen: np.ndarray, offer: Offer, rules: int, k: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """The list, and (place, item) of what was collapsed."""
    scores = np.round(vectors.astype(np.float64) @ query.astype(np.float64), 6)
    taken, hidden = [], []
    for item in np.lexsort((np.arange(len(vectors)), -scores)).tolist():
        wanted = rules | 1
        if len(taken) == k or (offer.least is not None and scores[item] < offer.least):
            break
        if offer.allowed[item] & wanted != wanted or item in seen:
            continue
        twins = [place for place, other in enumerate(taken)
                 if same_group(offer, item, other)
                 or (offer.alike is not None and round(float(vectors[item] @ vectors[other]), 6) > offer.alike)]
        if twins:
            hidden.append((twins[0], item))
            continue
        if any(groups[item] >= 0 and Counter(groups[taken].tolist())[groups[item]] >= most
               for groups, most in offer.caps):  # fmt: skip
            continue
        taken.append(item)
    return taken, hidden


def test_all_together_equal_brute_force(tmp_path: Path) -> None:
    filled = collapsed = short = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        items, users, k = int(rng.integers(1, 120)), 12, int(rng.integers(1, 12))
        kinds = rng.standard_normal((6, DIMENSION))
        noise = rng.choice([0.0, 0.05, 0.5]) * rng.standard_normal((items, DIMENSION))
        vectors = unit(kinds[rng.integers(6, size=items)] + noise)
        folder = tmp_path / str(seed)
        Searcher.build(folder, str(seed), [f"{n:04d}" for n in range(items)], vectors, [""] * items, 2**62)
        # A rule that leaves few, one that leaves most, and availability.
        shares = ((0, 0.9), (1, 0.1), (2, 0.8))
        allowed = sum((rng.random(items) < share).astype(np.int64) << bit for bit, share in shares)
        offer = Offer(
            allowed,
            rng.integers(-1, 1 + items // 2, items) if rng.random() < 0.7 else None,
            [(rng.integers(-1, 3, items), int(rng.integers(1, 4))) for _ in range(rng.integers(0, 3))],
            float(rng.choice([0.9, 0.99])) if rng.random() < 0.4 else None,
            float(rng.choice([-0.2, 0.3])) if rng.random() < 0.4 else None,
        )  # fmt: skip
        queries, rules = unit(rng.standard_normal((users, DIMENSION))), rng.choice([0, 2, 4, 6], users)
        seen = [rng.permutation(items)[: rng.integers(0, items + 1) // 3] for _ in range(users)]
        asked = Means(queries, [np.empty(0, np.int64)] * users)
        top, scores, hidden = listed(Searcher.open(folder), asked, seen, offer, rules, k, None)
        for user in range(users):
            expected, twins = brute_force(vectors, queries[user], seen[user], offer, int(rules[user]), k)
            assert top[user].tolist() == expected + [-1] * (k - len(expected)), seed
            assert [(place, item) for who, place, item in hidden.tolist() if who == user] == twins, seed
            assert (np.isnan(scores[user]) == (top[user] < 0)).all()
            filled, collapsed, short = filled + len(expected), collapsed + len(twins), short + (len(expected) < k)
    assert min(filled, collapsed, short) > 100


@pytest.mark.parametrize("leaves", [1, 14])
def test_an_approximate_search_fills_every_place_that_can_be_filled(tmp_path: Path, leaves: int) -> None:
    rng, items, k = np.random.default_rng(1), 200, 10
    vectors = unit(rng.standard_normal((items, DIMENSION)))
    Searcher.build(tmp_path / "x", "x", [f"{n:04d}" for n in range(items)], vectors, [""] * items, 16)
    # One in a hundred passes the rule; brands of which one may stand there twice.
    allowed = np.ones(items, np.int64) | ((np.arange(items) % 100 == 7).astype(np.int64) << 1)
    offer = Offer(allowed, np.arange(items) // 4, [(np.arange(items) % 5, 2)])
    rules, asked = np.array([0, 2]), Means(unit(rng.standard_normal((2, DIMENSION))), [np.empty(0, np.int64)] * 2)
    top, _, _ = listed(Searcher.open(tmp_path / "x"), asked, [np.arange(3)] * 2, offer, rules, k, Effort(leaves, k))
    assert sorted(top[1][top[1] >= 0].tolist()) == [7, 107]
    assert (top[0] >= 0).all()
    assert Counter((top[0] % 5).tolist()) == dict.fromkeys(range(5), 2)
    assert len(set((top[0] // 4).tolist())) == k
