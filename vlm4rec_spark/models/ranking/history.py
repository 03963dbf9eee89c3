"""Events to weighted histories, whole columns at a time. Knows arrays; which events count is decided before.

Rows come sorted by user, item and time, so that each group's floats are added in the same order however the log was
divided among processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

HISTORY = pa.list_(pa.struct([("item_id", pa.string()), ("weight", pa.float64())]))


def whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows, divided between users only. `place` counts each user's rows from 1."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        starts = np.flatnonzero(batch.column("place").to_numpy() == 1)
        if len(starts):
            complete = [*waiting, batch.slice(0, starts[-1])]
            if any(map(len, complete)):
                yield pa.Table.from_batches(complete)
            waiting, batch = [], batch.slice(starts[-1])
        waiting.append(batch)
    if any(map(len, waiting)):
        yield pa.Table.from_batches(waiting)


def gather(
    rows: pa.Table,
    half_life_days: float | None,
    position_decay: float,
    last_n: int,
    least_items: int,
) -> pa.RecordBatch:
    """user_id, history, seen, events, last_event_at of the users that have `least_items` items which count.

    rows: user_id, item_id, event_time (timestamp in microseconds), weight (float64, null where the event marks the item
    as seen and counts for nothing) and place (of the row among the user's, from 1), sorted by the first three; all rows
    of a user.
    """
    user, item = rows["user_id"].combine_chunks(), rows["item_id"].combine_chunks()
    at = rows["event_time"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    weight = rows["weight"].combine_chunks().to_numpy(zero_copy_only=False)
    user_starts = np.flatnonzero(rows["place"].to_numpy() == 1)
    pair_starts = np.union1d(user_starts, _starts(item))
    pair = _numbered(pair_starts, len(at))
    owner = _numbered(user_starts, len(at))

    counts = np.flatnonzero(~np.isnan(weight))
    weight, at, pair, owner = weight[counts], at[counts], pair[counts], owner[counts]
    pairs, firsts, events = np.unique(pair, return_index=True, return_counts=True)
    _, mine, users_events = np.unique(owner, return_index=True, return_counts=True)
    last = np.maximum.reduceat(at, mine) if len(mine) else at
    if half_life_days:
        age_days = (np.repeat(last, users_events) - at) / 86_400e6
        weight = weight * np.exp2(-age_days / half_life_days)
    total = np.add.reduceat(weight, firsts) if len(firsts) else weight
    latest = at[firsts + events - 1] if len(firsts) else at

    holder = owner[firsts]
    order = np.lexsort((pairs, -latest, holder))
    holders, begin, held = np.unique(holder, return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(begin, held)
    size = np.minimum(held, last_n)
    enough = size >= least_items
    kept = (rank < last_n) & np.repeat(enough, held)
    chosen, rank = order[kept], rank[kept]
    history = pa.StructArray.from_arrays(
        [
            item.take(pa.array(pair_starts[pairs[chosen]])),
            pa.array(total[chosen] * position_decay**rank),
        ],
        fields=list(HISTORY.value_type),
    )
    seen_starts = np.searchsorted(pair_starts, user_starts)
    seen_sizes = np.diff(np.append(seen_starts, len(pair_starts)))
    kept_users = holders[enough]
    seen = pa.ListArray.from_arrays(
        _offsets(seen_sizes[kept_users]),
        item.take(
            pa.array(
                pair_starts[np.repeat(np.isin(np.arange(len(user_starts)), kept_users), seen_sizes)]
            )
        ),
    )
    return pa.RecordBatch.from_arrays(
        [
            user.take(pa.array(user_starts[kept_users])),
            pa.ListArray.from_arrays(_offsets(size[enough]), history),
            seen,
            pa.array(users_events[enough]),
            pa.array(last[enough], pa.timestamp("us")).cast(rows.schema.field("event_time").type),
        ],
        names=["user_id", "history", "seen", "events", "last_event_at"],
    )


def _starts(values: pa.Array) -> np.ndarray:
    """int64 positions where a run of equal values begins."""
    if not len(values):
        return np.empty(0, np.int64)
    other = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1)).to_numpy(
        zero_copy_only=False
    )
    return np.concatenate([[0], np.flatnonzero(other) + 1])


def _numbered(starts: np.ndarray, rows: int) -> np.ndarray:
    """For each row the number of its run."""
    return np.repeat(np.arange(len(starts)), np.diff(np.append(starts, rows)))


def _offsets(sizes: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
