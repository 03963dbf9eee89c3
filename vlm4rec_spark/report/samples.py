"""What the page shows with photos: captions, failures, users with their lists.

Knows how a few are chosen, by hash and so the same each time. A class names the photos and captions
that it needs. `with_photos` turns it into plain values. So all photos are fetched at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyspark.sql import Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark.report.data import (
    CaptionFailure,
    CaptionSummary,
    RecommendedItem,
    StageRun,
    UserCard,
)
from vlm4rec_spark.report.figures import ATTRIBUTES, Figures
from vlm4rec_spark.report.thumbnails import Thumbnails
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_FAILURES_PER_CLASS = 4
_FAILURES = 24
_VALUES = 6
_HISTORY = 8
_LIST = 12
_MODERATE = (5, 12)
"""Items in a history that can be read at a glance and still say something."""
_SHORT = (1, 3)


class _FailureSample(NamedTuple):
    """`number`: the place among the failures of its class."""

    number: int
    error_class: str
    photo: Row


class CaptionSamples:
    """Captions in force, and failures, of the model and prompt that ran last; `photos` of them as
    samples."""

    def __init__(
        self,
        figures: Figures,
        photos: int,
        runs: Sequence[StageRun],
    ):
        """`runs` of the caption stage, latest first."""
        self._figures = figures
        self._model_run = next((run for run in runs if run.rows_ok + run.rows_failed), None)
        self._samples = [row["photo"] for row in figures.of("samples")[:photos]]
        failures = [
            _FailureSample(number, error_class, row["photo"])
            for error_class, rows in figures.by_name("failures").items()
            for number, row in enumerate(rows[:_FAILURES_PER_CLASS])
        ]
        self._failures = sorted(failures)[:_FAILURES]

    @property
    def photos(self) -> list[Row]:
        """caption_key, item_id and position."""
        return [*self._samples, *(failure.photo for failure in self._failures)]

    def with_photos(self, thumbnails: Thumbnails) -> CaptionSummary:
        values = self._figures.by_name("values")
        return CaptionSummary(
            statuses=dict(sorted(self._figures.counts("statuses").items())),
            failed_classes=dict(list(self._figures.counts("failed").items())[:_FAILURES]),
            covered=sum(self._figures.counts("captioned").values()),
            samples=tuple(thumbnails.captioned(photo) for photo in self._samples),
            failures=tuple(
                CaptionFailure(
                    thumbnails.captioned(photo),
                    error_class,
                    thumbnails.error(photo["caption_key"]),
                )
                for _, error_class, photo in self._failures
            ),
            model_run=self._model_run,
            attributes={
                name: tuple((row["key"], row["rows"]) for row in values[name][:_VALUES])
                for name in ATTRIBUTES
                if name in values
            },
        )


class _UserSample(NamedTuple):
    """profile: user_id, events, history_items, history. items: of the user's list."""

    profile: Row
    items: list[Row]


class UserSamples:
    """Users with a history of moderate length and one with a short history, each with their
    list."""

    def __init__(self, tables: Tables, users: int):
        self._users = _sample_users(tables, users)

    @property
    def item_ids(self) -> Iterator[str]:
        for user in self._users:
            yield from user.profile["history"]
            for item in user.items:
                yield item["item_id"]
                yield from item["collapsed"]
                if item["because_item_id"]:
                    yield item["because_item_id"]

    def with_photos(self, thumbnails: Thumbnails) -> tuple[UserCard, ...]:
        return tuple(
            UserCard(
                profile["user_id"],
                profile["history_items"],
                profile["events"],
                tuple(map(thumbnails.item, profile["history"])),
                tuple(_recommended_item(item, thumbnails) for item in items),
            )
            for profile, items in self._users
        )


def _recommended_item(item: Row, thumbnails: Thumbnails) -> RecommendedItem:
    reason = item["because_item_id"]
    return RecommendedItem(
        thumbnails.item(item["item_id"]),
        item["score"],
        thumbnails.item(reason) if reason else None,
        tuple(item["because_terms"] or ()),
        tuple(map(thumbnails.item, item["collapsed"])),
    )


def _sample_users(tables: Tables, users: int) -> list[_UserSample]:
    profiles = _sample_profiles(tables, users)
    user_ids = [row["user_id"] for row in profiles]
    lists = (
        tables.read(schemas.RECOMMENDATIONS)
        .where(F.col("user_id").isin(user_ids) & (F.size("items") > 0))
        .select("user_id", F.slice("items", 1, _LIST).alias("items"))
    )
    items = {row["user_id"]: row["items"] for row in lists.collect()}
    by_length: dict[str, list[Row]] = {"moderate": [], "short": [], "other": []}
    for row in sorted(profiles, key=lambda row: row["number"]):
        if row["user_id"] in items:
            by_length[row["length"]].append(row)
    moderate, short, other = by_length.values()
    first = max(1, users - 1)
    ordered = [*moderate[:first], *short[:1], *moderate[first:], *other, *short[1:]]
    return [_UserSample(row, items[row["user_id"]]) for row in ordered[:users]]


def _sample_profiles(tables: Tables, users: int) -> list[Row]:
    """user_id, events, history_items, history, length and number: twice as many as `users` of each
    length, numbered by a hash."""
    size = F.size("history")
    length = F.when(size.between(*_MODERATE), "moderate").when(size.between(*_SHORT), "short")
    profiles = tables.read(schemas.PROFILES).select(
        "user_id",
        "events",
        size.alias("history_items"),
        F.slice("history.item_id", 1, _HISTORY).alias("history"),
        length.otherwise("other").alias("length"),
    )
    by_hash = Window.partitionBy("length").orderBy(F.xxhash64("user_id"), "user_id")
    numbered = profiles.withColumn("number", F.row_number().over(by_hash))
    # Twice as many, since some may have no list.
    return numbered.where(F.col("number") <= 2 * users).collect()
