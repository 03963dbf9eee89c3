"""The log to weighted histories and their mean vectors. SQL decides which events count and how much; numpy sums.

Knows events and weights; the item vectors come from the index artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.searcher import Searcher
from vlm4rec_spark.models.tastes import Shape
from vlm4rec_spark.schemas import PROFILES


class ProfileSettings(BaseModel):
    """Which events count, and how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {
        "view": 1.0, "cart": 3.0, "purchase": 5.0,
    }  # fmt: skip
    half_life_days: PositiveFloat | None = 60.0
    position_decay: float = Field(1.0, gt=0, le=1)
    last_n: int = Field(50, ge=1)
    shape: Shape = "mean"
    tastes: int = Field(3, ge=1, le=20)
    negative_events: tuple[str, ...] = ()
    session_minutes: PositiveFloat | None = None
    least_items: int = Field(1, ge=1)
    bot_events_per_day: int = Field(500, ge=1)


def bots(interactions: DataFrame, bot_events_per_day: int) -> DataFrame:
    """user_id of those with more events than a person makes on any one day."""
    daily = interactions.groupBy("user_id", "event_date").agg(F.count(F.lit(1)).alias("events"))
    return daily.where(F.col("events") > bot_events_per_day).select("user_id").distinct()


def histories(interactions: DataFrame, items: DataFrame, settings: ProfileSettings) -> DataFrame:
    """user_id, history, seen, events, last_event_at of every user with an event that counts.

    An item's weight is the sum over its events of event weight x 2^(-age / half-life), times position_decay for each
    item that came later; age is counted back from the user's own last event, so a quiet user's profile doesn't change.
    `history` holds the last_n items, latest first. An item with a negative event is in none until it is taken up again;
    an event that repeats the one before it of its kind within a session counts once; who has fewer than least_items in
    the history has no profile.
    """
    events = (
        interactions.join(bots(interactions, settings.bot_events_per_day), on="user_id", how="left_anti")
        .join(items.select("item_id"), on="item_id", how="left_semi")
    )  # fmt: skip
    weights = F.create_map(*[F.lit(part) for pair in settings.event_weights.items() for part in pair])
    weighted = _liked(_once_a_session(events, settings), settings).withColumn("weight", weights[F.col("event_type")])
    seen = events.groupBy("user_id").agg(F.array_sort(F.collect_set("item_id")).alias("seen"))
    counted = weighted.where(F.col("weight").isNotNull()).withColumn(
        "last_event_at", F.max("event_time").over(Window.partitionBy("user_id"))
    )
    if settings.half_life_days:
        age_days = (F.unix_micros("last_event_at") - F.unix_micros("event_time")) / F.lit(86_400e6)
        counted = counted.withColumn("weight", F.col("weight") * F.pow(F.lit(2.0), -age_days / settings.half_life_days))
    # Floats are added in the order of time, so that the bits don't depend on how rows were partitioned.
    in_order = F.array_sort(F.collect_list(F.struct("event_time", "event_id", "weight")))
    by_item = counted.groupBy("user_id", "item_id").agg(
        F.aggregate(in_order, F.lit(0.0), lambda total, event: total + event["weight"]).alias("weight"),
        F.max("event_time").alias("item_last_at"),
        F.max("last_event_at").alias("last_event_at"),
        F.count(F.lit(1)).alias("events"),
    )
    latest_first = F.array_sort(F.collect_list(
        F.struct((-F.unix_micros("item_last_at")).alias("recency"), "item_id", "weight")
    ))  # fmt: skip
    return (
        by_item.groupBy("user_id").agg(
            F.slice(latest_first, 1, settings.last_n).alias("latest"),
            F.sum("events").alias("events"),
            F.max("last_event_at").alias("last_event_at"),
        )
        .where(F.size("latest") >= settings.least_items)
        .join(seen, on="user_id", how="inner")
        .select(
            "user_id",
            F.transform("latest", lambda item, later: F.struct(
                item["item_id"].alias("item_id"),
                (item["weight"] * F.pow(F.lit(settings.position_decay), later)).alias("weight"),
            )).alias("history"),
            "seen",
            "events",
            "last_event_at",
        )
    )  # fmt: skip


def _once_a_session(events: DataFrame, settings: ProfileSettings) -> DataFrame:
    """Without the events that follow one of the same user, item and type within so many minutes."""
    if settings.session_minutes is None:
        return events
    same = Window.partitionBy("user_id", "item_id", "event_type").orderBy("event_time", "event_id")
    apart = F.unix_micros("event_time") - F.lag(F.unix_micros("event_time")).over(same)
    first = apart.isNull() | (apart > int(settings.session_minutes * 60_000_000))
    return events.withColumn("first", first).where("first").drop("first")


def _liked(events: DataFrame, settings: ProfileSettings) -> DataFrame:
    """Without the events up to the last negative one of their user and item, and without those themselves."""
    if not settings.negative_events:
        return events
    negative = F.col("event_type").isin(*settings.negative_events)
    last = F.max(F.when(negative, F.col("event_time"))).over(Window.partitionBy("user_id", "item_id"))
    return events.withColumn("last", last).where(F.col("last").isNull() | (F.col("event_time") > F.col("last"))).drop(
        "last"
    )


def with_embedding(rows: DataFrame, representation: str, open_searcher: Callable[[], Searcher]) -> DataFrame:
    """Rows of `profiles`: each history with the unit vector of its weighted mean, null when no item has a vector."""
    schema = PROFILES.schema
    bare = rows.select("user_id", F.lit(representation).alias("representation"), "history", "seen", "events",
                       "last_event_at")  # fmt: skip

    def mean(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        for batch in batches:
            vectors = _mean_vectors(batch.column("history"), searcher)
            embedding = pa.array([vector if vector is not None else None for vector in vectors], pa.list_(pa.float32()))
            yield pa.RecordBatch.from_arrays(
                [batch.column(name) if name != "embedding" else embedding for name in schema.fieldNames()],
                names=schema.fieldNames(),
            )

    return bare.mapInArrow(mean, schema)


def _mean_vectors(history: pa.ListArray, searcher: Searcher) -> list[np.ndarray | None]:
    """One unit vector per history; None where none of its items is in the index."""
    flat = history.flatten()
    users = np.repeat(np.arange(len(history)), np.asarray(history.value_lengths()))
    positions = searcher.positions(flat.field("item_id").to_pylist())
    known = positions >= 0
    users, positions = users[known], positions[known]
    weights = flat.field("weight").to_numpy(zero_copy_only=False)[known]
    vectors: list[np.ndarray | None] = [None] * len(history)
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(users)], strict=True):
        total = weights[start:end] @ searcher.vectors[positions[start:end]].astype(np.float64)
        length = np.linalg.norm(total)
        if length > 0:
            vectors[users[start]] = (total / length).astype(np.float32)
    return vectors
