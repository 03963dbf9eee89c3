"""The log to weighted histories and their mean vectors. SQL decides which events count; numpy sums.

Knows events and weights. The item vectors come from the index artifact.
"""

from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveFloat
from pyspark.sql import Column, DataFrame, GroupedData, Window
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking import event_weights
from vlm4rec_spark.models.ranking.user_queries import Shape
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.storage.schemas import PROFILES

EventWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_HISTORY_COLUMNS = ("user_id", "history", "seen", "events", "last_event_at")


class ProfileSettings(Settings):
    """Which events count, and how much."""

    event_weights: dict[str, EventWeight] = Field({"view": 1.0, "cart": 3.0, "purchase": 5.0})
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
    """The events with each anonymous id replaced by its user's id; user ids stay as they are."""
    owners = identities.select(
        F.col("anonymous_id").alias("user_id"),
        F.col("user_id").alias("owner"),
    )
    events = interactions.join(owners, on="user_id", how="left")
    user_id = F.coalesce("owner", "user_id")
    return events.withColumn("user_id", user_id).select(*interactions.columns)


def bots(interactions: DataFrame, bot_events_per_day: int) -> DataFrame:
    """user_id of users with more than `bot_events_per_day` events on any one day."""
    # Few users have so many events in total: only theirs are counted by day.
    busy = _with_more_events(interactions.groupBy("user_id"), bot_events_per_day)
    events = interactions.join(busy, on="user_id", how="left_semi")
    daily = events.groupBy("user_id", "event_date")
    days = _with_more_events(daily, bot_events_per_day)
    return days.select("user_id").distinct()


def events_by_user(
    interactions: DataFrame, items: DataFrame, settings: ProfileSettings
) -> DataFrame:
    """user_id, events, is_bot, counting: how many events, and how many a profile may be made of."""
    catalogue = items.select("item_id", F.lit(True).alias("in_catalogue"))
    counts = F.col("event_type").isin(*settings.event_weights) & F.col("in_catalogue")
    days = (
        interactions.join(catalogue, on="item_id", how="left")
        .groupBy("user_id", "event_date")
        .agg(F.count("*").alias("events"), F.count_if(counts).alias("counting"))
    )
    return days.groupBy("user_id").agg(
        F.sum("events").alias("events"),
        (F.max("events") > settings.bot_events_per_day).alias("is_bot"),
        F.sum("counting").alias("counting"),
    )


def _with_more_events(groups: GroupedData, events: int) -> DataFrame:
    return groups.count().where(F.col("count") > events)


def histories(
    interactions: DataFrame,
    items: DataFrame,
    settings: ProfileSettings,
) -> DataFrame:
    """user_id, history, seen, events, last_event_at of every user with an event that counts.

    An item's weight is the sum over its events of event weight x 2^(-age / half-life), times
    position_decay for each item that came later. Age is counted from the user's own last event, so
    the profile of a quiet user doesn't change. `history` holds the last_n items, latest first.
    An item with a negative event counts only by its later events. Within a session a repeated event
    counts once. Users with fewer than min_items in the history have no profile.
    """
    # Bots go before the rows are divided by user: one may have more events than a worker can hold.
    events = without_bots(interactions, settings.bot_events_per_day)
    return summed_histories(weighted_events(events, items, settings), settings)


def without_bots(interactions: DataFrame, bot_events_per_day: int) -> DataFrame:
    robots = bots(interactions, bot_events_per_day)
    return interactions.join(F.broadcast(robots), on="user_id", how="left_anti")


def weighted_events(
    interactions: DataFrame,
    items: DataFrame,
    settings: ProfileSettings,
) -> DataFrame:
    """user_id, item_id, event_time, weight and user_row, as `weighted_histories` takes them."""
    events = interactions.join(items.select("item_id"), on="item_id", how="left_semi").select(
        "user_id", "item_id", "event_type", "event_time"
    )
    weights = [F.lit(value) for pair in settings.event_weights.items() for value in pair]
    weight_by_type = F.create_map(*weights)
    weight = weight_by_type[F.col("event_type")]
    counts = _first_of_session(settings) & _after_negative_events(settings)
    # A window, because repartition() isn't binding. Spark 4.2 drops it if a join below has divided
    # the rows by user already. Then it may drop that join's division too (adaptive execution, local
    # shuffle reads), which splits a user between tasks.
    # Of equal times the lighter event first: floats must be added in the same order every time.
    in_order = Window.partitionBy("user_id").orderBy("item_id", "event_time", "weight")
    user_row = F.row_number().over(in_order)
    return (
        events.withColumn("weight", F.when(counts, weight))
        .withColumn("user_row", user_row)
        .select("user_id", "item_id", "event_time", "weight", "user_row")
    )


