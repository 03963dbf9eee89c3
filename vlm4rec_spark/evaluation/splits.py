"""The log cut into what is known and what is to be guessed. Knows time; knows no arm and no metric."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F


def time_split(interactions: DataFrame, cut: str) -> tuple[DataFrame, DataFrame]:
    """Events before the cut, and those from it on."""
    at = F.to_timestamp(F.lit(cut))
    return interactions.where(F.col("event_time") < at), interactions.where(F.col("event_time") >= at)


def leave_one_out(interactions: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Every event but the user's last, and the last one; a user with a single event has no last."""
    user = Window.partitionBy("user_id")
    ordered = interactions.withColumn(
        "from_end", F.row_number().over(user.orderBy(F.desc("event_time"), F.desc("event_id")))
    ).withColumn("length", F.count(F.lit(1)).over(user))
    last = (F.col("from_end") == 1) & (F.col("length") > 1)
    extra = ("from_end", "length")
    return ordered.where(~last).drop(*extra), ordered.where(last).drop(*extra)


def last_share(interactions: DataFrame, share: float) -> str:
    """The start of the day from which on about `share` of all events lie: the default cut of the time split."""
    days = interactions.groupBy("event_date").agg(F.count(F.lit(1)).alias("events"))
    rows = sorted((row["event_date"], row["events"]) for row in days.collect())
    total, later = sum(events for _, events in rows), 0
    for day, events in reversed(rows):
        later += events
        if later >= share * total:
            return f"{day} 00:00:00"
    raise ValueError("the log is empty")


def relevant(known: DataFrame, hidden: DataFrame, candidates: DataFrame) -> DataFrame:
    """user_id, relevant: the candidate items of a user's hidden events that aren't in the user's known ones.

    Users without such an item, or without a known event on any item, can't be judged and are left out.
    """
    new = (
        hidden.select("user_id", "item_id").distinct()
        .join(known.select("user_id", "item_id").distinct(), on=["user_id", "item_id"], how="left_anti")
        .join(candidates.select("item_id"), on="item_id", how="left_semi")
        .join(known.select("user_id").distinct(), on="user_id", how="left_semi")
    )  # fmt: skip
    return new.groupBy("user_id").agg(F.array_sort(F.collect_set("item_id")).alias("relevant"))
