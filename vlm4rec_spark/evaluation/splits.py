"""The log cut into train and test events. Knows time; knows no arm and no metric."""

from collections.abc import Iterator
from dataclasses import dataclass

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation.arms import EvaluateSettings


@dataclass(frozen=True)
class Split:
    """Train and test events. `cut` is the time between them, None if the test holds each user's
    last event."""

    name: str
    cut: str | None
    train: DataFrame
    test: DataFrame


def of(log: DataFrame, settings: EvaluateSettings) -> Iterator[Split]:
    """The splits that the settings name, in their order."""
    for name in settings.splits:
        if name == "time":
            cut = settings.cut or last_share(log, settings.test_share)
            yield Split(name, cut, *time_split(log, cut))
        else:
            yield Split(name, None, *leave_one_out(log))


def validation(split: Split, test_share: float) -> Split:
    """The same kind of split within the train events: what settings may be tuned on."""
    name = f"{split.name}, validation"
    if split.cut is None:
        return Split(name, None, *leave_one_out(split.train))
    cut = last_share(split.train, test_share)
    return Split(name, cut, *time_split(split.train, cut))


def time_split(interactions: DataFrame, cut: str) -> tuple[DataFrame, DataFrame]:
    """Events before the cut, and events from the cut on."""
    before = F.col("event_time") < F.to_timestamp(F.lit(cut))
    return interactions.where(before), interactions.where(~before)


def leave_one_out(interactions: DataFrame) -> tuple[DataFrame, DataFrame]:
    """All events but each user's last, and the last ones. A user with a single event keeps it in
    train."""
    user = Window.partitionBy("user_id")
    latest_first = user.orderBy(F.desc("event_time"), F.desc("event_id"))
    ordered = interactions.withColumn("from_end", F.row_number().over(latest_first))
    ordered = ordered.withColumn("length", F.count(F.lit(1)).over(user))
    last = (F.col("from_end") == 1) & (F.col("length") > 1)
    extra = ("from_end", "length")
    return ordered.where(~last).drop(*extra), ordered.where(last).drop(*extra)


def last_share(interactions: DataFrame, share: float) -> str:
    """The start of the first day such that about `share` of all events follow: the default cut of
    the time split."""
    days = interactions.groupBy("event_date").agg(F.count(F.lit(1)).alias("events"))
    rows = sorted((row["event_date"], row["events"]) for row in days.collect())
    total = sum(events for _, events in rows)
    later = 0
    for day, events in reversed(rows):
        later += events
        if later >= share * total:
            return f"{day} 00:00:00"
    raise ValueError("the log is empty")


def relevant(train: DataFrame, test: DataFrame, candidates: DataFrame) -> DataFrame:
    """user_id, relevant: the candidate items of a user's test events that aren't in the user's
    train events. Those are `seen`.

    Users without such an item, or without a train event, can't be tested and are left out.
    """
    item_id = F.col("item_id")
    is_test = F.col("is_test")
    tested = test.join(candidates.select("item_id"), on="item_id", how="left_semi")
    events = train.select("user_id", item_id, F.lit(False).alias("is_test")).unionByName(
        tested.select("user_id", item_id, F.lit(True).alias("is_test"))
    )
    users = events.groupBy("user_id").agg(
        F.collect_set(F.when(is_test, item_id)).alias("tested"),
        F.collect_set(F.when(~is_test, item_id)).alias("seen"),
    )
    new = F.array_sort(F.array_except("tested", "seen"))
    rows = users.where(F.size("seen") > 0).select("user_id", new.alias("relevant"), "seen")
    return rows.where(F.size("relevant") > 0)
