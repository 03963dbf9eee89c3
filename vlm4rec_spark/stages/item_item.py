"""Histories to the items that are found together in them. Knows weighted histories and an index's positions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.item_item_scores import FORMAT, ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher

_REACH = 20
"""Items further apart than this are no pair: with the default decay their weight would be below a hundredth."""
_MICRO = 1_000_000
"""Weights are summed as whole millionths, so that the bits don't depend on how rows were partitioned."""


class ItemItemSettings(BaseModel):
    """How much of an item's score comes from what is found with the history, and how that is counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(0.0, ge=0, le=1)
    distance_decay: float = Field(0.8, gt=0, le=1)
    popularity_power: float = Field(0.2, ge=0, le=1)
    position_decay: float = Field(0.85, gt=0, le=1)
    max_neighbors: int = Field(100, ge=1)


def pairs(histories: DataFrame, settings: ItemItemSettings) -> DataFrame:
    """item_id, other_id, strength: the `kept` items that are found most strongly with each, the strongest first.

    Two items of a history count distance_decay for each place that they are apart beyond the first, in both directions.
    Their strength is the sum over users, over (users of the one x users of the other) ^ popularity_power: 0.5 is the
    cosine of item-item filtering (Sarwar et al. 2001), 0 the plain count. `histories`: history, latest first.
    """
    here = F.col("history")
    each = F.flatten(
        F.transform(
            here,
            lambda one, place: F.transform(
                F.slice(here, place + 2, _REACH),
                lambda other, apart: F.struct(
                    one["item_id"].alias("first"),
                    other["item_id"].alias("second"),
                    F.round(F.pow(F.lit(settings.distance_decay), apart) * _MICRO)
                    .cast("long")
                    .alias("weight"),
                ),
            ),
        )
    )
    found = (
        histories.select(F.explode(each).alias("pair"))
        .select("pair.*")
        .groupBy("first", "second")
        .agg(F.sum("weight").alias("weight"))
    )
    other_way = found.select(
        F.col("second").alias("first"), F.col("first").alias("second"), "weight"
    )
    together = (
        found.unionByName(other_way).groupBy("first", "second").agg(F.sum("weight").alias("weight"))
    )
    users = (
        histories.select(F.explode("history.item_id").alias("item_id"))
        .groupBy("item_id")
        .agg(F.count(F.lit(1)).alias("users"))
    )
    firsts, seconds = (users.toDF(name, f"{name}_users") for name in ("first", "second"))
    damped = F.pow(F.col("first_users") * F.col("second_users"), F.lit(settings.popularity_power))
    strong = (
        together.join(firsts, on="first")
        .join(seconds, on="second")
        .select(
            F.col("first").alias("item_id"),
            F.col("second").alias("other_id"),
            (F.col("weight") / _MICRO / damped).alias("strength"),
        )
    )
    rank = F.row_number().over(
        Window.partitionBy("item_id").orderBy(F.desc("strength"), "other_id")
    )
    return (
        strong.withColumn("rank", rank).where(F.col("rank") <= settings.max_neighbors).drop("rank")
    )


def build(rows: DataFrame, searcher: Searcher, folder: Path) -> Path:
    """Build the folder of `pairs` under `folder`, named by its content; a sound one is left as it is.

    Runs in one process and holds all pairs: items x kept x 60 bytes or so. Pairs of items that the index doesn't hold
    are left out; folders that nobody has used for a day are deleted.
    """
    table = rows.toArrow()
    first, second = (
        searcher.positions(table[name].to_pylist()) for name in ("item_id", "other_id")
    )
    known = (first >= 0) & (second >= 0)
    first, second, strengths = (
        first[known],
        second[known],
        table["strength"].to_numpy()[known].astype(np.float32),
    )
    order = np.lexsort((second, first))
    first, second, strengths = first[order], second[order], strengths[order]
    digests = [hashlib.sha256(each.tobytes()).hexdigest() for each in (first, second, strengths)]
    content = [FORMAT, searcher.index_id, *digests]
    target = folder / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if not artifact.reuse(target, ItemItemScores.open):
        ItemItemScores.build(target, searcher.index_id, len(searcher), first, second, strengths)
    return target
