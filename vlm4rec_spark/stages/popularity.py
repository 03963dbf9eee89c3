"""Popular items, for users without a usable profile. Knows events and segments; knows no vector."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.popularity_query import PopularityQuery
from vlm4rec_spark.models.ranking.top_k import Candidates

ALL = ""
"""The segment of everybody, and of users who are in no other."""
_PRIOR_USERS = 20
"""So many average users are added to each segment, so that a few of its own don't decide alone.

This is additive smoothing of a binomial share towards the overall share.
"""
_MAX_ITEMS = 1_000
"""Popular items per segment."""


PopularByRules = Mapping[int, Mapping[str, Candidates]]
"""The popular items by rule bits, then by segment, sorted by position.

The scores are the float64 shares of users who know each item.
"""

_NO_ITEMS = Candidates(np.empty(0, np.int64), np.empty(0))


def count_users(
    log: DataFrame,
    items: DataFrame,
    users: DataFrame,
) -> DataFrame:
    """segment, item_id, users, segment_users: how many users know an item, by segment.

    `users` counts the segment's users with an event on the item. `segment_users` counts the
    segment's users with an event on any item. Each user counts in their own segment and in ALL.
    """
    user_items = (
        log.select("user_id", "item_id")
        .join(items.select("item_id"), on="item_id", how="left_semi")
        .distinct()
    )
    everybody = F.lit(ALL)
    own_segment = F.coalesce("segment", everybody)
    segments = F.array_distinct(F.array(everybody, own_segment))
    user_segments = users.select("user_id", "segment")
    counted = user_items.join(user_segments, on="user_id", how="left")
    counted = counted.withColumn("segment", F.explode(segments))
    segment_users = F.countDistinct("user_id")
    sizes = counted.groupBy("segment").agg(segment_users.alias("segment_users"))
    item_users = F.count("*")
    by_item = counted.groupBy("segment", "item_id").agg(item_users.alias("users"))
    rows = by_item.join(F.broadcast(sizes), on="segment", how="inner")
    return rows.select("segment", "item_id", "users", "segment_users")


def popular_items(user_counts: DataFrame, allowed: DataFrame) -> DataFrame:
    """segment, item_id, share: the most popular of the `allowed` items (item_id) in each segment.

    The share is that of the segment's users who have an event on the item, smoothed towards that of
    all users. `user_counts` are rows of `count_users`; they are read several times.
    """
    counts = user_counts.join(allowed.select("item_id"), on="item_id", how="left_semi")
    share = F.col("users") / F.col("segment_users")
    in_all = counts.where(F.col("segment") == ALL)
    overall = in_all.select("item_id", share.alias("overall"))
    in_segment = F.col("segment") != ALL
    sizes = user_counts.where(in_segment).select("segment", "segment_users").distinct()
    own_counts = counts.where(in_segment).select("segment", "item_id", "users")
    # What is popular overall may be popular in a segment that has no event on it.
    popular_overall = overall.orderBy(F.desc("overall"), "item_id").limit(_MAX_ITEMS)
    everywhere = sizes.select("segment").crossJoin(popular_overall.select("item_id"))
    counted = (
        own_counts.select("segment", "item_id")
        .unionByName(everywhere)
        .distinct()
        .join(own_counts, on=["segment", "item_id"], how="left")
        .join(F.broadcast(sizes), on="segment", how="inner")
        .join(overall, on="item_id", how="inner")
    )
    shares = counted.select("segment", "item_id", _smoothed_share().alias("share"))
    overall_shares = overall.toDF("item_id", "share").withColumn("segment", F.lit(ALL))
    return _most_popular(shares.unionByName(overall_shares))


def _smoothed_share() -> Column:
    users = F.coalesce("users", F.lit(0))
    smoothed = users + _PRIOR_USERS * F.col("overall")
    return smoothed / (F.col("segment_users") + _PRIOR_USERS)


def _most_popular(shares: DataFrame) -> DataFrame:
    by_share = Window.partitionBy("segment").orderBy(F.desc("share"), "item_id")
    rank = F.row_number().over(by_share)
    ranked = shares.withColumn("rank", rank)
    return ranked.where(F.col("rank") <= _MAX_ITEMS).drop("rank")


def by_position(rows: pa.Table, searcher: Searcher) -> dict[str, Candidates]:
    """Rows of `popular_items` by segment; items outside the index are left out."""
    positions = searcher.positions_of(rows["item_id"].combine_chunks())
    shares = rows["share"].to_numpy()
    segments = rows["segment"].combine_chunks().dictionary_encode()
    codes = segments.indices.to_numpy()
    by_segment = {}
    for code, segment in enumerate(segments.dictionary.to_pylist()):
        indexed = np.flatnonzero((codes == code) & (positions >= 0))
        order = indexed[np.argsort(positions[indexed])]
        by_segment[segment] = Candidates(positions[order], shares[order])
    return by_segment


class PopularityScoring:
    """Scores items by their popularity in the user's segment; without a known one, in ALL."""

    sources: ClassVar[tuple[str, str]] = ("popular", "popular")
    by_history = False

    def __init__(self, popular: PopularByRules):
        self._popular = popular

    def queries(
        self,
        batch: pa.RecordBatch,
        searcher: Searcher,
        explain: bool = True,
    ) -> PopularityQuery:
        """Queries of rows with `segment` (null: none) and `rules` (bits)."""
        segments = batch.column("segment").to_pylist()
        rules = batch.column("rules").to_pylist()
        popular = []
        for segment, bits in zip(segments, rules, strict=True):
            by_segment = self._popular.get(bits, {})
            everybody = by_segment.get(ALL, _NO_ITEMS)
            popular.append(by_segment.get(segment or ALL, everybody))
        return PopularityQuery(popular)
