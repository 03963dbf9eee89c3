"""Ranking metrics of lists of positions. numpy only; the accuracy metrics agree with ranx (a test holds them together).

A list is a row of positions in the candidates, best first, -1 past its end. What is relevant to the users is one sorted
array of codes, `user * items + position`.
"""

from __future__ import annotations

import numpy as np

ACCURACY = ("recall", "ndcg", "mrr", "hit_rate")
NEAR_DUPLICATE = 0.98
"""Cosine from which on two items of a list are taken for one."""


def hits(top: np.ndarray, relevant: np.ndarray, items: int) -> np.ndarray:
    """bool, as `top` (users, length): whether the item at each rank is relevant."""
    codes = np.arange(len(top), dtype=np.int64)[:, None] * items + top
    if not len(relevant):
        return np.zeros(top.shape, bool)
    place = np.searchsorted(relevant, codes).clip(max=len(relevant) - 1)
    return (relevant[place] == codes) & (top >= 0)


def per_user(found: np.ndarray, sizes: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """ACCURACY at k by user, from `hits` and the number of relevant items of each user, at least 1.

    NDCG with binary gains and log2 discount (Järvelin and Kekäläinen 2002), the ideal list cut at k. MRR is the
    reciprocal rank of the first hit, 0 without one (Voorhees 1999).
    """
    found = found[:, :k]
    ranks = np.arange(1, found.shape[1] + 1)
    discount = 1 / np.log2(ranks + 1)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])[
        np.minimum(sizes, k)
    ]
    return {
        "recall": found.sum(axis=1) / sizes,
        "ndcg": found @ discount / ideal,
        "mrr": (found / ranks).max(axis=1, initial=0.0),
        "hit_rate": found.any(axis=1).astype(float),
    }


def beyond_accuracy(
    top: np.ndarray, vectors: np.ndarray, users: np.ndarray, everybody: int
) -> dict[str, np.ndarray]:
    """What a list is like, whatever is relevant, by user; NaN for users without enough of one.

    vectors: float32 (items, dimension), unit; users: how many of `everybody` know each item.

    Novelty is the mean self-information of the items, -log2 of the share of users who know one (Zhou et al. 2010), an
    item that nobody knows counted as half a user's. Intra-list distance is the mean of 1 - cosine over pairs of the
    list (Ziegler et al. 2005); the near-duplicate share is that of items to which an earlier one of the list is as near
    as NEAR_DUPLICATE.
    """
    there = top >= 0
    length = there.sum(axis=1)
    told = -np.log2(np.maximum(users, 0.5) / max(everybody, 1))
    with np.errstate(invalid="ignore"):
        novelty = np.where(there, told[top], 0).sum(axis=1) / np.where(length, length, np.nan)
    distance, twins = np.full(len(top), np.nan), np.full(len(top), np.nan)
    for start in range(0, len(top), 1_024):
        block, here = vectors[top[start : start + 1_024]], there[start : start + 1_024]
        cosine = block @ block.transpose(0, 2, 1)
        pairs = np.tril(here[:, :, None] & here[:, None, :], -1)
        count, items = pairs.sum(axis=(1, 2)), here.sum(axis=1)
        some = count > 0
        distance[start : start + 1_024][some] = (
            1 - np.where(pairs, cosine, 0).sum(axis=(1, 2))[some] / count[some]
        )
        near = (pairs & (cosine >= NEAR_DUPLICATE)).any(axis=2).sum(axis=1)
        twins[start : start + 1_024][some] = near[some] / items[some]
    return {"novelty": novelty, "intra_list_distance": distance, "near_duplicate_share": twins}


def together(top: np.ndarray, items: int) -> dict[str, float]:
    """Of all lists together the share of the candidates that are on a list, and the Gini index of how often each is.

    Gini 0: all are recommended equally often; towards 1: a single one takes all places (Fleder and Hosanagar 2009).
    """
    counts = np.sort(np.bincount(top[top >= 0].ravel(), minlength=items)).astype(np.float64)
    total = counts.sum()
    order = np.arange(1, items + 1)
    gini = ((2 * order - items - 1) * counts).sum() / (items * total) if total else 0.0
    return {"coverage": float((counts > 0).mean()), "gini": float(gini)}
