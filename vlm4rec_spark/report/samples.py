"""What the page shows with photos: kinds of photos, captions, failures, users with their lists.

Knows how a few are chosen, by hash and so the same each time. Each class chooses when it is made, names the photos that
it needs, and becomes plain values once the album has them: so that photos are fetched once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.captioning.attributes import Attributes
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.data import (
    Captions,
    DiscordantUser,
    Failure,
    PhotoStock,
    Recommended,
    SharedPhoto,
    ShownPhoto,
    StageRun,
    User,
    figures,
)
from vlm4rec_spark.report.thumbnails import CAPTION_LENGTH, Album, Place
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

ATTRIBUTES = tuple(Attributes.model_fields)
_SHARED = 3
_LOOKED_AT = 1_000
_FAILURES_PER_CLASS = 4
_FAILURES = 24
_EXTREMES = 3
_VALUES = 6
_HISTORY = 8
_LIST = 12
_MODERATE = (5, 12)
"""Items in the history of a user that can be taken in at a glance and still say something."""
_SHORT = (1, 3)


class ChosenStock:
    """Kinds of photos in a sample of about _LOOKED_AT contents, and contents that stand under several items."""

    def __init__(self, tables: Tables, photos: int):
        rows = tables.read(schemas.PHOTOS)
        sample = rows.where(F.col("image").isNotNull())
        if photos > _LOOKED_AT:
            # SHA-256 is uniform, so a range of it is a random sample that is the same each time.
            sample = sample.where(F.col("image_sha256") < f"{int(2**32 * _LOOKED_AT / photos):08x}")
        kinds = sample.select("image").mapInPandas(_kinds, "kind STRING").groupBy("kind").count()
        by_content = (
            rows.where(F.col("bytes") > 0)
            .groupBy("image_sha256")
            .agg(
                F.countDistinct("item_id").alias("items"),
                F.count(F.lit(1)).alias("photos"),
                F.min(F.struct("item_id", "position")).alias("first"),
                F.max("item_id").alias("last"),
            )
            .where(F.col("items") > 1)
        )
        self._kinds = kinds.orderBy(F.desc("count"), "kind").limit(20).collect()
        self._total = by_content.agg(
            F.count(F.lit(1)).alias("contents"), F.sum("photos").alias("photos")
        ).collect()[0]
        self._few = by_content.orderBy(F.desc("items"), "image_sha256").limit(_SHARED).collect()

    @property
    def places(self) -> list[Place]:
        return [tuple(row["first"]) for row in self._few]

    def shown(self, album: Album) -> PhotoStock:
        return PhotoStock(
            looked_at=sum(row["count"] for row in self._kinds),
            kinds={row["kind"]: row["count"] for row in self._kinds},
            shared_contents=self._total["contents"],
            shared_photos=self._total["photos"] or 0,
            shared=tuple(
                SharedPhoto(album.photo(place), row["last"], row["items"])
                for place, row in zip(self.places, self._few, strict=True)
            ),
        )


class ChosenCaptions:
    """Captions in force and failures of the model and prompt that ran last; `photos` of them as samples."""

    def __init__(self, tables: Tables, photos: int, runs: Sequence[StageRun]):
        """`runs` of the caption stage, latest first."""
        captions = tables.read(schemas.CAPTIONS)
        details = runs[0].details if runs else {}
        if {"model", "prompt_id"} <= details.keys():
            same = (F.col("model") == details["model"]) & (
                F.col("prompt_id") == details["prompt_id"]
            )
            captions = captions.where((F.col("status") == "imported") | same)
        self._worked = next((run for run in runs if run.rows_ok + run.rows_failed), None)
        self._statuses = captions.groupBy("status").count().orderBy("status").collect()
        bad = captions.where(F.col("status").isin("failed", "rejected"))
        place = tables.read(schemas.PHOTOS).select("item_id", "position", "image_sha256")
        broken = bad.join(place, on="image_sha256", how="inner")
        by_class = broken.groupBy("error_class").count()
        self._classes = by_class.orderBy(F.desc("count"), "error_class").limit(_FAILURES).collect()
        nth = F.row_number().over(
            Window.partitionBy("error_class").orderBy("caption_key", "item_id", "position")
        )
        few = broken.select("item_id", "position", "error_class", "error", nth.alias("nth"))
        few = (
            few.where(F.col("nth") <= _FAILURES_PER_CLASS)
            .orderBy("nth", "error_class")
            .limit(_FAILURES)
        )
        self._failed = few.collect()
        linked = _linked(tables, captions)
        self._covered = linked.select("item_id").distinct().count()
        self._samples = _some_captioned(linked, photos)
        self._shortest = _extreme(linked, F.asc)
        self._longest = _extreme(linked, F.desc)
        self._values = _commonest_values(linked)

    @property
    def places(self) -> list[Place]:
        rows = (*self._samples, *self._failed, *self._shortest, *self._longest)
        return [(row["item_id"], row["position"]) for row in rows]

    def shown(self, album: Album) -> Captions:
        return Captions(
            statuses={row["status"]: row["count"] for row in self._statuses},
            failed_classes={row["error_class"]: row["count"] for row in self._classes},
            covered=self._covered,
            samples=_captioned(self._samples, album),
            shortest=_captioned(self._shortest, album),
            longest=_captioned(self._longest, album),
            failures=tuple(
                Failure(
                    album.photo((row["item_id"], row["position"])),
                    row["error_class"],
                    (row["error"] or "")[:CAPTION_LENGTH],
                )
                for row in self._failed
            ),
            worked=self._worked,
            attributes=self._values,
        )


class ChosenUsers:
    """Users with a history of moderate length and one with a short one, each with history and list."""

    def __init__(self, tables: Tables, users: int):
        self._few = _choose_users(tables, users)

    @property
    def items(self) -> Iterator[str]:
        for row, items in self._few:
            yield from row["history"]
            for item in items:
                yield from filter(
                    None, (item["item_id"], item["because_item_id"], *item["collapsed"])
                )

    def shown(self, album: Album) -> tuple[User, ...]:
        return tuple(
            User(
                row["user_id"],
                row["history_items"],
                row["events"],
                tuple(album.main(item) for item in row["history"]),
                tuple(_recommended(item, album) for item in items),
            )
            for row, items in self._few
        )


class ChosenApart:
    """Users whom one arm of the evaluation served and the other didn't, as its details name them."""

    def __init__(self, evaluated: StageRun | None):
        told = {
            split: figures(text) for split, text in (evaluated.details if evaluated else {}).items()
        }
        each = (
            (split, entry) for split, facts in told.items() for entry in _listed(facts.get("apart"))
        )
        self._few = [(split, entry) for split, entry in each if isinstance(entry, dict)]

    @property
    def items(self) -> Iterator[str]:
        for _, entry in self._few:
            yield from (entry["item_id"], *entry["instead"])

    def shown(self, album: Album) -> tuple[DiscordantUser, ...]:
        return tuple(
            DiscordantUser(
                split,
                entry["user_id"],
                entry["by"],
                entry["not_by"],
                entry["rank"],
                album.main(entry["item_id"]),
                tuple(album.main(item) for item in entry["instead"]),
            )
            for split, entry in self._few
        )


