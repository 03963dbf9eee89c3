"""Publish: the long and the wide shape, and a change feed that holds nothing but changes."""

from pyspark.sql import DataFrame, SparkSession

from vlm4rec_spark.stages import publish
from vlm4rec_spark.storage.schemas import EXPORT_LONG
from vlm4rec_spark.storage.tables import Tables

ITEM = "STRUCT<item_id: STRING, score: DOUBLE, because_item_id: STRING>"
ANN = ("ann", "default", [("A", 0.9, "H"), ("B", 0.5, None)])
BEN = ("ben", "default", [("C", 0.7, "H")])


def lists(spark: SparkSession, *rows: tuple) -> DataFrame:
    return spark.createDataFrame(list(rows), f"user_id STRING, list STRING, items ARRAY<{ITEM}>")


def titles(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([("A", "Chair"), ("C", "Lamp")], "item_id STRING, title STRING")


def test_both_shapes(spark: SparkSession):
    recommendations = lists(spark, ANN, BEN, ("cat", "default", []))
    assert sorted(map(tuple, publish.long(recommendations, titles(spark)).collect())) == [
        ("ann", "default", 1, "A", "Chair", 0.9, "H"),
        ("ann", "default", 2, "B", None, 0.5, None),
        ("ben", "default", 1, "C", "Lamp", 0.7, "H"),
    ]
    assert sorted(map(tuple, publish.wide(recommendations).collect())) == [
        ("ann", "default", ["A", "B"], [0.9, 0.5]),
        ("ben", "default", ["C"], [0.7]),
        ("cat", "default", [], []),
    ]


def test_the_feed_holds_changes_and_deletions_only(spark: SparkSession, tmp_path):
    tables = Tables(spark, str(tmp_path))
    changed = ("ann", "default", [("A", 0.9, "H"), ("C", 0.6, None)])
    for rows in ((ANN, BEN), (ANN, BEN), (changed,)):
        tables.sync(EXPORT_LONG, publish.long(lists(spark, *rows), titles(spark)))
    feed = (
        spark.read.format("delta")
        .options(readChangeFeed=True, startingVersion=0)
        .load(tables.name_of(EXPORT_LONG))
        .collect()
    )
    first = min(row["_commit_version"] for row in feed)
    later = [
        (row["_change_type"], row["user_id"], row["rank"], row["item_id"])
        for row in feed
        if row["_commit_version"] > first
    ]
    assert sorted(later) == [
        ("delete", "ben", 1, "C"),
        ("update_postimage", "ann", 2, "C"),
        ("update_preimage", "ann", 2, "B"),
    ]
