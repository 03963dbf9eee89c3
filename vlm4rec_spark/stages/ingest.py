"""Raw rows to items, photos and interactions, or to `rejected` with a reason. Knows what a good row is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain

import pandas as pd
from pydantic import BaseModel, ConfigDict
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.photos import download, photo_storage
from vlm4rec_spark.models.photos.download import HttpSettings
from vlm4rec_spark.models.photos.photo_storage import Known
from vlm4rec_spark.sources.reader import PhotoSource, Source, column_named


class IngestSettings(BaseModel):
    """Where catalogue, log and photos are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: Source = Source()
    interactions: Source = Source()
    users: Source = Source()
    identities: Source = Source()
    photos: PhotoSource = PhotoSource()


_ITEM_FIELDS = (
    "item_id",
    "title",
    "brand",
    "category",
    "parent_id",
    "region",
    "currency",
    "url",
    "price",
    "available",
    "first_seen_at",
)
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def parse_items(raw: DataFrame) -> DataFrame:
    """Catalogue rows of `sources.read` with the columns of `items` (but updated_at), and `reason` where one is bad.

    Of several rows for an item, that of the newest file is taken; two different rows in one file can't both be right,
    so one of them gets a reason. Identical rows count once. Ids are taken to the letter: `a`, `A` and `a ` are three.
    """
    text = {name: F.col("fields")[name] for name in _ITEM_FIELDS}
    price = text["price"].try_cast("double")
    available = F.lower(F.trim(text["available"]))
    first_seen_at = _timestamp(text["first_seen_at"])
    reason = _first_of(
        (_corrupt(), "the row isn't well formed"),
        (_blank(text["item_id"]), "item_id is missing"),
        (_given(text["price"]) & price.isNull(), "price is not a number"),
        (F.isnan(price) | (price < 0) | (price == float("inf")), "price is not a price"),
        (
            _given(available) & ~available.isin(*_TRUE, *_FALSE),
            "available is neither true nor false",
        ),
        (_given(text["first_seen_at"]) & first_seen_at.isNull(), "first_seen_at is not a time"),
    )
    extra = F.map_filter(
        "fields", lambda name, value: name.startswith("attributes.") & value.isNotNull()
    )
    rows = raw.select(
        # A binary column that bears the name of one of ours can't be told from it any more.
        *[column_named(name) for name in raw.columns if name.lower() not in _ITEM_FIELDS],
        *[
            text[name].alias(name)
            for name in (
                "item_id",
                "title",
                "brand",
                "category",
                "parent_id",
                "region",
                "currency",
                "url",
            )
        ],
        price.alias("price"),
        F.transform_keys(
            extra, lambda name, _: F.substring(name, len("attributes.") + 1, 1_000)
        ).alias("attributes"),
        (~F.coalesce(available.isin(*_FALSE), F.lit(False))).alias("available"),
        first_seen_at.alias("first_seen_at"),
        reason.alias("reason"),
    )
    return _newest(rows, "item_id")


def parse_users(raw: DataFrame) -> DataFrame:
    """Rows of `sources.read` with the columns of `users`, and `reason` where one is bad; of several as for items."""
    text = {name: F.col("fields")[name] for name in ("user_id", "segment", "region", "consent")}
    consent = F.lower(F.trim(text["consent"]))
    reason = _first_of(
        (_corrupt(), "the row isn't well formed"),
        (_blank(text["user_id"]), "user_id is missing"),
        (_given(consent) & ~consent.isin(*_TRUE, *_FALSE), "consent is neither true nor false"),
    )
    said = F.when(_given(consent), consent.isin(*_TRUE)).alias("consent")
    names = [text[name].alias(name) for name in ("user_id", "segment", "region")]
    gone_at = F.lit(None).cast("timestamp").alias("gone_at")
    return _newest(
        raw.select("source", "modified_at", "row", *names, said, gone_at, reason.alias("reason")),
        "user_id",
    )