def _listed(found: object) -> list[Any]:
    return found if isinstance(found, list) else []


def _recommended(item: Row, album: Album) -> Recommended:
    because = album.main(item["because_item_id"]) if item["because_item_id"] else None
    collapsed = tuple(album.main(other) for other in item["collapsed"])
    terms = tuple(item["because_terms"] or ())
    return Recommended(album.main(item["item_id"]), item["score"], because, terms, collapsed)


def _linked(tables: Tables, captions: DataFrame) -> DataFrame:
    """item_id, position, caption_key, caption and attributes of the captions in force."""
    return tables.read(schemas.ITEM_CAPTIONS).join(
        captions.where(F.col("caption").isNotNull()).select("caption_key", "caption", "attributes"),
        on="caption_key",
        how="inner",
    )


def _captioned(rows: Sequence[Row], album: Album) -> tuple[ShownPhoto, ...]:
    return tuple(
        album.photo(
            (row["item_id"], row["position"]), row["caption"][:CAPTION_LENGTH], row["attributes"]
        )
        for row in rows
    )


def _commonest_values(linked: DataFrame) -> dict[str, tuple[tuple[str, int], ...]]:
    """Of each attribute the few values that most photos have, in the order in which a prompt names the attributes."""
    said = linked.select(F.explode("attributes").alias("name", "value"))
    said = said.where(F.col("name").isin(*ATTRIBUTES)).select(
        "name", F.lower("value").alias("value")
    )
    counts = said.groupBy("name", "value").count()
    nth = F.row_number().over(Window.partitionBy("name").orderBy(F.desc("count"), "value"))
    rows = counts.withColumn("nth", nth).where(F.col("nth") <= _VALUES).orderBy("nth").collect()
    by_name = {
        name: tuple((row["value"], row["count"]) for row in rows if row["name"] == name)
        for name in ATTRIBUTES
    }
    return {name: values for name, values in by_name.items() if values}


