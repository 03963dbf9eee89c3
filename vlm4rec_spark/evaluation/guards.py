"""What would make an evaluation worthless, looked for in every one: leaks, and vectors that tell nothing apart.

numpy only. A leak ends the evaluation; what may have a reason is counted and said.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation.metrics import hits

ALARM = 0.05
"""Share of the candidates from which on identical vectors are said aloud."""
_CHANCE = 3.3
"""Standard errors: of a thousand sound arms one is found above chance."""


def no_leak(split: str, cut: str | None, users: pd.DataFrame) -> None:
    """users: user_id, relevant, seen, last_event_at. Raises RunError where a history holds what is to be guessed."""
    both = [
        bool(set(one) & set(seen))
        for one, seen in zip(users["relevant"], users["seen"], strict=True)
        if seen is not None
    ]
    if any(both):
        raise RunError(
            f"evaluate: a leak: {sum(both):,} of {len(users):,} histories of the split {split} hold what is "
            "to be guessed. Nothing was written."
        )
    if cut is not None:
        late = (pd.to_datetime(users["last_event_at"]) >= pd.Timestamp(cut)).sum()
        if late:
            raise RunError(
                f"evaluate: a leak: {late:,} of {len(users):,} histories of the split {split} hold events "
                f"from {cut} on, which are to be guessed. Nothing was written."
            )


def nothing_seen(arm: str, top: np.ndarray, seen: np.ndarray, items: int) -> None:
    """Raises RunError where a list holds an item that the user has met. seen: sorted codes, as in `metrics`."""
    if again := int(hits(top, seen, items).sum()):
        raise RunError(
            f"evaluate: the arm {arm} recommends {again:,} items that their users have seen already, which "
            "other arms may not. Nothing was written."
        )


def shuffled(relevant: np.ndarray, items: int, seed: int) -> np.ndarray:
    """The codes with the items exchanged for others at random: what no arm can know."""
    exchange = np.random.default_rng(seed).permutation(items)
    return np.sort(relevant // items * items + exchange[relevant % items])


def above_chance(recall: np.ndarray, k: int, items: int) -> bool:
    """Whether recall by user of shuffled labels is more than that of a list drawn at random."""
    chance = min(1.0, k / items)
    error = recall.std() / np.sqrt(max(len(recall), 1))
    return bool(recall.mean() - _CHANCE * error > chance)


def identical(vectors: np.ndarray) -> int:
    """How many of the vectors (items, dimension) another item has too."""
    _, times = np.unique(np.ascontiguousarray(vectors), axis=0, return_counts=True)
    return int(times[times > 1].sum())
