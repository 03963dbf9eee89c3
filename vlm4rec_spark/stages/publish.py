"""Recommendations in the shapes that activation tools read. Knows no table and no scheduling."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F


def long(recommendations: DataFrame, items: DataFrame) -> DataFrame:
    """One row per user and rank: the columns of `export_long`."""
    exploded = recommendations.select(
        "user_id",
        "list",
        F.posexplode("items").alias("position", "item"),
    )
    ranked = exploded.select(
        "user_id",
        "list",
        (F.col("position") + 1).alias("rank"),
        "item.item_id",
        "item.score",
        "item.because_item_id",
    )
    titles = items.select("item_id", "title")
    return ranked.join(titles, on="item_id", how="left").select(
        "user_id", "list", "rank", "item_id", "title", "score", "because_item_id"
    )


def wide(recommendations: DataFrame) -> DataFrame:
    """One row per user: the columns of `export_wide`."""
    return recommendations.select(
        "user_id",
        "list",
        F.col("items.item_id").alias("item_ids"),
        F.col("items.score").alias("scores"),
    )
