"""What is popular, for users of whose taste nothing is known. Knows events and segments; no vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.popularity_query import PopularityQuery
from vlm4rec_spark.models.ranking.top_k import Candidates

ALL = ""
"""The segment of those who are in none, and what everybody has met."""
_PRIOR = 20
"""So many users of everybody's kind are added to a segment, so that few of its own don't decide alone (the additive
smoothing of a binomial share towards the overall one)."""
_MOST = 1_000
"""Popular items that are kept for each segment."""

Best = Mapping[tuple[str, int], tuple[np.ndarray, np.ndarray]]
"""By segment and bits of rules: positions of the popular items, sorted, and their shares."""


def counts(log: DataFrame, items: DataFrame, users: DataFrame) -> DataFrame:
    """segment, item_id, users, of: how many users of a segment have met the item, of how many who have met any item.

    Users are counted in their own segment and in ALL.
    """
    people = (
        log.select("user_id", "item_id")
        .join(items.select("item_id"), on="item_id", how="left_semi")
        .distinct()
    )
    of_whom = people.join(users.select("user_id", "segment"), on="user_id", how="left")
    each = F.explode(
        F.array_distinct(F.array(F.lit(ALL), F.coalesce("segment", F.lit(ALL))))
    ).alias("segment")
    counted = of_whom.select("user_id", "item_id", each)
    size = counted.groupBy("segment").agg(F.countDistinct("user_id").alias("of"))
    met = counted.groupBy("segment", "item_id").agg(F.count(F.lit(1)).alias("users"))
    return met.join(F.broadcast(size), on="segment", how="inner").select(
        "segment", "item_id", "users", "of"
    )


def best(popularity: DataFrame, offered: DataFrame) -> DataFrame:
    """segment, item_id, share: of the items `offered` (item_id) those that are most popular in each segment.

    popularity: rows of `counts`; they are read several times.
    A share is that of the segment's users who have met the item, smoothed towards that of all users.
    """
    there = popularity.join(offered.select("item_id"), on="item_id", how="left_semi")
    overall = there.where(F.col("segment") == ALL)
    of_all = overall.select("item_id", (F.col("users") / F.col("of")).alias("overall"))
    most = of_all.orderBy(F.desc("overall"), "item_id").limit(_MOST).select("item_id")
    sizes = popularity.where(F.col("segment") != ALL).select("segment", "of").distinct()
    mine = there.where(F.col("segment") != ALL).select("segment", "item_id", "users")
    pairs = (
        mine.select("segment", "item_id")
        .unionByName(sizes.select("segment").crossJoin(most))
        .distinct()
    )
    smoothed = (F.coalesce("users", F.lit(0)) + _PRIOR * F.col("overall")) / (F.col("of") + _PRIOR)
    shares = (
        pairs.join(mine, on=["segment", "item_id"], how="left")
        .join(F.broadcast(sizes), on="segment", how="inner")
        .join(of_all, on="item_id", how="inner")
        .select("segment", "item_id", smoothed.alias("share"))
        .unionByName(
            of_all.select(F.lit(ALL).alias("segment"), "item_id", F.col("overall").alias("share"))
        )
    )
    rank = F.row_number().over(Window.partitionBy("segment").orderBy(F.desc("share"), "item_id"))
    return shares.withColumn("rank", rank).where(F.col("rank") <= _MOST).drop("rank")


def placed(
    rows: pa.Table, bits: int, searcher: Searcher
) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """`best` by the positions of an index; items that it doesn't hold are left out."""
    segments = rows["segment"].combine_chunks()
    place, share = searcher.positions_of(rows["item_id"].combine_chunks()), rows["share"].to_numpy()
    found = {}
    named = segments.dictionary_encode()
    number = named.indices.to_numpy()
    for own, segment in enumerate(named.dictionary.to_pylist()):
        here = np.flatnonzero((number == own) & (place >= 0))
        order = here[np.argsort(place[here])]
        found[segment, bits] = place[order], share[order]
    return found


class ByPopularity:
    """A way of matching: by what is popular in the user's segment, where that is known, else by what is with all."""

    sources: ClassVar[tuple[str, str]] = ("popular", "popular")
    by_history = False

    def __init__(self, popular: Best):
        self._popular = popular

    def tastes(
        self, batch: pa.RecordBatch, searcher: Searcher, why: bool = True
    ) -> PopularityQuery:
        """Of rows with `segment` (null: none) and `rules`, as `offers.applying` gives them."""
        nothing = np.empty(0, np.int64), np.empty(0)
        wanted = zip(
            batch.column("segment").to_pylist(), batch.column("rules").to_pylist(), strict=True
        )
        mine = [
            self._popular.get((segment or ALL, bits)) or self._popular.get((ALL, bits), nothing)
            for segment, bits in wanted
        ]
        return PopularityQuery([Candidates(positions, shares) for positions, shares in mine])
