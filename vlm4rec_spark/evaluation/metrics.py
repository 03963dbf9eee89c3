"""Ranking metrics of lists of positions. numpy only. A test compares the accuracy metrics with
those of ranx.

A list is a row of candidate positions, best first, -1 past its end. The users' relevant items are
one sorted array of codes, `user * items + position`.
"""

import numpy as np
from numpy import ndarray

ACCURACY = ("recall", "ndcg", "mrr", "hit_rate")
NEAR_DUPLICATE = 0.98
"""Two items of a list whose cosine is at least this count as near-duplicates."""
_BLOCK = 1_024
"""Lists whose pairs are compared at once."""


def hit_mask(top: ndarray, codes: ndarray, items: int) -> ndarray:
    """bool, shaped like `top` (users, length): whether the item at each rank is in the codes."""
    if not len(codes):
        return np.zeros(top.shape, bool)
    top_codes = np.arange(len(top), dtype=np.int64)[:, None] * items + top
    nearest = np.searchsorted(codes, top_codes).clip(max=len(codes) - 1)
    return (codes[nearest] == top_codes) & (top >= 0)


def per_user(hits: ndarray, relevant_counts: ndarray, k: int) -> dict[str, ndarray]:
    """ACCURACY at k by user, from the `hit_mask` and the number of relevant items of each user, at
    least 1.

    NDCG has binary gains and a log2 discount (Järvelin and Kekäläinen 2002); the ideal list is cut
    at k. MRR is the reciprocal rank of the first hit, 0 without one (Voorhees 1999).
    """
    hits = hits[:, :k]
    ranks = np.arange(1, hits.shape[1] + 1)
    discount = 1 / np.log2(ranks + 1)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    return {
        "recall": hits.sum(axis=1) / relevant_counts,
        "ndcg": hits @ discount / ideal[np.minimum(relevant_counts, k)],
        "mrr": (hits / ranks).max(axis=1, initial=0.0),
        "hit_rate": hits.any(axis=1).astype(float),
    }


def beyond_accuracy(
    top: ndarray,
    vectors: ndarray,
    user_counts: ndarray,
    total_users: int,
) -> dict[str, ndarray]:
    """Novelty, intra-list distance and near-duplicate share by user; NaN for lists that are too
    short.

    vectors: float32 (items, dimension), unit; user_counts: how many of `total_users` know each
    item.

    Novelty is the mean self-information of the items, -log2 of the share of users who know one
    (Zhou et al. 2010). An item that nobody knows counts as half a user's.
    """
    valid = top >= 0
    lengths = valid.sum(axis=1)
    bits = -np.log2(np.maximum(user_counts, 0.5) / max(total_users, 1))
    with np.errstate(invalid="ignore"):
        novelty = np.where(valid, bits[top], 0).sum(axis=1) / np.where(lengths, lengths, np.nan)
    diversity = [
        _diversity(top[start : start + _BLOCK], vectors) for start in range(0, len(top), _BLOCK)
    ]
    distance, duplicates = np.concatenate([np.zeros((2, 0)), *diversity], axis=1)
    return {
        "novelty": novelty,
        "intra_list_distance": distance,
        "near_duplicate_share": duplicates,
    }


def _diversity(top: ndarray, vectors: ndarray) -> ndarray:
    """Intra-list distance and near-duplicate share, (2, lists); NaN for lists of fewer than two
    items.

    The distance is the mean of 1 - cosine over pairs of the list (Ziegler et al. 2005). The share
    is that of items with a near-duplicate earlier in the list.
    """
    valid = top >= 0
    block = vectors[top]
    cosines = block @ block.transpose(0, 2, 1)
    pairs = np.tril(valid[:, :, None] & valid[:, None, :], -1)
    pair_counts = pairs.sum(axis=(1, 2))
    several = pair_counts > 0
    cosine_sums = np.where(pairs, cosines, 0).sum(axis=(1, 2))
    duplicates = (pairs & (cosines >= NEAR_DUPLICATE)).any(axis=2).sum(axis=1)
    diversity = np.full((2, len(top)), np.nan)
    diversity[0, several] = 1 - cosine_sums[several] / pair_counts[several]
    diversity[1, several] = duplicates[several] / valid.sum(axis=1)[several]
    return diversity


def aggregate_diversity(top: ndarray, items: int) -> dict[str, float]:
    """Over all lists: the share of candidates that are on any list, and the Gini index of how often
    each is.

    Gini is 0 if all are recommended equally often, towards 1 if one fills all lists (Fleder and
    Hosanagar 2009).
    """
    counts = np.sort(np.bincount(top[top >= 0].ravel(), minlength=items)).astype(np.float64)
    total = counts.sum()
    order = np.arange(1, items + 1)
    gini = ((2 * order - items - 1) * counts).sum() / (items * total) if total else 0.0
    return {"coverage": float((counts > 0).mean()), "gini": float(gini)}
