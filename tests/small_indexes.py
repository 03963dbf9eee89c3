"""Unit vectors, small indexes of them, and histories, for the tests of index and ranking."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm4rec_spark.models.index.searcher import Searcher

EXACT = 2**62
"""As ann_min_items: no index is so large that its search is approximate."""


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(
    count: int,
    seed: int,
    dimension: int = 32,
) -> np.ndarray:
    """Unit vectors around 40 fixed centers, as items of 40 kinds."""
    centers = np.random.default_rng(0).standard_normal((40, dimension))
    rng = np.random.default_rng(seed)
    kinds = rng.integers(40, size=count)
    return unit(centers[kinds] + 0.4 * rng.standard_normal((count, dimension)))


def item_ids(count: int) -> list[str]:
    return [f"i{number:05d}" for number in range(count)]


def build_index(
    folder: Path,
    vectors: np.ndarray,
    ann_min_items: int = 16,
) -> Searcher:
    """An index without texts, named by its folder, opened."""
    texts = [""] * len(vectors)
    ids = item_ids(len(vectors))
    Searcher.build(folder, folder.name, ids, vectors, texts, ann_min_items)
    return Searcher.open(folder)


class Histories(NamedTuple):
    """Positions of each user's items, and float32 weights of which the heaviest is 1."""

    positions: list[np.ndarray]
    weights: list[np.ndarray]


def random_histories(items: int, users: int) -> Histories:
    """Histories of up to 20 items. The first user has none."""
    rng = np.random.default_rng(6)
    positions = []
    for user in range(users):
        order = rng.permutation(items)
        length = rng.integers(1, 21) if user else 0
        positions.append(order[:length].astype(np.int64))
    weights = []
    for history in positions:
        raw = rng.random(len(history)) + 0.05
        weights.append((raw / raw.max(initial=0.01)).astype(np.float32))
    return Histories(positions, weights)


def mean_recall(lists: np.ndarray, exact_lists: np.ndarray) -> float:
    """The mean share of each exact list that was found."""
    rows = zip(lists.tolist(), exact_lists.tolist(), strict=True)
    shares = [len({*row} & {*exact}) / len(exact) for row, exact in rows]
    return float(np.mean(shares))