def parse_identities(raw: DataFrame) -> DataFrame:
    """Rows of `sources.read` with the columns of `identities`, and `reason` where one is bad; of several as for
    items."""
    anonymous, user = F.col("fields")["anonymous_id"], F.col("fields")["user_id"]
    reason = _first_of(
        (_corrupt(), "the row isn't well formed"),
        (_blank(anonymous), "anonymous_id is missing"),
        (_blank(user), "user_id is missing"),
    )
    since = F.lit(None).cast("timestamp").alias("since")
    names = anonymous.alias("anonymous_id"), user.alias("user_id"), since
    return _newest(
        raw.select("source", "modified_at", "row", *names, reason.alias("reason")), "anonymous_id"
    )


def _newest(rows: DataFrame, key: str) -> DataFrame:
    """Rows with `duplicate`, and a reason for the second of two that contradict each other in one file."""
    good, bad = rows.where(F.col("reason").isNull()), rows.where(F.col("reason").isNotNull())
    newest = Window.partitionBy(key).orderBy(
        F.desc_nulls_last("modified_at"), F.desc("source"), "row"
    )
    ranked = good.select(
        "*",
        F.first("source").over(newest).alias("_source"),
        F.first("row").over(newest).alias("_row"),
        F.row_number().over(newest).alias("_rank"),
    )
    clash = (F.col("source") == F.col("_source")) & (F.col("row") != F.col("_row"))
    judged = ranked.select(
        *rows.drop("reason").columns,
        F.when(clash, f"{key} stands twice in one file, with different values").alias("reason"),
        (F.col("_rank") > 1).alias("duplicate"),
    )
    return judged.unionByName(bad.withColumn("duplicate", F.lit(False)))


def parse_interactions(raw: DataFrame, latest: datetime) -> DataFrame:
    """Log rows of `sources.read` with the columns of `interactions`, and `reason` where one is bad.

    event_time is ISO 8601 or seconds or milliseconds since 1970; an event after `latest` is from the future. One from
    before 1970 is taken, however unlikely, as long as every reader can hold its time.
    """
    text = {
        name: F.col("fields")[name]
        for name in ("event_id", "user_id", "item_id", "event_type", "event_time")
    }
    time = _timestamp(text["event_time"])
    derived = F.sha2(
        F.to_json(F.struct(*[text[n] for n in ("user_id", "item_id", "event_type", "event_time")])),
        256,
    )
    reason = _first_of(
        (_corrupt(), "the row isn't well formed"),
        *[
            (_blank(text[name]), f"{name} is missing")
            for name in ("user_id", "item_id", "event_type", "event_time")
        ],
        (time.isNull(), "event_time is not a time"),
        (time > F.lit(latest), "event_time lies in the future"),
    )
    rows = raw.select(
        F.when(_blank(text["event_id"]), derived).otherwise(text["event_id"]).alias("event_id"),
        text["user_id"].alias("user_id"),
        text["item_id"].alias("item_id"),
        text["event_type"].alias("event_type"),
        time.alias("event_time"),
        time.cast("date").alias("event_date"),
        "source",
        "row",
        reason.alias("reason"),
    )
    # Any of the rows with one event_id will do, as long as it's always the same.
    first = Window.partitionBy("event_id", F.col("reason").isNull()).orderBy(
        "event_time", "row", "source"
    )
    return rows.withColumn("duplicate", F.col("reason").isNull() & (F.row_number().over(first) > 1))


def taken(parsed: DataFrame) -> DataFrame:
    """The good rows, each key once."""
    return parsed.where(F.col("reason").isNull() & ~F.col("duplicate"))


def rejected(parsed: DataFrame, kind: str) -> DataFrame:
    """The bad rows in the shape of the table `rejected`; identical ones together."""
    return (
        parsed.where(F.col("reason").isNotNull())
        .select(
            F.concat(F.lit(f"{kind} "), F.coalesce("source", F.lit(""))).alias("source"),
            "row",
            "reason",
        )
        .groupBy("source", "row")
        .agg(F.min("reason").alias("reason"), F.count(F.lit(1)).alias("occurrences"))
    )


