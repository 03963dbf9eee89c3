"""The log to weighted histories and their mean vectors. SQL decides which events count; numpy adds up.

Knows events and weights; the item vectors come from the index artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking import history
from vlm4rec_spark.models.ranking.user_queries import Shape
from vlm4rec_spark.storage.schemas import PROFILES


class ProfileSettings(BaseModel):
    """Which events count, and how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {
        "view": 1.0,
        "cart": 3.0,
        "purchase": 5.0,
    }
    half_life_days: PositiveFloat | None = 60.0
    position_decay: float = Field(1.0, gt=0, le=1)
    last_n: int = Field(50, ge=1)
    shape: Shape = "mean"
    tastes: int = Field(3, ge=1, le=20)
    negative_events: tuple[str, ...] = ()
    session_minutes: PositiveFloat | None = None
    min_items: int = Field(1, ge=1)
    bot_events_per_day: int = Field(500, ge=1)


def identified(interactions: DataFrame, identities: DataFrame) -> DataFrame:
    """The events, those of an anonymous id under the user that it belongs to; a user's own id is taken as it is."""
    known = identities.select(
        F.col("anonymous_id").alias("user_id"), F.col("user_id").alias("known")
    )
    merged = interactions.join(known, on="user_id", how="left")
    return merged.withColumn("user_id", F.coalesce("known", "user_id")).select(
        *interactions.columns
    )


def bots(interactions: DataFrame, bot_events_per_day: int) -> DataFrame:
    """user_id of those with more events than a person makes on any one day."""
    # Few have so many events on all days together: only theirs are counted by day.
    busy = interactions.groupBy("user_id").agg(F.count(F.lit(1)).alias("events"))
    busy = busy.where(F.col("events") > bot_events_per_day).select("user_id")
    daily = (
        interactions.join(busy, on="user_id", how="left_semi")
        .groupBy("user_id", "event_date")
        .agg(F.count(F.lit(1)).alias("events"))
    )
    return daily.where(F.col("events") > bot_events_per_day).select("user_id").distinct()


def histories(interactions: DataFrame, items: DataFrame, settings: ProfileSettings) -> DataFrame:
    """user_id, history, seen, events, last_event_at of every user with an event that counts.

    An item's weight is the sum over its events of event weight x 2^(-age / half-life), times position_decay for each
    item that came later; age is counted back from the user's own last event, so a quiet user's profile doesn't change.
    `history` holds the last_n items, latest first. An item with a negative event is in none until it is taken up again;
    an event that repeats the one before it of its kind within a session counts once; who has fewer than least_items in
    the history has no profile.
    """
    # Bots go before the rows are divided by user: one of them may have more events than a worker holds.
    few = bots(interactions, settings.bot_events_per_day)
    events = (
        interactions.join(F.broadcast(few), on="user_id", how="left_anti")
        .join(items.select("item_id"), on="item_id", how="left_semi")
        .select("user_id", "item_id", "event_type", "event_time")
    )
    weights = F.create_map(
        *[F.lit(part) for pair in settings.event_weights.items() for part in pair]
    )
    counts = _first_of_session(settings) & _liked(settings)
    # A window, since repartition() is a mere wish: where a join below has divided by user already, Spark 4.2 drops it,
    # and may then drop that join's division too (adaptive execution, local shuffle reads), which tears users apart.
    # Of equal times the lighter event first: the order in which floats are added may not depend on chance.
    in_order = Window.partitionBy("user_id").orderBy("item_id", "event_time", "weight")
    rows = (
        events.withColumn("weight", F.when(counts, weights[F.col("event_type")]))
        .withColumn("place", F.row_number().over(in_order))
        .select("user_id", "item_id", "event_time", "weight", "place")
    )
    numbers = settings.half_life_days, settings.position_decay, settings.last_n, settings.min_items

    def gathered(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for users in history.whole_users(batches):
            yield history.weighted_histories(users, *numbers)

    return rows.mapInArrow(gathered, StructType([PROFILES.schema[name] for name in _HISTORY]))


_HISTORY = ("user_id", "history", "seen", "events", "last_event_at")


def _first_of_session(settings: ProfileSettings) -> Column:
    """False for an event that follows one of the same user, item and type within so many minutes."""
    if settings.session_minutes is None:
        return F.lit(True)
    same = Window.partitionBy("user_id", "item_id", "event_type").orderBy("event_time")
    apart = F.unix_micros("event_time") - F.lag(F.unix_micros("event_time")).over(same)
    return apart.isNull() | (apart > int(settings.session_minutes * 60_000_000))


def _liked(settings: ProfileSettings) -> Column:
    """False for the events up to the last negative one of their user and item, and for those themselves."""
    if not settings.negative_events:
        return F.lit(True)
    negative = F.col("event_type").isin(*settings.negative_events)
    last = F.max(F.when(negative, F.col("event_time"))).over(
        Window.partitionBy("user_id", "item_id")
    )
    return last.isNull() | (F.col("event_time") > last)


def with_embedding(
    rows: DataFrame, representation: str, open_searcher: Callable[[], Searcher]
) -> DataFrame:
    """Rows of `profiles`: each history with the unit vector of its weighted mean, null when no item has a vector."""
    schema = PROFILES.schema
    bare = rows.select(
        "user_id",
        F.lit(representation).alias("representation"),
        "history",
        "seen",
        "events",
        "last_event_at",
    )

    def mean(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        for batch in batches:
            embedding = _mean_vectors(batch.column("history"), searcher)
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column(name) if name != "embedding" else embedding
                    for name in schema.fieldNames()
                ],
                names=schema.fieldNames(),
            )

    return bare.mapInArrow(mean, schema)


def _mean_vectors(histories: pa.ListArray, searcher: Searcher) -> pa.ListArray:
    """One unit vector per history; null where none of its items is in the index."""
    flat = histories.flatten()
    users = np.repeat(np.arange(len(histories)), np.asarray(histories.value_lengths()))
    # Each item is looked up once, however many have it.
    named = flat.field("item_id").dictionary_encode()
    positions = searcher.positions(named.dictionary.to_pylist())[named.indices.to_numpy()]
    known = positions >= 0
    users, positions = users[known], positions[known]
    weights = flat.field("weight").to_numpy(zero_copy_only=False)[known]
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    totals = np.empty((len(starts), searcher.vectors.shape[1]))
    for row, (start, end) in enumerate(zip(starts, [*starts[1:], len(users)], strict=True)):
        totals[row] = weights[start:end] @ searcher.vectors[positions[start:end]].astype(np.float64)
    lengths = np.linalg.norm(totals, axis=1)
    sound = lengths > 0
    made = (totals[sound] / lengths[sound, None]).astype(np.float32)
    with_vector = np.zeros(len(histories), bool)
    with_vector[users[starts[sound]]] = True
    offsets = np.concatenate([[0], np.cumsum(with_vector)]) * made.shape[1]
    mask = pa.array(~with_vector)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(made.ravel()), mask=mask
    )
