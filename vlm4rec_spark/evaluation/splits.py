"""The log cut into what is known and what is to be guessed. Knows time; knows no arm and no metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation.arms import EvaluateSettings


@dataclass(frozen=True)
class Split:
    """Known events and hidden ones; `cut`: the time that divides them, None where each user's last is hidden."""

    name: str
    cut: str | None
    train: DataFrame
    test: DataFrame


def of(log: DataFrame, settings: EvaluateSettings) -> Iterator[Split]:
    """The splits that the settings name, in their order."""
    for name in settings.splits:
        if name == "leave_one_out":
            yield Split(name, None, *leave_one_out(log))
        elif name == "time":
            cut = settings.cut or last_share(log, settings.test_share)
            yield Split(name, cut, *time_split(log, cut))
        else:
            yield from replay(log, settings)


def replay(log: DataFrame, settings: EvaluateSettings) -> Iterator[Split]:
    """Cuts one after another, each judged by the events up to the next; the test part is divided into equal times."""
    first = settings.cut or last_share(log, settings.test_share)
    end = log.agg(F.unix_micros(F.max("event_time"))).first()[0] + 1  # type: ignore[index]
    start = log.sparkSession.range(1).select(F.unix_micros(F.to_timestamp(F.lit(first)))).first()[0]  # type: ignore[index]
    # At whole minutes, that their names can be read.
    edges = [
        start + (end - start) * part // settings.replay_cuts // 60_000_000 * 60_000_000
        for part in range(settings.replay_cuts)
    ]
    for number, (at, until) in enumerate(zip(edges, [*edges[1:], end], strict=True)):
        micros = F.unix_micros("event_time")
        moment = (
            log.sparkSession.range(1)
            .select(F.timestamp_micros(F.lit(at)).cast("string"))
            .first()[0]
        )  # type: ignore[index]
        known, hidden = log.where(micros < at), log.where((micros >= at) & (micros < until))
        yield Split(f"replay {number + 1}", str(moment), known, hidden)


def validation(split: Split, test_share: float) -> Split:
    """The same kind of split once more, of what is known: what settings may be chosen by."""
    if split.cut is None:
        return Split(f"{split.name}, validation", None, *leave_one_out(split.train))
    cut = last_share(split.train, test_share)
    return Split(f"{split.name}, validation", cut, *time_split(split.train, cut))


def time_split(interactions: DataFrame, cut: str) -> tuple[DataFrame, DataFrame]:
    """Events before the cut, and those from it on."""
    at = F.to_timestamp(F.lit(cut))
    return interactions.where(F.col("event_time") < at), interactions.where(
        F.col("event_time") >= at
    )


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
        hidden.select("user_id", "item_id")
        .distinct()
        .join(
            known.select("user_id", "item_id").distinct(),
            on=["user_id", "item_id"],
            how="left_anti",
        )
        .join(candidates.select("item_id"), on="item_id", how="left_semi")
        .join(known.select("user_id").distinct(), on="user_id", how="left_semi")
    )
    return new.groupBy("user_id").agg(F.array_sort(F.collect_set("item_id")).alias("relevant"))