def photo_rows(files: DataFrame, items: DataFrame) -> DataFrame:
    """Photo files (item_id, position, uri, …) with `reason` where a file can't be an item's photo."""
    known = files.join(
        items.select("item_id", F.lit(True).alias("known")), on="item_id", how="left"
    )
    place = Window.partitionBy("item_id", "position").orderBy("uri")
    reason = _first_of(
        (F.col("item_id").isNull(), "the file name doesn't fit ingest.photos.file_name"),
        (
            F.col("position").isNull() | (F.col("position") < 0),
            "the position in the file name is not a number",
        ),
        (F.col("known").isNull(), "no such item in the catalogue"),
        (F.row_number().over(place) > 1, "the item has another photo at this position"),
    )
    return known.select("item_id", "position", "uri", reason.alias("reason"))


def changed_photos(
    rows: DataFrame, files: DataFrame | None, photos: DataFrame, keep: bool
) -> DataFrame:
    """The photos to look at, with what `photos` knows of each: known_bytes, known_at, known_sha256. None is opened.

    With a listing (`files`: uri, bytes, modified_at) a photo that `photos` holds unchanged is left out; without one,
    the executor that would read it asks first whether it has changed. Where photos are to be kept, one that wasn't is
    unknown.
    """
    if keep:
        # By what files say of their nulls: a look at all that isn't null would read every photo.
        bare = photos.where(F.col("image").isNull()).select("item_id", "position")
        photos = photos.join(bare, on=["item_id", "position"], how="left_anti")
    known = photos.select(
        "item_id",
        "position",
        "uri",
        F.col("bytes").alias("known_bytes"),
        F.col("modified_at").alias("known_at"),
        F.col("image_sha256").alias("known_sha256"),
    )
    rows = rows.join(known, on=["item_id", "position", "uri"], how="left")
    if files is None:
        return rows.withColumn("modified_at", F.lit(None).cast("timestamp"))
    same = (F.col("bytes") == F.col("known_bytes")) & F.col("modified_at").eqNullSafe(
        F.col("known_at")
    )
    listed = rows.join(files.select("uri", "bytes", "modified_at"), on="uri", how="inner")
    return listed.where(~F.coalesce(same, F.lit(False)))


