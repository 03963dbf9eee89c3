"""The few photos that the page shows, fetched together as thumbnails with their item's title and
caption.

Knows the tables that hold photos, titles and captions; not which photos are shown, nor why.
Thumbnails are made on the executors: the driver gets a few kilobytes per photo, however large it
is.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from pyspark.sql import functions as F

from vlm4rec_spark.models.photos.decode import PhotoError
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.data import PhotoCard
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

CAPTION_LENGTH = 600
_TITLE_LENGTH = 160

PhotoKey = tuple[str, int]
"""item_id and position of a photo."""


class _Thumbnail(NamedTuple):
    """A `data:` URI, or None and the problem."""

    src: str | None
    problem: str


class Thumbnails:
    """Photos by their key, and items by their first photo."""

    def __init__(
        self,
        tables: Tables,
        keys: Iterable[PhotoKey],
        item_ids: Iterable[str],
    ):
        shown_items = sorted(set(item_ids))
        first = _first_positions(tables, shown_items)
        self._first = {item_id: (item_id, first.get(item_id, 0)) for item_id in shown_items}
        all_keys = sorted({*keys, *self._first.values()})
        all_ids = sorted({item_id for item_id, _ in all_keys})
        self._titles = _titles(tables, all_ids)
        self._captions = _captions(tables, shown_items)
        self._thumbnails = _thumbnails(tables, all_keys, all_ids)

    def photo(
        self,
        key: PhotoKey,
        caption: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PhotoCard:
        """The photo of a key, or what is wrong with it, with this caption and these attributes."""
        item_id, _ = key
        thumbnail = self._thumbnails.get(key, _Thumbnail(None, "no photo"))
        title = self._titles.get(item_id)
        return PhotoCard(item_id, title, *thumbnail, caption, attributes or {})

    def item(self, item_id: str) -> PhotoCard:
        """The first photo of an item, with the item's caption."""
        return self.photo(self._first[item_id], self._captions.get(item_id))


def _first_positions(tables: Tables, item_ids: list[str]) -> Mapping[str, int]:
    if not item_ids:
        return {}
    photos = tables.read(schemas.PHOTOS).where(F.col("item_id").isin(item_ids))
    rows = photos.groupBy("item_id").agg(F.min("position").alias("position"))
    return {row["item_id"]: row["position"] for row in rows.collect()}


def _titles(tables: Tables, item_ids: list[str]) -> Mapping[str, str]:
    if not item_ids:
        return {}
    title = F.substring("title", 1, _TITLE_LENGTH).alias("title")
    items = tables.read(schemas.ITEMS).where(F.col("item_id").isin(item_ids))
    return {row["item_id"]: row["title"] for row in items.select("item_id", title).collect()}


def _captions(tables: Tables, item_ids: list[str]) -> Mapping[str, str]:
    """The caption of each item's first photo that has one."""
    if not item_ids:
        return {}
    links = tables.read(schemas.ITEM_CAPTIONS).where(F.col("item_id").isin(item_ids))
    captions = tables.read(schemas.CAPTIONS).where(F.col("caption").isNotNull())
    caption = F.substring("caption", 1, CAPTION_LENGTH).alias("caption")
    texts = captions.select("caption_key", caption)
    rows = links.join(texts, on="caption_key", how="inner").collect()
    rows.sort(key=lambda row: row["position"], reverse=True)
    return {row["item_id"]: row["caption"] for row in rows}


def _thumbnails(
    tables: Tables,
    keys: list[PhotoKey],
    item_ids: list[str],
) -> Mapping[PhotoKey, _Thumbnail]:
    """The thumbnails of the keys that have a photo."""
    if not keys:
        return {}
    key = F.concat_ws("/", "item_id", "position")
    names = [f"{item_id}/{position}" for item_id, position in keys]
    # By item_id too, which lets whole files be skipped.
    is_requested = F.col("item_id").isin(item_ids) & key.isin(names)
    rows = tables.read(schemas.PHOTOS).where(is_requested).select("item_id", "position", "image")
    schema = "item_id STRING, position INT, src STRING, problem STRING"
    return {
        (row["item_id"], row["position"]): _Thumbnail(row["src"], row["problem"])
        for row in rows.mapInPandas(_make_thumbnails, schema).collect()
    }


def _make_thumbnails(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        thumbnails = [_make_thumbnail(image) for image in batch["image"]]
        yield batch[["item_id", "position"]].assign(
            src=[thumbnail.src for thumbnail in thumbnails],
            problem=[thumbnail.problem for thumbnail in thumbnails],
        )


def _make_thumbnail(image: bytes | None) -> _Thumbnail:
    if image is None:
        return _Thumbnail(None, "not stored")
    try:
        jpeg = pictures.thumbnail(bytes(image))
    except PhotoError as error:
        return _Thumbnail(None, error.error_class.replace("_", " "))
    return _Thumbnail("data:image/jpeg;base64," + base64.b64encode(jpeg).decode(), "")
