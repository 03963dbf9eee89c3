"""Unit vectors, small indexes of them, and histories, for the tests of index and ranking."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vlm4rec_spark.models.index.searcher import Effort, Searcher

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


def nearest(
    searcher: Searcher,
    queries: np.ndarray,
    k: int,
) -> np.ndarray:
    """Brute force; cosines are rounded, ties go to the smaller position."""
    cosines = queries.astype(np.float64) @ searcher.vectors.astype(np.float64).T
    return np.argsort(-np.round(cosines, 6), axis=1, kind="stable")[:, :k]


def nothing(users: int) -> list[np.ndarray]:
    """No item for each user."""
    return [np.empty(0, np.int64)] * users


def search_top_k(
    searcher: Searcher,
    queries: np.ndarray,
    effort: Effort,
    k: int,
) -> np.ndarray:
    """The k best of the approximate candidates."""
    positions, scores = searcher.search(queries, effort)
    order = np.argsort(-np.where(positions < 0, -2, scores), axis=1, kind="stable")
    return np.take_along_axis(positions, order[:, :k], 1)


def words_of(searcher: Searcher) -> list[list[str]]:
    """The telling words of each item."""
    vocabulary = searcher.vocabulary.to_pylist()
    return [[vocabulary[word] for word in row if word >= 0] for row in searcher.words.tolist()]


def index_rows(
    ids: list[str],
    vectors: np.ndarray,
) -> pa.Table:
    """What an index is built from. A row's content is known by its id."""
    columns = {
        "item_id": ids,
        "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
        "content_sha256": ids,
        "text": ids,
    }
    return pa.table(columns)


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
