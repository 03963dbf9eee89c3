"""What the page shows with photos: kinds of photos, captions, failures, users with their lists.

Knows how a few are chosen, by hash and so the same each time. A class reads its samples when it is
created, and names the photos that it needs. `with_photos` turns it into plain values. So all photos
are fetched at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.captioning.attributes import Attributes
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.data import (
    CaptionFailure,
    CaptionSummary,
    PhotoSummary,
    RecommendedItem,
    StageRun,
    UserCard,
)
from vlm4rec_spark.report.thumbnails import CAPTION_LENGTH, PhotoKey, Thumbnails
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

ATTRIBUTES = tuple(Attributes.model_fields)
_SAMPLED_CONTENTS = 1_000
_MAX_KINDS = 20
_FAILURES_PER_CLASS = 4
_FAILURES = 24
_VALUES = 6
_HISTORY = 8
_LIST = 12
_MODERATE = (5, 12)
"""Items in a history that can be read at a glance and still say something."""
_SHORT = (1, 3)


def photo_summary(tables: Tables, photos: int) -> PhotoSummary:
    """Kinds of photos in a sample of about _SAMPLED_CONTENTS, and contents that several items
    share."""
    rows = tables.read(schemas.PHOTOS)
    kinds = {row["kind"]: row["count"] for row in _count_kinds(rows, photos)}
    contents = rows.where(F.col("bytes") > 0).groupBy("image_sha256")
    counted = contents.agg(
        F.countDistinct("item_id").alias("items"),
        F.count(F.lit(1)).alias("photos"),
    )
    shared = counted.where(F.col("items") > 1)
    count = F.count(F.lit(1)).alias("contents")
    total = shared.agg(count, F.sum("photos").alias("photos")).collect()[0]
    return PhotoSummary(sum(kinds.values()), kinds, total["contents"], total["photos"] or 0)


def _count_kinds(photos: DataFrame, total: int) -> list[Row]:
    """kind, count: the commonest kinds in the sample."""
    sample = photos.where(F.col("image").isNotNull())
    if total > _SAMPLED_CONTENTS:
        # SHA-256 is uniform, so a range of it is a random sample that is the same each time.
        end = int(2**32 * _SAMPLED_CONTENTS / total)
        sample = sample.where(F.col("image_sha256") < f"{end:08x}")
    kinds = sample.select("image").mapInPandas(_kinds, "kind STRING").groupBy("kind").count()
    return kinds.orderBy(F.desc("count"), "kind").limit(_MAX_KINDS).collect()


def _kinds(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        yield pd.DataFrame({"kind": [pictures.kind(bytes(image)) for image in batch["image"]]})


class CaptionSamples:
    """Captions in force, and failures, of the model and prompt that ran last; `photos` of them as
    samples."""

    def __init__(
        self,
        tables: Tables,
        photos: int,
        runs: Sequence[StageRun],
    ):
        """`runs` of the caption stage, latest first."""
        captions = _captions_of_last_run(tables, runs)
        self._model_run = next((run for run in runs if run.rows_ok + run.rows_failed), None)
        self._statuses = captions.groupBy("status").count().orderBy("status").collect()
        photo_keys = tables.read(schemas.PHOTOS).select("item_id", "position", "image_sha256")
        failed = captions.where(F.col("status").isin("failed", "rejected"))
        failed = failed.join(photo_keys, on="image_sha256", how="inner")
        by_class = failed.groupBy("error_class").count()
        self._classes = by_class.orderBy(F.desc("count"), "error_class").limit(_FAILURES).collect()
        self._failed = _failures(failed)
        texts = captions.where(F.col("caption").isNotNull())
        texts = texts.select("caption_key", "caption", "attributes")
        linked = tables.read(schemas.ITEM_CAPTIONS).join(texts, on="caption_key", how="inner")
        self._covered = linked.select("item_id").distinct().count()
        self._samples = _captioned_photos(linked, photos)
        self._values = _commonest_values(linked)

    @property
    def photo_keys(self) -> list[PhotoKey]:
        rows = (*self._samples, *self._failed)
        return [_key(row) for row in rows]

    def with_photos(self, thumbnails: Thumbnails) -> CaptionSummary:
        return CaptionSummary(
            statuses={row["status"]: row["count"] for row in self._statuses},
            failed_classes={row["error_class"]: row["count"] for row in self._classes},
            covered=self._covered,
            samples=tuple(
                thumbnails.photo(_key(row), row["caption"][:CAPTION_LENGTH], row["attributes"])
                for row in self._samples
            ),
            failures=tuple(
                CaptionFailure(
                    thumbnails.photo(_key(row)),
                    row["error_class"],
                    (row["error"] or "")[:CAPTION_LENGTH],
                )
                for row in self._failed
            ),
            model_run=self._model_run,
            attributes=self._values,
        )


def _captions_of_last_run(tables: Tables, runs: Sequence[StageRun]) -> DataFrame:
    """Imported captions, and those of the model and prompt of the latest run; all captions without
    a run."""
    captions = tables.read(schemas.CAPTIONS)
    details = runs[0].details if runs else {}
    if not {"model", "prompt_id"} <= details.keys():
        return captions
    is_model = F.col("model") == details["model"]
    is_prompt = F.col("prompt_id") == details["prompt_id"]
    return captions.where((F.col("status") == "imported") | (is_model & is_prompt))


def _failures(failed: DataFrame) -> list[Row]:
    """item_id, position, error_class, error: a few of each class."""
    within_class = Window.partitionBy("error_class").orderBy("caption_key", "item_id", "position")
    number = F.row_number().over(within_class).alias("number")
    rows = failed.select("item_id", "position", "error_class", "error", number)
    few = rows.where(F.col("number") <= _FAILURES_PER_CLASS)
    return few.orderBy("number", "error_class").limit(_FAILURES).collect()


def _captioned_photos(linked: DataFrame, photos: int) -> list[Row]:
    """item_id, position, caption_key, caption and attributes of `photos` captions in force."""
    order = (F.xxhash64("caption_key"), "caption_key", "item_id", "position")
    # Twice as many, since identical photos share a caption and are shown once.
    rows = linked.orderBy(*order).limit(2 * photos).collect()
    by_caption: dict[str, Row] = {}
    for row in rows:
        by_caption.setdefault(row["caption_key"], row)
    return list(by_caption.values())[:photos]


def _commonest_values(linked: DataFrame) -> dict[str, tuple[tuple[str, int], ...]]:
    """The commonest values of each attribute, attributes in the order of the prompt."""
    pairs = linked.select(F.explode("attributes").alias("name", "value"))
    pairs = pairs.where(F.col("name").isin(*ATTRIBUTES))
    counts = pairs.groupBy("name", F.lower("value").alias("value")).count()
    by_count = Window.partitionBy("name").orderBy(F.desc("count"), "value")
    ranked = counts.withColumn("rank", F.row_number().over(by_count))
    values: dict[str, list[tuple[str, int]]] = {name: [] for name in ATTRIBUTES}
    for row in ranked.where(F.col("rank") <= _VALUES).orderBy("rank").collect():
        values[row["name"]].append((row["value"], row["count"]))
    return {name: tuple(pairs) for name, pairs in values.items() if pairs}


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
    for row in profiles:
        if row["user_id"] in items:
            by_length[row["length"]].append(row)
    moderate, short, other = by_length.values()
    first = max(1, users - 1)
    ordered = [*moderate[:first], *short[:1], *moderate[first:], *other, *short[1:]]
    return [_UserSample(row, items[row["user_id"]]) for row in ordered[:users]]


def _sample_profiles(tables: Tables, users: int) -> list[Row]:
    """user_id, events, history_items, history, length: twice as many as `users` of each length."""
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
    few = numbered.where(F.col("number") <= 2 * users)
    return few.orderBy("length", "number").collect()


def _key(row: Row) -> PhotoKey:
    return row["item_id"], row["position"]
