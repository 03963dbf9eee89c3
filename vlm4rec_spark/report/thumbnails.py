"""The few photos that the page shows, fetched together as thumbnails with their item's title and caption.

Knows the tables that hold photos, titles and captions; not which photos are wanted, nor why. Thumbnails are made on the
executors: the driver gets a few kilobytes per photo, however large it is.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import pandas as pd
from pyspark.sql import functions as F

from vlm4rec_spark.models.photos.decode import PhotoError
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.data import ShownPhoto
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

CAPTION_LENGTH = 600
_TITLE_LENGTH = 160

Place = tuple[str, int]
"""item_id and position of a photo."""


class Album:
    """Photos by their place, and items by their first photo."""

    def __init__(self, tables: Tables, places: Iterable[Place], items: Iterable[str]):
        by_item = sorted(set(items))
        first = _first_positions(tables, by_item)
        self._main = {item: (item, first.get(item, 0)) for item in by_item}
        wanted = sorted({*places, *self._main.values()})
        ids = sorted({item for item, _ in wanted})
        self._titles = _titles(tables, ids)
        self._captions = _captions(tables, by_item)
        self._thumbs = _thumbs(tables, wanted, ids)

    def photo(
        self, place: Place, caption: str | None = None, attributes: Mapping[str, str] | None = None
    ) -> ShownPhoto:
        """The photo at a place, or what is wrong with it; caption and attributes as given."""
        item, title = place[0], self._titles.get(place[0])
        src, problem = self._thumbs.get(place, (None, "no photo"))
        return ShownPhoto(item, title, src, problem, caption, attributes or {})

    def main(self, item: str) -> ShownPhoto:
        """The first photo of an item, with the item's caption."""
        return self.photo(self._main[item], self._captions.get(item))


def _first_positions(tables: Tables, items: list[str]) -> Mapping[str, int]:
    if not items:
        return {}
    rows = (
        tables.read(schemas.PHOTOS)
        .where(F.col("item_id").isin(items))
        .groupBy("item_id")
        .agg(F.min("position"))
    )
    return {row[0]: row[1] for row in rows.collect()}


def _titles(tables: Tables, items: list[str]) -> Mapping[str, str]:
    if not items:
        return {}
    title = F.substring("title", 1, _TITLE_LENGTH).alias("title")
    rows = tables.read(schemas.ITEMS).where(F.col("item_id").isin(items)).select("item_id", title)
    return {row["item_id"]: row["title"] for row in rows.collect()}


def _captions(tables: Tables, items: list[str]) -> Mapping[str, str]:
    """Of each item, the caption of its first photo that has one."""
    if not items:
        return {}
    links = tables.read(schemas.ITEM_CAPTIONS).where(F.col("item_id").isin(items))
    texts = tables.read(schemas.CAPTIONS).where(F.col("caption").isNotNull())
    caption = F.substring("caption", 1, CAPTION_LENGTH).alias("caption")
    rows = links.join(texts.select("caption_key", caption), on="caption_key", how="inner").collect()
    return {
        row["item_id"]: row["caption"]
        for row in sorted(rows, key=lambda row: row["position"], reverse=True)
    }


def _thumbs(
    tables: Tables, places: list[Place], items: list[str]
) -> Mapping[Place, tuple[str | None, str]]:
    """A `data:` URI, or None and the problem, of each place that has a photo."""
    if not places:
        return {}
    # By item_id too, by which whole files can be skipped.
    key = F.concat_ws("/", "item_id", "position")
    wanted = F.col("item_id").isin(items) & key.isin(
        [f"{item}/{position}" for item, position in places]
    )
    rows = tables.read(schemas.PHOTOS).where(wanted).select("item_id", "position", "image")
    made = rows.mapInPandas(
        _thumbnails, "item_id STRING, position INT, thumb BINARY, problem STRING"
    ).collect()
    return {(row["item_id"], row["position"]): (_uri(row["thumb"]), row["problem"]) for row in made}


def _uri(thumb: bytearray | None) -> str | None:
    return "data:image/jpeg;base64," + base64.b64encode(thumb).decode() if thumb else None


def _thumbnails(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        made = [_thumbnail(image) for image in batch["image"]]
        yield batch[["item_id", "position"]].assign(
            thumb=[thumb for thumb, _ in made], problem=[problem for _, problem in made]
        )


def _thumbnail(image: bytes | None) -> tuple[bytes | None, str]:
    if image is None:
        return None, "not stored"
    try:
        return pictures.thumbnail(bytes(image)), ""
    except PhotoError as bad:
        return None, bad.error_class.replace("_", " ")
