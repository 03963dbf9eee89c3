"""Events to weighted histories, whole columns at a time.

Knows arrays. Which events count is decided before.

Rows come sorted by user, item and time. So each group's floats are added in the same order, however
the log was partitioned.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from vlm4rec_spark.models.ranking.top_k import rank_in_group

_HISTORY_ENTRY = pa.struct([("item_id", pa.string()), ("weight", pa.float64())])
_DAY_US = 86_400e6


def whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows as tables that divide no user's rows.

    `user_row` numbers a user's rows from 1.
    """
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        starts = np.flatnonzero(batch.column("user_row").to_numpy() == 1)
        if len(starts):
            last_user = starts[-1]
            pending.append(batch.slice(0, last_user))
            if any(map(len, pending)):
                yield pa.Table.from_batches(pending)
            pending = []
            batch = batch.slice(last_user)
        pending.append(batch)
    if any(map(len, pending)):
        yield pa.Table.from_batches(pending)


class _Events(NamedTuple):
    """Rows that count: time (microseconds), weight, and the numbers of their user and pair.

    A pair is a user and an item. Users and pairs are numbered in the order of the rows.
    """

    times: ndarray
    weights: ndarray
    users: ndarray
    pairs: ndarray


class _Pairs(NamedTuple):
    """Number and weight of pairs with an event that counts, by user, latest first."""

    numbers: ndarray
    weights: ndarray


class _Users(NamedTuple):
    """Users with an event that counts: number, events, last event, items. Sorted by number."""

    numbers: ndarray
    events: ndarray
    last_event: ndarray
    items: ndarray


def weighted_histories(
    rows: pa.Table,
    half_life_days: float | None,
    position_decay: float,
    last_n: int,
    min_items: int,
) -> pa.RecordBatch:
    """user_id, history, seen, events, last_event_at of users with at least `min_items` items.

    rows: all of a user's, sorted by user_id, item_id and event_time (timestamp in microseconds).
    Also weight (float64) and user_row (number of the user's row, from 1). The weight is null if the
    event only marks the item as seen.
    """
    item_ids = rows["item_id"].combine_chunks()
    is_user_start = rows["user_row"].to_numpy() == 1
    is_pair_start = is_user_start | _differs_from_last(item_ids)
    events = _weighted_events(rows, is_user_start, is_pair_start)
    users = _group_users(events)
    pairs = _group_pairs(_decay(events, users, half_life_days))
    sizes = np.minimum(users.items, last_n)
    enough = sizes >= min_items
    ranks = rank_in_group(users.items)
    in_history = (ranks < last_n) & np.repeat(enough, users.items)
    pair_items = item_ids.filter(is_pair_start)
    history_items = pair_items.take(pairs.numbers[in_history])
    decays = position_decay ** ranks[in_history]
    entries = _entries(history_items, pairs.weights[in_history] * decays)
    user_ids = rows["user_id"].filter(is_user_start).combine_chunks()
    user_numbers = users.numbers[enough]
    last_event_at = pa.array(users.last_event[enough], pa.timestamp("us"))
    columns = {
        "user_id": user_ids.take(user_numbers),
        "history": list_array(sizes[enough], entries),
        "seen": _seen(pair_items, is_user_start[is_pair_start], user_numbers),
        "events": users.events[enough],
        "last_event_at": last_event_at.cast(rows.schema.field("event_time").type),
    }
    return pa.RecordBatch.from_pydict(columns)


def _entries(items: pa.Array, weights: ndarray) -> pa.StructArray:
    return pa.StructArray.from_arrays([items, weights], fields=list(_HISTORY_ENTRY))


def list_array(
    sizes: ndarray,
    values: pa.Array | ndarray,
    is_null: pa.Array | None = None,
) -> pa.ListArray:
    """Consecutive values as lists of these sizes. is_null: bool, lists that are null."""
    offsets = pa.array(np.append(0, np.cumsum(sizes)), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=is_null)


def _weighted_events(
    rows: pa.Table,
    is_user_start: ndarray,
    is_pair_start: ndarray,
) -> _Events:
    times = rows["event_time"].cast(pa.int64()).to_numpy()
    weights = rows["weight"].to_numpy()
    counts = ~np.isnan(weights)
    return _Events(
        times[counts],
        weights[counts],
        (np.cumsum(is_user_start) - 1)[counts],
        (np.cumsum(is_pair_start) - 1)[counts],
    )


def _group_users(events: _Events) -> _Users:
    numbers, starts, counts = np.unique(events.users, return_index=True, return_counts=True)
    last_event = np.maximum.reduceat(events.times, starts)
    is_new_pair = np.diff(events.pairs, prepend=-1) > 0
    _, items = np.unique(events.users[is_new_pair], return_counts=True)
    return _Users(numbers, counts, last_event, items)


def _decay(events: _Events, users: _Users, half_life_days: float | None) -> _Events:
    """The events with weights that halve with age. Age counts back from the user's last event."""
    if not half_life_days:
        return events
    last_events = np.repeat(users.last_event, users.events)
    age_days = (last_events - events.times) / _DAY_US
    decays = np.exp2(-age_days / half_life_days)
    return events._replace(weights=events.weights * decays)


def _group_pairs(events: _Events) -> _Pairs:
    """Sums the weights of each user and item. Relies on rows sorted by pair and time."""
    numbers, starts, counts = np.unique(events.pairs, return_index=True, return_counts=True)
    weights = np.add.reduceat(events.weights, starts)
    last_rows = starts + counts - 1
    latest = events.times[last_rows]
    users = events.users[starts]
    order = np.lexsort((numbers, -latest, users))
    return _Pairs(numbers[order], weights[order])


def _seen(items: pa.Array, is_first: ndarray, user_numbers: ndarray) -> pa.ListArray:
    """All items of the users with these numbers, also those whose events don't count.

    items, is_first: of each pair, its item, and whether it is its user's first pair.
    """
    users = np.cumsum(is_first) - 1
    is_seen = np.isin(users, user_numbers)
    _, sizes = np.unique(users[is_seen], return_counts=True)
    return list_array(sizes, items.filter(is_seen))


def _differs_from_last(values: pa.Array) -> ndarray:
    """bool, the values that begin a run of equal values."""
    differs = np.ones(len(values), bool)
    differs[1:] = pc.not_equal(values[1:], values[:-1])
    return differs
