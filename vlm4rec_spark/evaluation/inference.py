"""Intervals and paired comparisons over users. numpy only; the same seed gives the same numbers."""

from __future__ import annotations

import numpy as np

SAMPLES = 2_000


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over users (Efron and Tibshirani 1993)."""
    means = _resampled_means(values, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_p_value(arm: np.ndarray, control: np.ndarray, seed: int) -> float:
    """Two-sided paired randomisation test: how often random signs give a mean difference as large (Fisher)."""
    difference = arm - control
    observed = abs(difference.mean())
    rng = np.random.default_rng(seed)
    larger = 0
    for _ in range(SAMPLES // 100):
        signs = rng.choice(np.array([-1.0, 1.0]), size=(100, len(difference)))
        larger += int((np.abs(signs @ difference) / len(difference) >= observed - 1e-12).sum())
    return (larger + 1) / (SAMPLES + 1)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # A hundred resamples at a time: memory stays at 100 x users.
    parts = [
        values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1) for _ in range(SAMPLES // 100)
    ]
    return np.concatenate(parts)
