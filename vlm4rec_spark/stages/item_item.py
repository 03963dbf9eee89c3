"""Counts the items that occur together in users' histories. Knows no index and no file."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pydantic import Field
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.settings_base import Settings

_MAX_DISTANCE = 20
"""Items further apart are no pair: the default decay makes their weight less than a hundredth."""
_MICRO = 1_000_000
"""Weights are summed as whole millionths, so that partitioning doesn't change the last bits."""
_BLOCK = 1_000
"""Histories whose pairs are in memory at once: a thousand for each item within reach."""
_PAIR_SCHEMA = "first STRING, second STRING, weight LONG"


class ItemItemSettings(Settings):
    """How much of an item's score comes from item-item counts, and how these are counted."""

    share: float = Field(0.0, ge=0, le=1)
    distance_decay: float = Field(0.8, gt=0, le=1)
    popularity_power: float = Field(0.2, ge=0, le=1)
    position_decay: float = Field(0.85, gt=0, le=1)
    max_neighbors: int = Field(100, ge=1)


def pairs(histories: DataFrame, settings: ItemItemSettings) -> DataFrame:
    """item_id, other_id, strength: the `max_neighbors` strongest pairs of each item.

    A history adds distance_decay ^ (distance - 1) to each pair of its items, in both directions.
    The strength is the sum over users, divided by (users of one item x users of the other) ^
    popularity_power. A power of 0.5 is the cosine of item-item filtering (Sarwar et al. 2001). A
    power of 0 is the plain count. `histories` has the column history, latest item first.
    """
    distance_decay = settings.distance_decay

    def count(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for start in range(0, len(batch), _BLOCK):
                block = batch.slice(start, _BLOCK)
                yield history_pairs(block.column("history"), distance_decay)

    counted = histories.select("history").mapInArrow(count, _PAIR_SCHEMA)
    weights = counted.groupBy("first", "second").agg(F.sum("weight").alias("weight"))
    by_first = weights.withColumn("second_users", _users("second"))
    by_second = by_first.withColumn("first_users", _users("first"))
    popularity = F.col("first_users") * F.col("second_users")
    damping = F.pow(popularity, F.lit(settings.popularity_power))
    strength = F.col("weight") / _MICRO / damping
    strengths = by_second.where(F.col("first") != F.col("second")).select(
        F.col("first").alias("item_id"),
        F.col("second").alias("other_id"),
        strength.alias("strength"),
    )
    return _strongest(strengths, settings.max_neighbors)


def _users(item: str) -> Column:
    """The users of this item of the pair: the weight of its pair with itself."""
    own_weight = F.when(F.col("first") == F.col("second"), F.col("weight"))
    return F.max(own_weight).over(Window.partitionBy(item))


def _strongest(strengths: DataFrame, max_neighbors: int) -> DataFrame:
    pairs_of_item = Window.partitionBy("item_id")
    strongest_first = pairs_of_item.orderBy(F.desc("strength"), "other_id")
    rank = F.row_number().over(strongest_first)
    ranked = strengths.withColumn("rank", rank)
    return ranked.where(F.col("rank") <= max_neighbors).drop("rank")


def history_pairs(histories: pa.ListArray, distance_decay: float) -> pa.RecordBatch:
    """first, second, weight: the summed millionths of all pairs of items in reach of each other.

    An item's pair with itself weighs 1 for each history that has it.
    """
    encoded = histories.flatten().field("item_id").dictionary_encode()
    ids = encoded.dictionary
    codes = encoded.indices.to_numpy().astype(np.int64)
    users = np.repeat(np.arange(len(histories)), np.asarray(histories.value_lengths()))
    keys = [codes * len(ids) + codes]
    weights = [np.ones(len(codes))]
    for distance in range(1, _MAX_DISTANCE + 1):
        newer = np.flatnonzero(users[distance:] == users[:-distance])
        first = codes[newer]
        second = codes[newer + distance]
        # Half a millionth is rounded up.
        micros = np.floor(distance_decay ** (distance - 1) * _MICRO + 0.5)
        keys += [first * len(ids) + second, second * len(ids) + first]
        weights.append(np.full(2 * len(newer), micros))
    distinct, rows = np.unique(np.concatenate(keys), return_inverse=True)
    sums = np.bincount(rows, np.concatenate(weights)).astype(np.int64)
    columns = [ids.take(distinct // len(ids)), ids.take(distinct % len(ids)), sums]
    return pa.RecordBatch.from_arrays(columns, ["first", "second", "weight"])
