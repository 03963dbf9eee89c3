"""Groups of users, and of what is relevant to them, that are judged by themselves. numpy and pandas only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

LEAST_USERS = 30
"""A slice of fewer users gives no number: its interval would be wider than any difference."""
_HISTORIES = (("history 1-4", 1, 4), ("history 5-19", 5, 19), ("history 20+", 20, 10**9))
_RECENCIES = (
    ("last seen 0-7 days", 0, 7),
    ("last seen 8-30 days", 8, 30),
    ("last seen 31+ days", 31, 10**9),
)
_LARGEST = 8
"""Categories and segments of which each is a slice."""
_DECILES = 10


@dataclass(frozen=True)
class Slice:
    """users: bool (users,); items: bool (candidates,), of which alone the relevant ones count, None for all."""

    name: str
    users: np.ndarray
    items: np.ndarray | None = None


def slices(
    users: pd.DataFrame, cut: str | None, known_by: np.ndarray, catalogue: pd.DataFrame
) -> Iterator[Slice]:
    """users: seen, last_event_at, segment of the judged; known_by: int (candidates,), users who know each; catalogue:
    category and first_seen_at of the candidates."""
    everyone = np.ones(len(users), bool)
    seen = np.array([0 if items is None else len(items) for items in users["seen"]])
    for name, least, most in _HISTORIES:
        yield Slice(name, (seen >= least) & (seen <= most))
    if cut is not None:
        days = (
            (pd.Timestamp(cut) - pd.to_datetime(users["last_event_at"])).dt.total_seconds()
            // 86_400
        ).to_numpy()
        for name, least, most in _RECENCIES:
            yield Slice(name, (days >= least) & (days <= most))
    for segment in _largest(users["segment"]):
        yield Slice(f"segment {segment}", (users["segment"] == segment).to_numpy())
    yield Slice("items nobody knows", everyone, known_by == 0)
    if cut is not None and catalogue["first_seen_at"].notna().any():
        new = pd.to_datetime(catalogue["first_seen_at"]) >= pd.Timestamp(cut)
        yield Slice("items first seen after the cut", everyone, new.to_numpy())
    # Ties by position, that each tenth has as many candidates.
    order = np.argsort(np.argsort(known_by, kind="stable"), kind="stable")
    for decile in range(_DECILES):
        yield Slice(
            f"popularity {decile + 1} of {_DECILES}",
            everyone,
            order * _DECILES // len(order) == decile,
        )
    for category in _largest(catalogue["category"]):
        yield Slice(
            f"category {category}", everyone, (catalogue["category"] == category).to_numpy()
        )


def _largest(names: pd.Series) -> pd.Index:
    sizes = names.value_counts().sort_index().sort_values(kind="stable", ascending=False)
    return sizes.index[:_LARGEST]
