"""Counts the items that occur together in users' histories. Knows no index and no file."""

from __future__ import annotations

from pydantic import Field
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.settings_base import Settings

_MAX_DISTANCE = 20
"""Items further apart are no pair: the default decay makes their weight less than a hundredth."""
_MICRO = 1_000_000
"""Weights are summed as whole millionths, so that partitioning doesn't change the last bits."""


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
    history_pairs = _history_pairs(F.col("history"), settings.distance_decay)
    exploded = histories.select(F.explode(history_pairs).alias("pair"))
    one_way = _sum_weights(exploded.select("pair.*"))
    reverse = one_way.toDF("second", "first", "weight")
    weights = _sum_weights(one_way.unionByName(reverse))
    items = histories.select(F.explode("history.item_id").alias("item_id"))
    users = items.groupBy("item_id").agg(F.count("*"))
    first_users = users.toDF("first", "first_users")
    second_users = users.toDF("second", "second_users")
    popularity = F.col("first_users") * F.col("second_users")
    damping = F.pow(popularity, F.lit(settings.popularity_power))
    strength = F.col("weight") / _MICRO / damping
    strengths = (
        weights.join(first_users, on="first", how="inner")
        .join(second_users, on="second", how="inner")
        .select(
            F.col("first").alias("item_id"),
            F.col("second").alias("other_id"),
            strength.alias("strength"),
        )
    )
    return _strongest(strengths, settings.max_neighbors)


def _strongest(strengths: DataFrame, max_neighbors: int) -> DataFrame:
    pairs_of_item = Window.partitionBy("item_id")
    strongest_first = pairs_of_item.orderBy(F.desc("strength"), "other_id")
    rank = F.row_number().over(strongest_first)
    ranked = strengths.withColumn("rank", rank)
    return ranked.where(F.col("rank") <= max_neighbors).drop("rank")


def _history_pairs(history: Column, distance_decay: float) -> Column:
    """Array of (first, second, weight): each item of the history with the older ones in reach."""

    def with_older(item: Column, position: Column) -> Column:
        def pair(older: Column, items_between: Column) -> Column:
            weight = F.pow(F.lit(distance_decay), items_between)
            micros = F.round(weight * _MICRO)
            return F.struct(
                item["item_id"].alias("first"),
                older["item_id"].alias("second"),
                micros.cast("long").alias("weight"),
            )

        # Positions count from 0, slice() counts from 1.
        older_items = F.slice(history, position + 2, _MAX_DISTANCE)
        return F.transform(older_items, pair)

    return F.flatten(F.transform(history, with_older))


def _sum_weights(rows: DataFrame) -> DataFrame:
    weight = F.sum("weight")
    return rows.groupBy("first", "second").agg(weight.alias("weight"))