def _extreme(linked: DataFrame, order: Callable[[Column], Column]) -> list[Row]:
    """The few captions in force that come first by their length, each once."""
    once = linked.groupBy("caption_key", "caption").agg(
        F.min(F.struct("item_id", "position")).alias("place"),
        F.any_value("attributes").alias("attributes"),
    )
    few = once.orderBy(order(F.length("caption")), "caption_key").limit(_EXTREMES)
    return few.select(
        "place.*", "caption", "attributes", F.length("caption").alias("length")
    ).collect()


def _some_captioned(linked: DataFrame, photos: int) -> list[Row]:
    """Rows of `_linked` for `photos` captions in force."""
    # Twice as many, since identical photos share a caption and are shown once.
    few = (
        linked.orderBy(F.xxhash64("caption_key"), "caption_key", "item_id", "position")
        .limit(2 * photos)
        .collect()
    )
    once = {row["caption_key"]: row for row in reversed(few)}
    return list(reversed(once.values()))[:photos]


def _choose_users(tables: Tables, users: int) -> list[tuple[Row, list[Row]]]:
    """Rows of user_id, events, history_items, history; each with the items of the user's list."""
    size = F.size("history")
    profiles = tables.read(schemas.PROFILES).select(
        "user_id",
        "events",
        size.alias("history_items"),
        F.slice("history.item_id", 1, _HISTORY).alias("history"),
        F.when(size.between(*_MODERATE), 0)
        .when(size.between(*_SHORT), 1)
        .otherwise(2)
        .alias("kind"),
    )
    nth = F.row_number().over(Window.partitionBy("kind").orderBy(F.xxhash64("user_id"), "user_id"))
    # Twice as many, since some may have no list.
    few = (
        profiles.withColumn("nth", nth)
        .where(F.col("nth") <= 2 * users)
        .orderBy("kind", "nth")
        .collect()
    )
    lists = (
        tables.read(schemas.RECOMMENDATIONS)
        .where(F.col("user_id").isin([row["user_id"] for row in few]) & (F.size("items") > 0))
        .select("user_id", F.slice("items", 1, _LIST).alias("items"))
    )
    items = {row["user_id"]: row["items"] for row in lists.collect()}
    with_list = [row for row in few if row["user_id"] in items]
    moderate, short, other = (
        [row for row in with_list if row["kind"] == kind] for kind in (0, 1, 2)
    )
    most = max(1, users - 1)
    best = [*moderate[:most], *short[:1], *moderate[most:], *other, *short[1:]][:users]
    return [(row, items[row["user_id"]]) for row in best]


def _kinds(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        yield pd.DataFrame({"kind": [pictures.kind(bytes(image)) for image in batch["image"]]})
