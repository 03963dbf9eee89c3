"""The few photos that the page shows, fetched together as thumbnails with their item's title and
caption.

Knows the tables that hold photos, titles and captions; not which photos are shown, nor why.
Thumbnails are made on the executors: the driver gets a few kilobytes per photo, however large it
is. The same pass over the photos finds the kinds of a sample.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from pyspark.sql import Row
from pyspark.sql import functions as F

from vlm4rec_spark.models.photos.photo_errors import PhotoError
from vlm4rec_spark.report import pictures
from vlm4rec_spark.report.data import PhotoCard
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.storage.tables import Tables

_CAPTION_LENGTH = 600
_TITLE_LENGTH = 160
_SAMPLED_CONTENTS = 1_000

PhotoKey = tuple[str, int]
"""item_id and position of a photo."""


class _Thumbnail(NamedTuple):
    """A `data:` URI, or None and the problem."""

    src: str | None
    problem: str


@dataclass
class _Item:
    """The positions of an item's photos, and the keys of its captions, by their photos' order."""

    title: str | None = None
    positions: list[int] = field(default_factory=list)
    caption_keys: list[str] = field(default_factory=list)


class Thumbnails:
    """Photos by their key, items by their first photo, and captions by their key.

    `kinds` are the kinds of photos in a sample, commonest first, with their number of photos.
    """

    def __init__(
        self,
        tables: Tables,
        captioned: list[Row],
        keys: Iterable[PhotoKey],
        item_ids: Iterable[str],
        photos: int,
    ):
        """`captioned`: photos with a caption_key; `photos` is the number of photos in all."""
        shown_items = set(item_ids)
        shown_keys = {*keys, *map(_key, captioned)}
        self._items = _items(tables, shown_items.union(item_id for item_id, _ in shown_keys))
        links = [key for item in self._items.values() for key in item.caption_keys]
        self._captions = _captions(tables, {*links, *(photo["caption_key"] for photo in captioned)})
        shown_keys.update(map(self._first_photo, shown_items))
        rows = _photos(tables, shown_keys, photos)
        self._thumbnails = {
            _key(row): _Thumbnail(row["src"], row["problem"]) for row in rows if row["is_shown"]
        }
        kinds = Counter(row["kind"] for row in rows if row["kind"])
        by_count = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
        self.kinds = dict(by_count)

    def photo(
        self,
        key: PhotoKey,
        caption: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> PhotoCard:
        """The photo of a key, or what is wrong with it, with this caption and these attributes."""
        item_id, _ = key
        thumbnail = self._thumbnails.get(key, _Thumbnail(None, "no photo"))
        title = self._items[item_id].title
        return PhotoCard(item_id, title, *thumbnail, caption, attributes or {})

    def captioned(self, photo: Row) -> PhotoCard:
        """A photo (caption_key, item_id, position) with its caption, if it has one."""
        caption = self._captions[photo["caption_key"]]
        return self.photo(_key(photo), caption["caption"], caption["attributes"])

    def error(self, caption_key: str) -> str:
        """Why there is no caption."""
        return self._captions[caption_key]["error"] or ""

    def item(self, item_id: str) -> PhotoCard:
        """The first photo of an item, with the caption of the first photo that has one."""
        keys = self._items[item_id].caption_keys
        captions = (self._captions[key]["caption"] for key in keys)
        return self.photo(self._first_photo(item_id), next(filter(None, captions), None))

    def _first_photo(self, item_id: str) -> PhotoKey:
        return item_id, next(iter(self._items[item_id].positions), 0)


def _key(row: Row) -> PhotoKey:
    return row["item_id"], row["position"]


def _items(tables: Tables, item_ids: Set[str]) -> Mapping[str, _Item]:
    items = {item_id: _Item() for item_id in item_ids}
    if not items:
        return items
    title = F.substring("title", 1, _TITLE_LENGTH).alias("title")
    parts = (
        tables.read(schemas.ITEMS).select("item_id", title),
        tables.read(schemas.PHOTOS).select("item_id", "position"),
        tables.read(schemas.ITEM_CAPTIONS),
    )
    is_shown = F.col("item_id").isin(sorted(items))
    titles, photos, links = (part.where(is_shown) for part in parts)
    rows = titles.unionByName(photos, True).unionByName(links, True).collect()
    for row in sorted(rows, key=lambda row: row["position"] or 0):
        item = items[row["item_id"]]
        if row["position"] is None:
            item.title = row["title"]
        elif row["caption_key"] is None:
            item.positions.append(row["position"])
        else:
            item.caption_keys.append(row["caption_key"])
    return items


def _captions(tables: Tables, keys: Set[str]) -> Mapping[str, Row]:
    """caption, attributes and error by caption_key."""
    if not keys:
        return {}
    rows = tables.read(schemas.CAPTIONS).where(F.col("caption_key").isin(sorted(keys)))
    texts = [F.substring(name, 1, _CAPTION_LENGTH).alias(name) for name in ("caption", "error")]
    return {
        row["caption_key"]: row
        for row in rows.select("caption_key", "attributes", *texts).collect()
    }


def _photos(tables: Tables, keys: Set[PhotoKey], photos: int) -> list[Row]:
    """item_id, position, is_shown, src, problem of the keys that have a photo; kind of a sample."""
    if not keys and not photos:
        return []
    key = F.concat_ws("/", "item_id", "position")
    names = [f"{item_id}/{position}" for item_id, position in sorted(keys)]
    is_sampled = F.col("image").isNotNull()
    if photos > _SAMPLED_CONTENTS:
        # SHA-256 is uniform, so a range of it is a random sample that is the same each time.
        end = int(2**32 * _SAMPLED_CONTENTS / photos)
        is_sampled &= F.col("image_sha256") < f"{end:08x}"
    rows = tables.read(schemas.PHOTOS).select(
        "item_id",
        "position",
        "image",
        key.isin(names).alias("is_shown"),
        is_sampled.alias("is_sampled"),
    )
    schema = (
        "item_id STRING, position INT, is_shown BOOLEAN, src STRING, problem STRING, kind STRING"
    )
    return rows.where("is_shown OR is_sampled").mapInPandas(_look_at, schema).collect()


def _look_at(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    for batch in batches:
        thumbnails = [
            _make_thumbnail(image) if is_shown else _Thumbnail(None, "")
            for image, is_shown in zip(batch["image"], batch["is_shown"], strict=True)
        ]
        yield batch[["item_id", "position", "is_shown"]].assign(
            src=[thumbnail.src for thumbnail in thumbnails],
            problem=[thumbnail.problem for thumbnail in thumbnails],
            kind=[
                pictures.kind(bytes(image)) if is_sampled else None
                for image, is_sampled in zip(batch["image"], batch["is_sampled"], strict=True)
            ],
        )


def _make_thumbnail(image: bytes | None) -> _Thumbnail:
    if image is None:
        return _Thumbnail(None, "not stored")
    try:
        jpeg = pictures.thumbnail(bytes(image))
    except PhotoError as error:
        return _Thumbnail(None, error.error_class.replace("_", " "))
    return _Thumbnail("data:image/jpeg;base64," + base64.b64encode(jpeg).decode(), "")
