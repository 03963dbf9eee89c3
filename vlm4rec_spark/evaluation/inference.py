"""Intervals and paired comparisons over users. numpy only; the same seed gives the same numbers."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

SAMPLES = 2_000
_BLOCK = 100
"""Resamples at a time: memory stays at 100 x users."""


def bootstrap_interval(values: ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over users (Efron and Tibshirani 1993)."""
    low, high = interval(resampled_means(values[:, None], seed)).T[0]
    return float(low), float(high)


def resampled_means(values: ndarray, seed: int) -> ndarray:
    """Means over SAMPLES resamples of the users, (SAMPLES, columns), for values (users, columns).

    All columns share the resamples, so the difference of two columns is a paired one. A user whose
    value is NaN is left out of that column's mean.
    """
    users = len(values)
    valid = ~np.isnan(values)
    filled = np.where(valid, values, 0.0)
    complete = valid.all()
    rng = np.random.default_rng(seed)
    offsets = np.arange(_BLOCK)[:, None] * users
    means = []
    for _ in range(SAMPLES // _BLOCK):
        drawn = rng.integers(0, users, (_BLOCK, users)) + offsets
        # How often each user is drawn.
        flat = np.bincount(drawn.ravel(), minlength=_BLOCK * users)
        weights = flat.reshape(_BLOCK, users).astype(np.float64)
        counts = users if complete else np.maximum(weights @ valid.astype(np.float64), 1.0)
        means.append(weights @ filled / counts)
    return np.concatenate(means)


def interval(means: ndarray) -> ndarray:
    """Lower and upper ends of 95 % of the resampled means: (2, columns)."""
    return np.quantile(means, [0.025, 0.975], axis=0)


def paired_p_values(differences: ndarray, seed: int) -> ndarray:
    """A p-value for each column of differences (users, columns): (columns,).

    Two-sided paired randomization test: how often random signs give a mean difference as large
    (Fisher).
    """
    observed = np.abs(differences.mean(axis=0))
    rng = np.random.default_rng(seed)
    larger = np.zeros(differences.shape[1])
    for _ in range(SAMPLES // _BLOCK):
        signs = rng.choice(np.array([-1.0, 1.0]), size=(_BLOCK, len(differences)))
        larger += (np.abs(signs @ differences) / len(differences) >= observed - 1e-12).sum(axis=0)
    return (larger + 1) / (SAMPLES + 1)


def holm(p_values: Sequence[float] | ndarray) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method (1979), in the given
    order."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return corrected.tolist()
