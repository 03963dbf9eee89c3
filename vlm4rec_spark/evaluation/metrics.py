"""Ranking metrics per user. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

METRICS = ("recall", "ndcg", "hit_rate")


def hits(lists: Sequence[Sequence[str]], relevant: Sequence[Sequence[str]], k: int) -> np.ndarray:
    """bool (users, k): whether the item at each rank is relevant. A short or missing list has misses at its end."""
    found = np.zeros((len(lists), k), bool)
    for user, (items, wanted) in enumerate(zip(lists, relevant, strict=True)):
        wanted_set = set(wanted)
        for rank, item in enumerate(items[:k]):
            found[user, rank] = item in wanted_set
    return found


def per_user(found: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Recall, NDCG and hit rate at k for `hits` (users, k) and the number of relevant items of each user.

    NDCG with binary gains and log2 discount (Järvelin and Kekäläinen 2002), ideal list cut at k.
    """
    k = found.shape[1]
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(sizes, k)]
    return {
        "recall": found.sum(axis=1) / sizes,
        "ndcg": found @ discount / ideal,
        "hit_rate": found.any(axis=1).astype(float),
    }
