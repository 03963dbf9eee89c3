"""What the page shows with photos: captions, failures, users' histories and lists.

Knows how to choose a few and to fetch only their photos. Thumbnails are made on the executors: the driver gets a few
kilobytes per photo, however large it is.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark import schemas
from vlm4rec_spark.models.images import PhotoError
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.data import Captions, Failure, Photo, PhotoStock, Recommended, Run, SharedPhoto, User

if TYPE_CHECKING:
    from vlm4rec_spark.tables import Tables

_FAILURES_PER_CLASS = 4
_FAILURES = 24
_SHARED = 3
_LOOKED_AT = 1_000
_HISTORY = 8
_LIST = 12
_MODERATE = (5, 12)
"""Items in the history of a user that can be taken in at a glance and still say something."""
_SHORT = (1, 3)
_TITLE_LENGTH, _CAPTION_LENGTH = 160, 600

Place = tuple[str, int]
"""item_id and position of a photo."""


def photo_stock(tables: Tables, photos: int) -> PhotoStock:
    """Kinds of photos in a sample of about _LOOKED_AT contents, and contents that stand under several items."""
    rows = tables.read(schemas.PHOTOS)
    if photos == 0:
        return PhotoStock()
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
    counted = {row["kind"]: row["count"] for row in kinds.orderBy(F.desc("count"), "kind").limit(20).collect()}
    total = by_content.agg(F.count(F.lit(1)).alias("contents"), F.sum("photos").alias("photos")).collect()[0]
    few = by_content.orderBy(F.desc("items"), "image_sha256").limit(_SHARED).collect()
    seen = _photos(tables, [tuple(row["first"]) for row in few])
    return PhotoStock(
        looked_at=sum(counted.values()),
        kinds=counted,
        shared_contents=total["contents"],
        shared_photos=total["photos"] or 0,
        shared=tuple(SharedPhoto(seen[tuple(row["first"])], row["last"], row["items"]) for row in few),
    )


def caption_samples(tables: Tables, photos: int, worked: Run | None) -> Captions:
    """Captions in force and failures of the model and prompt that ran last; `photos` of them as samples."""
    captions = tables.read(schemas.CAPTIONS)
    current = F.col("status") == "imported"
    if worked and {"model", "prompt_id"} <= worked.details.keys():
        current |= (F.col("model") == worked.details["model"]) & (F.col("prompt_id") == worked.details["prompt_id"])
        captions = captions.where(current)
    statuses = {row["status"]: row["count"] for row in captions.groupBy("status").count().orderBy("status").collect()}
    broken = captions.where(F.col("status").isin("failed", "rejected")).join(
        tables.read(schemas.PHOTOS).select("item_id", "position", "image_sha256"), on="image_sha256", how="inner"
    )
    classes = broken.groupBy("error_class").count().orderBy(F.desc("count"), "error_class").limit(_FAILURES).collect()
    nth = F.row_number().over(Window.partitionBy("error_class").orderBy("caption_key", "item_id", "position"))
    failed = (
        broken.select("item_id", "position", "error_class", "error", nth.alias("nth"))
        .where(F.col("nth") <= _FAILURES_PER_CLASS)
        .orderBy("nth", "error_class").limit(_FAILURES).collect()
    )  # fmt: skip
    chosen = _some_captioned(tables, captions, photos)
    seen = _photos(tables, [*chosen, *((row["item_id"], row["position"]) for row in failed)])
    return Captions(
        statuses=statuses,
        failed_classes={row["error_class"]: row["count"] for row in classes},
        samples=tuple(replace(seen[place], caption=caption) for place, caption in chosen.items()),
        failures=tuple(
            Failure(seen[row["item_id"], row["position"]], row["error_class"], (row["error"] or "")[:_CAPTION_LENGTH])
            for row in failed
        ),
        worked=worked,
    )


def _some_captioned(tables: Tables, captions: DataFrame, photos: int) -> dict[Place, str]:
    linked = tables.read(schemas.ITEM_CAPTIONS).join(
        captions.where(F.col("caption").isNotNull()).select("caption_key", "caption"), on="caption_key", how="inner"
    )
    # Twice as many, since identical photos share a caption and are shown once.
    few = linked.orderBy(F.xxhash64("caption_key"), "caption_key", "item_id", "position").limit(2 * photos).collect()
    once = {row["caption_key"]: row for row in reversed(few)}
    rows = list(reversed(once.values()))[:photos]
    return {(row["item_id"], row["position"]): row["caption"][:_CAPTION_LENGTH] for row in rows}


def user_lists(tables: Tables, users: int) -> tuple[User, ...]:
    """Users with a history of moderate length and one with a short one, each with history and list as photos."""
    chosen = _choose_users(tables, users)
    mains = _main_photos(tables, {item for row, items in chosen for item in _shown(row, items)})
    return tuple(
        User(
            row["user_id"],
            row["history_items"],
            row["events"],
            tuple(mains[item] for item in row["history"]),
            tuple(
                Recommended(
                    mains[item["item_id"]],
                    item["score"],
                    mains[item["because_item_id"]] if item["because_item_id"] else None,
                    tuple(item["because_terms"] or ()),
                )
                for item in items
            ),
        )
        for row, items in chosen
    )


def _choose_users(tables: Tables, users: int) -> list[tuple[Row, list[Row]]]:
    """Rows of user_id, events, history_items, history; each with the items of the user's list."""
    size = F.size("history")
    profiles = tables.read(schemas.PROFILES).select(
        "user_id",
        "events",
        size.alias("history_items"),
        F.slice("history.item_id", 1, _HISTORY).alias("history"),
        F.when(size.between(*_MODERATE), 0).when(size.between(*_SHORT), 1).otherwise(2).alias("kind"),
    )
    nth = F.row_number().over(Window.partitionBy("kind").orderBy(F.xxhash64("user_id"), "user_id"))
    # Twice as many, since some may have no list.
    few = profiles.withColumn("nth", nth).where(F.col("nth") <= 2 * users).orderBy("kind", "nth").collect()
    lists = (
        tables.read(schemas.RECOMMENDATIONS)
        .where(F.col("user_id").isin([row["user_id"] for row in few]) & (F.size("items") > 0))
        .select("user_id", F.slice("items", 1, _LIST).alias("items"))
    )
    items = {row["user_id"]: row["items"] for row in lists.collect()}
    with_list = [row for row in few if row["user_id"] in items]
    moderate, short, other = ([row for row in with_list if row["kind"] == kind] for kind in (0, 1, 2))
    most = max(1, users - 1)
    best = [*moderate[:most], *short[:1], *moderate[most:], *other, *short[1:]][:users]
    return [(row, items[row["user_id"]]) for row in best]


