"""Intervals and paired comparisons over users. numpy only; the same seed gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAMPLES = 2_000
_AT_ONCE = 100


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over users (Efron and Tibshirani 1993)."""
    low, high = ends(resampled(values[:, None], seed)).T[0]
    return float(low), float(high)


def paired_p_value(arm: np.ndarray, control: np.ndarray, seed: int) -> float:
    """Two-sided paired randomisation test: how often random signs give a mean difference as large (Fisher)."""
    return float(paired_p_values((arm - control)[:, None], seed)[0])


def resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over SAMPLES resamples of the users, (SAMPLES, columns), for values (users, columns).

    The resamples are the same for all columns, so that the difference of two of them is that of pairs. NaN is no value:
    such a user is left out of the column's mean.
    """
    users, known = len(values), ~np.isnan(values)
    filled, whole = np.where(known, values, 0.0), bool(known.all())
    rng = np.random.default_rng(seed)
    parts = []
    # A hundred resamples at a time: memory stays at 100 x users.
    for _ in range(SAMPLES // _AT_ONCE):
        drawn = rng.integers(0, users, (_AT_ONCE, users)) + np.arange(_AT_ONCE)[:, None] * users
        times = (
            np.bincount(drawn.ravel(), minlength=_AT_ONCE * users)
            .reshape(_AT_ONCE, users)
            .astype(np.float64)
        )
        parts.append(
            times @ filled / (users if whole else np.maximum(times @ known.astype(np.float64), 1.0))
        )
    return np.concatenate(parts)


def ends(means: np.ndarray) -> np.ndarray:
    """Lower and upper ends of 95 % of the resampled means: (2, columns)."""
    return np.quantile(means, [0.025, 0.975], axis=0)


def paired_p_values(differences: np.ndarray, seed: int) -> np.ndarray:
    """Of `paired_p_value`, for differences (users, columns): (columns,)."""
    observed = np.abs(differences.mean(axis=0))
    rng = np.random.default_rng(seed)
    larger = np.zeros(differences.shape[1])
    for _ in range(SAMPLES // _AT_ONCE):
        signs = rng.choice(np.array([-1.0, 1.0]), size=(_AT_ONCE, len(differences)))
        larger += (np.abs(signs @ differences) / len(differences) >= observed - 1e-12).sum(axis=0)
    return (larger + 1) / (SAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, by Holm's (1979) step-down method; in the order given."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return corrected.tolist()