def summed_histories(events: DataFrame, settings: ProfileSettings) -> DataFrame:
    """The histories of `weighted_events`."""
    half_life_days = settings.half_life_days
    position_decay = settings.position_decay
    last_n = settings.last_n
    min_items = settings.min_items

    def gather(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for users in event_weights.whole_users(batches):
            yield event_weights.weighted_histories(
                users,
                half_life_days,
                position_decay,
                last_n,
                min_items,
            )

    schema = StructType([PROFILES.schema[name] for name in _HISTORY_COLUMNS])
    return events.mapInArrow(gather, schema)


def _first_of_session(settings: ProfileSettings) -> Column:
    """False for an event within session_minutes of one of the same user, item and type."""
    if settings.session_minutes is None:
        return F.lit(True)
    same = Window.partitionBy("user_id", "item_id", "event_type").orderBy("event_time")
    micros = F.unix_micros("event_time")
    since_previous = micros - F.lag(micros).over(same)
    session_micros = int(settings.session_minutes * 60_000_000)
    return since_previous.isNull() | (since_previous > session_micros)


def _after_negative_events(settings: ProfileSettings) -> Column:
    """False for events up to the last negative event of the same user and item, and for itself."""
    if not settings.negative_events:
        return F.lit(True)
    negative = F.col("event_type").isin(*settings.negative_events)
    same = Window.partitionBy("user_id", "item_id")
    event_time = F.col("event_time")
    negative_time = F.when(negative, event_time)
    last_negative = F.max(negative_time).over(same)
    return last_negative.isNull() | (event_time > last_negative)


def with_embedding(
    rows: DataFrame,
    representation: str,
    open_searcher: Callable[[], Searcher],
) -> DataFrame:
    """Rows of `profiles`: `rows` of histories with the unit vector of their weighted mean.

    The vector is null if no item of the history is in the index.
    """
    columns = PROFILES.schema.fieldNames()
    without_vector = rows.select(
        "user_id",
        F.lit(representation).alias("representation"),
        "history",
        "seen",
        "events",
        "last_event_at",
    )

    def add_embedding(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in append_embedding(batches, open_searcher()):
            yield batch.select(columns)

    return without_vector.mapInArrow(add_embedding, PROFILES.schema)


def append_embedding(
    batches: Iterator[pa.RecordBatch],
    searcher: Searcher,
) -> Iterator[pa.RecordBatch]:
    """The batches of histories with the column embedding, as in `with_embedding`."""
    for batch in batches:
        embedding = _mean_vectors(batch.column("history"), searcher)
        yield batch.append_column("embedding", embedding)


def _mean_vectors(histories: pa.ListArray, searcher: Searcher) -> pa.ListArray:
    """One unit vector per history; null where no item is in the index or the sum is zero."""
    entries = histories.flatten()
    sizes = np.asarray(histories.value_lengths())
    users = np.repeat(np.arange(len(histories)), sizes)
    positions = searcher.positions_of(entries.field("item_id"))
    indexed = positions >= 0
    weights = np.asarray(entries.field("weight"))[indexed]
    positions = positions[indexed]
    users = users[indexed]
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    ends = np.append(starts[1:], len(users))
    dimension = searcher.vectors.shape[1]
    totals = np.empty((len(starts), dimension))
    for row, start in enumerate(starts):
        items = slice(start, ends[row])
        vectors = searcher.vectors[positions[items]]
        totals[row] = weights[items] @ vectors.astype(np.float64)
    lengths = np.linalg.norm(totals, axis=1)
    nonzero = lengths > 0
    means = totals[nonzero] / lengths[nonzero, None]
    with_vector = np.zeros(len(histories), bool)
    with_vector[users[starts[nonzero]]] = True
    return event_weights.list_array(
        with_vector * dimension,
        means.astype(np.float32).ravel(),
        pa.array(~with_vector),
    )
