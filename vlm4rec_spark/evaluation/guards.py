"""Checks for what would make an evaluation worthless: leaks, and vectors that don't tell items
apart.

numpy and pandas only. A leak ends the evaluation. What may have a good reason is counted and
reported.
"""

import numpy as np
import pandas as pd
from numpy import ndarray

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation.metrics import hit_mask

ALARM = 0.05
"""Share of candidates with a duplicate vector above which the evaluation warns."""
_STANDARD_ERRORS = 3.3
"""Of a thousand sound arms about one is flagged."""


def no_leak(
    split: str,
    cut: str | None,
    users: pd.DataFrame,
) -> None:
    """users: user_id, relevant, seen, last_event_at. Raises RunError if a history holds test items
    or late events."""
    pairs = zip(users["relevant"], users["seen"], strict=True)
    leaks = sum(bool(set(relevant) & set(seen)) for relevant, seen in pairs if seen is not None)
    if leaks:
        raise _leak(split, leaks, len(users), "test items")
    if cut is not None:
        late = (pd.to_datetime(users["last_event_at"]) >= pd.Timestamp(cut)).sum()
        if late:
            raise _leak(split, late, len(users), f"events from the cut {cut} on")


def _leak(
    split: str,
    leaks: int,
    users: int,
    content: str,
) -> RunError:
    return RunError(
        f"evaluate: a leak: {leaks:,} of {users:,} histories of the split {split} contain "
        f"{content}. Nothing was written."
    )


def nothing_seen(
    arm: str,
    top: ndarray,
    seen: ndarray,
    items: int,
) -> None:
    """Raises RunError if a list holds an item that its user has seen. seen: sorted codes, as in
    `metrics`."""
    if repeated := int(hit_mask(top, seen, items).sum()):
        raise RunError(
            f"evaluate: the arm {arm} recommends {repeated:,} items that their users have already "
            "seen, which other arms may not. Nothing was written."
        )


def shuffle_items(
    relevant: ndarray,
    items: int,
    seed: int,
) -> ndarray:
    """The codes with all items permuted at random, which no arm can predict."""
    permutation = np.random.default_rng(seed).permutation(items)
    return np.sort(relevant // items * items + permutation[relevant % items])


def above_chance(
    recall: ndarray,
    k: int,
    items: int,
) -> bool:
    """Whether recall by user on shuffled items exceeds that of a list drawn at random."""
    chance = min(1.0, k / items)
    error = recall.std() / np.sqrt(max(len(recall), 1))
    return bool(recall.mean() - _STANDARD_ERRORS * error > chance)


def count_duplicates(vectors: ndarray) -> int:
    """How many of the vectors (items, dimension) another item has too."""
    _, counts = np.unique(
        np.ascontiguousarray(vectors),
        axis=0,
        return_counts=True,
    )
    return int(counts[counts > 1].sum())
