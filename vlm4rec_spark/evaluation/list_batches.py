"""Batches of test users to batches of lists, by functions that run on workers or in the driver.

A batch has user_id, seen and, for profiles, history. Lists have user_id and items, ids in rank
order. Knows no split and no table.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray
from pyspark.sql import DataFrame

from vlm4rec_spark.evaluation import als
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.event_weights import list_array
from vlm4rec_spark.models.ranking.top_k import flat_exclusions, rank_in_group, top_k
from vlm4rec_spark.stages import profiles

_BLOCK = 256
"""Users whose scores of all candidates are in memory at once."""
_LIST_SCHEMA = "user_id STRING, items ARRAY<STRING>"
Rows: TypeAlias = DataFrame | pa.Table
"""Rows in Spark, or in the driver."""
Batches = Iterator[pa.RecordBatch]
BatchFunction = Callable[[Batches], Batches]


def map_batches(rows: Rows, function: BatchFunction) -> Iterable[pa.RecordBatch]:
    """What the function makes of the rows: on workers, unless the rows are in the driver."""
    if isinstance(rows, DataFrame):
        return rows.mapInArrow(function, _LIST_SCHEMA).toArrow().to_batches()
    return function(iter(rows.to_batches()))


def positions(
    lists: Iterable[pa.RecordBatch],
    user_ids: pd.Series,
    item_ids: pd.Index,
    k: int,
) -> ndarray:
    """Lists of ids as positions in `item_ids`, (users, k) in the order of `user_ids`, -1 past the
    end."""
    top = np.full((len(user_ids), k), -1, np.int64)
    users = pd.Index(user_ids)
    for batch in lists:
        rows = users.get_indexer(pd.Index(batch.column("user_id").to_pylist(), dtype=object))
        items = batch.column("items")
        sizes = np.asarray(items.value_lengths(), np.int64)
        top[np.repeat(rows, sizes), rank_in_group(sizes)] = _indexed(items.flatten(), item_ids)
    return top


def user_item_codes(lists: pd.Series, item_ids: pd.Index) -> ndarray:
    """Sorted codes, as in `metrics`, of lists of ids; ids that are no candidates are skipped."""
    sizes = [0 if ids is None else len(ids) for ids in lists]
    flat = [item_id for ids in lists if ids is not None for item_id in ids]
    positions = item_ids.get_indexer(pd.Index(flat, dtype=object))
    users = np.repeat(np.arange(len(lists), dtype=np.int64), sizes)
    return np.sort((users * len(item_ids) + positions)[positions >= 0])


def rank_histories(
    open_searcher: Callable[[], Searcher],
    rank: BatchFunction,
) -> BatchFunction:
    """Histories to lists, as the stages profiles and recommend make them. rank: profiles with a
    vector to lists of `recommend`."""

    def with_vector(batches: Batches) -> Batches:
        for batch in profiles.append_embedding(batches, open_searcher()):
            yield batch.filter(batch.column("embedding").is_valid())

    def rank_batches(batches: Batches) -> Batches:
        for lists in rank(with_vector(batches)):
            items = lists.column("items")
            item_ids = list_array(items.value_lengths(), items.flatten().field("item_id"))
            yield _list_batch(lists.column("user_id"), item_ids)

    return rank_batches


def rank_by_value(
    item_ids: pd.Index,
    values: ndarray,
    k: int,
    seed: int | None = None,
) -> BatchFunction:
    """user_id and seen to the k best of `values` (by candidate) that the user hasn't seen.

    With a `seed` every user gets random scores, drawn from the seed and the user's id: the random
    arm.
    """

    def score(batch: pa.RecordBatch) -> ndarray:
        if seed is None:
            return np.broadcast_to(values, (len(batch), len(values)))
        user_ids = batch.column("user_id").to_pylist()
        generators = [np.random.default_rng([seed, *user_id.encode()]) for user_id in user_ids]
        return np.stack([rng.random(len(values), np.float32) for rng in generators])

    return _ranker(item_ids, score, k)


def rank_by_factors(
    item_ids: pd.Index,
    factors: als.Factors,
    k: int,
) -> BatchFunction:
    """user_id and seen to the k best by the product of factors; no row for a user that ALS doesn't
    know."""
    known = pa.array(factors.user_ids, pa.string())

    def score(batch: pa.RecordBatch) -> ndarray:
        users = factors.user_ids.get_indexer(pd.Index(batch.column("user_id").to_pylist()))
        return factors.users[users] @ factors.items.T

    rank = _ranker(item_ids, score, k)

    def rank_known(batches: Batches) -> Batches:
        return rank(batch.filter(pc.is_in(batch.column("user_id"), known)) for batch in batches)

    return rank_known


def _ranker(
    item_ids: pd.Index,
    score: Callable[[pa.RecordBatch], ndarray],
    k: int,
) -> BatchFunction:
    """user_id, seen and what `score` reads to the k unseen candidates with the best scores.

    score: scores of all candidates, (rows, items), for a batch of rows.
    """
    ids = pa.array(item_ids, pa.string())

    def rank(batch: pa.RecordBatch) -> pa.RecordBatch:
        scores = score(batch)
        candidates = np.broadcast_to(np.arange(len(ids), dtype=np.int64), scores.shape)
        seen = batch.column("seen")
        ends = np.cumsum(np.asarray(seen.value_lengths()))
        excluded = np.split(_indexed(seen.flatten(), item_ids), ends)[:-1]
        exclusions = flat_exclusions(excluded, len(ids))
        eligible = np.ones(len(ids), bool)
        top = top_k(candidates, scores, exclusions, eligible, k).positions
        filled = top >= 0
        items = list_array(filled.sum(axis=1), ids.take(top[filled]))
        return _list_batch(batch.column("user_id"), items)

    def rank_batches(batches: Batches) -> Batches:
        for batch in batches:
            for start in range(0, len(batch), _BLOCK):
                yield rank(batch.slice(start, _BLOCK))

    return rank_batches


def _list_batch(user_ids: pa.Array, items: pa.ListArray) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([user_ids, items], ["user_id", "items"])


def _indexed(ids: pa.Array, item_ids: pd.Index) -> ndarray:
    """Positions of ids, -1 of those that are no candidates."""
    return item_ids.get_indexer(pd.Index(ids.to_pylist(), dtype=object))
