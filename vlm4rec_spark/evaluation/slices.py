"""Groups of users, and of relevant items, with metrics of their own. numpy and pandas only."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy import ndarray

MIN_USERS = 30
"""A slice of fewer users gives no number: its interval would be wider than any difference."""
_HISTORIES = (("history 1-4", 1, 4), ("history 5-19", 5, 19), ("history 20+", 20, 10**9))
_RECENCIES = (
    ("last seen 0-7 days", 0, 7),
    ("last seen 8-30 days", 8, 30),
    ("last seen 31+ days", 31, 10**9),
)
_MAX_GROUPS = 8
"""Categories, and segments, that get a slice each."""
_DECILES = 10
_DAY = 86_400


@dataclass(frozen=True)
class Slice:
    """users: bool (users,). items: bool (candidates,), the only relevant items that count; None for
    all."""

    name: str
    users: ndarray
    items: ndarray | None = None


def slices(
    users: pd.DataFrame,
    cut: str | None,
    user_counts: ndarray,
    catalogue: pd.DataFrame,
) -> Iterator[Slice]:
    """users: seen, last_event_at and segment of the test users; user_counts: int (candidates,),
    users who know each; catalogue: category and first_seen_at of the candidates."""
    seen = np.array([0 if items is None else len(items) for items in users["seen"]])
    for name, low, high in _HISTORIES:
        yield Slice(name, (seen >= low) & (seen <= high))
    if cut is not None:
        age = pd.Timestamp(cut) - pd.to_datetime(users["last_event_at"])
        days = (age.dt.total_seconds() // _DAY).to_numpy()
        for name, low, high in _RECENCIES:
            yield Slice(name, (days >= low) & (days <= high))
    for segment in _largest(users["segment"]):
        yield Slice(f"segment {segment}", (users["segment"] == segment).to_numpy())
    everyone = np.ones(len(users), bool)
    for name, items in _item_groups(cut, user_counts, catalogue):
        yield Slice(name, everyone, items)


def _item_groups(
    cut: str | None,
    user_counts: ndarray,
    catalogue: pd.DataFrame,
) -> Iterator[tuple[str, ndarray]]:
    yield "items nobody knows", user_counts == 0
    if cut is not None and catalogue["first_seen_at"].notna().any():
        new = pd.to_datetime(catalogue["first_seen_at"]) >= pd.Timestamp(cut)
        yield "items first seen after the cut", new.to_numpy()
    # Ties by position, so that each tenth has as many candidates.
    order = np.argsort(np.argsort(user_counts, kind="stable"), kind="stable")
    deciles = order * _DECILES // max(len(order), 1)
    for decile in range(_DECILES):
        yield f"popularity {decile + 1} of {_DECILES}", deciles == decile
    for category in _largest(catalogue["category"]):
        yield f"category {category}", (catalogue["category"] == category).to_numpy()


def _largest(names: pd.Series) -> pd.Index:
    sizes = names.value_counts().sort_index().sort_values(kind="stable", ascending=False)
    return sizes.index[:_MAX_GROUPS]
