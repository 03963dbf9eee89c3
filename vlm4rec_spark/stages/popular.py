"""What is popular, for users of whose taste nothing is known. Knows events and segments; no vector."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.ranking import SCORE_DIGITS

_ALL, _MET = "", 100
"""Who is in no segment; and so many popular items are kept besides k, for users who have met some of them."""


def lists(
    waiting: DataFrame, log: DataFrame, items: DataFrame, users: DataFrame, index_id: str, k: int
) -> DataFrame:
    """Rows of lists for users without a usable history: what most users of their segment have met.

    waiting: user_id. log: events of people. users: user_id, segment; who has no segment, or one in which too few items
    were met, gets what is popular with all. A score is the share of the segment's users who have met the item.
    """
    available = items.where("available").select("item_id")
    in_segment = users.select("user_id", F.coalesce("segment", F.lit(_ALL)).alias("segment"))
    people = log.select("user_id", "item_id").join(available, on="item_id", how="left_semi").distinct()
    of_whom = people.join(in_segment, on="user_id", how="left")
    each = F.explode(F.array_distinct(F.array(F.lit(_ALL), F.coalesce("segment", F.lit(_ALL))))).alias("segment")
    counted = of_whom.select("user_id", "item_id", each).groupBy("segment", "item_id").agg(
        F.count(F.lit(1)).alias("users")
    )  # fmt: skip
    size = of_whom.select("user_id", each).distinct().groupBy("segment").agg(F.count(F.lit(1)).alias("all"))
    met = people.join(waiting, on="user_id", how="left_semi").groupBy("user_id").agg(
        F.collect_set("item_id").alias("met")
    )  # fmt: skip
    rank = F.row_number().over(Window.partitionBy("segment").orderBy(F.desc("users"), "item_id"))
    best = (
        counted.withColumn("rank", rank).where(F.col("rank") <= k + _MET)
        .join(size, on="segment", how="inner")
        .groupBy("segment").agg(F.array_sort(F.collect_list(
            F.struct("rank", "item_id", F.round(F.col("users") / F.col("all"), SCORE_DIGITS).alias("score"))
        )).alias("best"))
    )  # fmt: skip
    for_all = best.where(F.col("segment") == _ALL).select(F.col("best").alias("of_all"))
    placed = (
        waiting.join(in_segment, on="user_id", how="left").join(met, on="user_id", how="left")
        .join(best, on="segment", how="left").crossJoin(for_all)
    )  # fmt: skip
    mine, met_ids = F.coalesce("best", F.slice("of_all", 1, 0)), F.coalesce("met", F.array())
    # A small segment's items may not fill a list.
    others = F.filter("of_all", lambda item: ~F.exists(mine, lambda own: own["item_id"] == item["item_id"]))
    new = F.filter(F.concat(mine, others), lambda item: ~F.array_contains(met_ids, item["item_id"]))
    return placed.select(
        "user_id",
        F.transform(F.slice(new, 1, k), lambda item: F.struct(
            item["item_id"].alias("item_id"), item["score"].alias("score"),
            F.lit(None).cast("string").alias("because_item_id"), F.array().cast("array<string>").alias("because_terms"),
            F.lit("popular").alias("source"), F.array().cast("array<string>").alias("collapsed"),
        )).alias("items"),
        F.lit(k).alias("k"),
        F.lit(index_id).alias("index_id"),
    )  # fmt: skip