def _shown(row: Row, items: list[Row]) -> Iterator[str]:
    yield from row["history"]
    for item in items:
        yield item["item_id"]
        if item["because_item_id"]:
            yield item["because_item_id"]


def _main_photos(tables: Tables, items: Iterable[str]) -> dict[str, Photo]:
    """The first photo of each item, with the item's caption."""
    ids = sorted(set(items))
    if not ids:
        return {}
    first = tables.read(schemas.PHOTOS).where(F.col("item_id").isin(ids)).groupBy("item_id").agg(F.min("position"))
    places = {row[0]: row[1] for row in first.collect()}
    seen = _photos(tables, [(item, places.get(item, 0)) for item in ids])
    links = tables.read(schemas.ITEM_CAPTIONS).where(F.col("item_id").isin(ids))
    captions = links.join(tables.read(schemas.CAPTIONS).select("caption_key", "caption"), on="caption_key", how="inner")
    said = {row["item_id"]: row["caption"] for row in captions.orderBy(F.desc("position"), F.desc("caption_key")).collect()}
    return {
        item: replace(photo, caption=said[item][:_CAPTION_LENGTH] if said.get(item) else None)
        for (item, _), photo in seen.items()
    }


def _photos(tables: Tables, places: list[Place]) -> dict[Place, Photo]:
    """A Photo per place, whatever there is to show of it."""
    if not places:
        return {}
    ids = sorted({item for item, _ in places})
    titles = tables.read(schemas.ITEMS).where(F.col("item_id").isin(ids)).select("item_id", "title")
    title = {row["item_id"]: row["title"][:_TITLE_LENGTH] if row["title"] else None for row in titles.collect()}
    # By item_id too, by which files can be skipped; the pair alone would read every photo.
    pair = F.struct("item_id", "position")
    wanted = F.col("item_id").isin(ids) & pair.isin([F.struct(F.lit(i), F.lit(p)) for i, p in sorted(set(places))])
    rows = tables.read(schemas.PHOTOS).where(wanted).select("item_id", "position", "image")
    thumbs = rows.mapInPandas(_thumbnails, "item_id STRING, position INT, thumb BINARY, problem STRING").collect()
    by_place = {(row["item_id"], row["position"]): row for row in thumbs}
    return {place: _photo(place[0], title.get(place[0]), by_place.get(place)) for place in places}


def _photo(item_id: str, title: str | None, row: Row | None) -> Photo:
    if row is None:
        return Photo(item_id, title)
    if row["thumb"] is None:
        return Photo(item_id, title, problem=row["problem"])
    return Photo(item_id, title, "data:image/jpeg;base64," + base64.b64encode(row["thumb"]).decode())


def _thumbnails(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        made = [_thumbnail(image) for image in batch["image"]]
        yield batch[["item_id", "position"]].assign(
            thumb=[thumb for thumb, _ in made], problem=[problem for _, problem in made]
        )


def _thumbnail(image: bytes | None) -> tuple[bytes | None, str | None]:
    if image is None:
        return None, "not stored"
    try:
        return pictures.thumbnail(bytes(image)), None
    except PhotoError as bad:
        return None, bad.error_class.replace("_", " ")


def _kinds(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        yield pd.DataFrame({"kind": [pictures.kind(bytes(image)) for image in batch["image"]]})