def read_photos(rows: DataFrame, count: int, slots: int, settings: PhotoSource) -> DataFrame:
    """Read what `changed_photos` says on executors: the columns of `photos`, and `reason` for an unreadable one.

    A photo that isn't to be kept has no `image`.

    `count`: how many rows there are. Each task reads neighbours by item_id, so that the files of `photos` hold them.
    """
    tasks = max(min(slots, count), -(-count // _PHOTOS_PER_FILE), 1)
    # Milliseconds, because pandas has no time before 1678 or after 2261, and a file may claim one.
    times = [F.unix_millis(name).alias(name) for name in ("modified_at", "known_at")]
    named = rows.select("item_id", "position", "uri", "known_bytes", "known_sha256", *times)
    return (
        named.repartitionByRange(tasks, "item_id", "position")
        .mapInPandas(
            _photo_reader(settings.http, settings.keep),
            "item_id STRING, position INT, uri STRING, image BINARY, image_sha256 STRING, bytes BIGINT, "
            "modified_at BIGINT, reason STRING",
        )
        .withColumn("modified_at", F.timestamp_millis("modified_at"))
        .withColumn("version", F.lit(None).cast("string"))
    )


def photos_named(raw: DataFrame, column: str) -> DataFrame:
    """item_id, position and uri of the photos that a catalogue column names."""
    uri = F.col("fields")[column]
    rows = raw.select(
        F.col("fields")["item_id"].alias("item_id"), F.lit(0).alias("position"), uri.alias("uri")
    )
    return rows.where(F.coalesce("uri", F.lit("")) != "").distinct()


def photos_in_rows(raw: DataFrame, column: str) -> DataFrame:
    """Photos that came as bytes in a catalogue column, in the shape of `read_photos`."""
    image = column_named(column)
    return raw.select(
        F.col("fields")["item_id"].alias("item_id"),
        F.lit(0).alias("position"),
        F.lit(None).cast("string").alias("uri"),
        image.alias("image"),
        F.sha2(image, 256).alias("image_sha256"),
        F.length(image).cast("bigint").alias("bytes"),
        F.col("modified_at"),
        F.lit(None).cast("string").alias("version"),
        F.lit(None).cast("string").alias("reason"),
    ).where(image.isNotNull())


Batches = Iterator[pd.DataFrame]


def _photo_reader(http: HttpSettings, keep: bool) -> Callable[[Batches], Batches]:
    def read(batches: Batches) -> Batches:
        for batch in batches:
            rows = batch.to_dict("records")
            files = (row for row in rows if not download.is_url(row["uri"]))
            urls = (row for row in rows if download.is_url(row["uri"]))
            downloaded = download.concurrently(
                lambda row: _read_photo(row, http, keep), urls, http.concurrency
            )
            yield from _in_parts(chain((_read_photo(row, http, keep) for row in files), downloaded))

    return read


def _in_parts(photos: Iterator[dict | None]) -> Batches:
    """A few photos at a time leave the worker: an Arrow batch of 10,000 photos would be gigabytes."""
    part: list[dict] = []
    size = 0
    for photo in photos:
        if photo is not None:
            part.append(photo)
            size += len(photo["image"] or b"")
        if len(part) == 32 or size > _PART_BYTES:
            yield pd.DataFrame(part, columns=_PHOTO_COLUMNS)
            part, size = [], 0
    yield pd.DataFrame(part, columns=_PHOTO_COLUMNS)


_PHOTOS_PER_FILE = 500
"""100 MB of photos of 200 kB."""
_PART_BYTES = 64_000_000
_PHOTO_COLUMNS = [
    "item_id",
    "position",
    "uri",
    "image",
    "image_sha256",
    "bytes",
    "modified_at",
    "reason",
]


def _read_photo(row: dict, http: HttpSettings, keep: bool) -> dict | None:
    """The photo of a row, or None when it is the one that is known."""
    photo = dict.fromkeys(_PHOTO_COLUMNS) | {
        name: row[name] for name in ("item_id", "position", "uri")
    }
    size, known_at, sha256, listed_at = (
        None if pd.isna(row[name]) else row[name]
        for name in ("known_bytes", "known_at", "known_sha256", "modified_at")
    )
    try:
        found = photo_storage.read(
            row["uri"], http, Known(size, known_at and int(known_at), sha256), listed_at
        )
    except Exception as unreadable:
        return photo | {"reason": f"the photo can't be read: {unreadable}"}
    if found is None:
        return None
    image, modified_at = found
    sha256 = hashlib.sha256(image).hexdigest()
    photo |= {"image_sha256": sha256, "bytes": len(image), "modified_at": modified_at}
    return photo | ({"image": image} if keep else {})


def _corrupt() -> Column:
    return F.coalesce(F.get_json_object("row", "$._corrupt_record").isNotNull(), F.lit(False))


def _given(text: Column) -> Column:
    return text.isNotNull() & (F.trim(text) != "")


def _blank(text: Column) -> Column:
    return text.isNull() | (text == "")


def _timestamp(text: Column) -> Column:
    """Null for what is no time, and for a time that Python can't hold in every time zone: its years are 1 to 9999."""
    digits = text.rlike(r"^\d{10}$"), text.rlike(r"^\d{13}$")
    time = (
        F.when(digits[0], F.timestamp_seconds(text.try_cast("bigint")))
        .when(digits[1], F.timestamp_millis(text.try_cast("bigint")))
        # With its year, or Spark takes 10:00 for ten o'clock on the day of the run.
        .when(text.rlike(r"^\s*\d{4}"), text.try_cast("timestamp"))
    )
    # As text, because a Python time goes through a calendar that was another one in the year 1.
    first, last = (F.lit(end).cast("timestamp") for end in ("0001-01-03", "9999-12-30"))
    return F.when(time.between(first, last), time)


def _first_of(*cases: tuple[Column, str]) -> Column:
    return F.coalesce(
        *[F.when(F.coalesce(condition, F.lit(False)), F.lit(reason)) for condition, reason in cases]
    )
