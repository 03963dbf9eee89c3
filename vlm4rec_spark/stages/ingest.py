"""Raw rows to rows of items, users, photos and interactions, or to a reason for rejection.

Reads photos inside tasks; opens no table and no file on the driver.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import reduce
from itertools import chain

import pandas as pd
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.photos import download, photo_reader
from vlm4rec_spark.models.photos.download import HttpSettings
from vlm4rec_spark.models.photos.photo_reader import PhotoVersion
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.sources.photo_files import PhotoSource
from vlm4rec_spark.sources.reader import Source, column_named


class IngestSettings(Settings):
    """Where catalogue, log, users and photos are."""

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
    "price",
    "currency",
    "url",
    "available",
    "first_seen_at",
)
_EVENT_FIELDS = ("user_id", "item_id", "event_type", "event_time")
_ROW = ("source", "modified_at", "row")
_ATTRIBUTE_PREFIX = "attributes."
_TRUE = ("true", "t", "yes", "y", "1")
_FALSE = ("false", "f", "no", "n", "0")


def parse_items(raw: DataFrame) -> DataFrame:
    """Rows of `reader.read` with the columns of `items` and `reason`, `duplicate`; no updated_at.

    `reason` is null for a good row. Of several rows for an item, that of the newest file counts.
    Identical rows count once. Two different rows in one file can't both be right, so one of them
    gets a reason. Ids are taken to the letter: `a`, `A` and `a ` are three.
    """
    text = _fields(*_ITEM_FIELDS)
    price = text["price"].try_cast("double")
    available = _boolean(text["available"])
    first_seen_at = _timestamp(text["first_seen_at"])
    reason = _first_reason(
        (_malformed(), "the row isn't well formed"),
        (_is_empty(text["item_id"]), "item_id is missing"),
        (_is_given(text["price"]) & price.isNull(), "price is not a number"),
        (F.isnan(price) | (price < 0) | (price == float("inf")), "price is not a price"),
        (
            _is_given(text["available"]) & available.isNull(),
            "available is neither true nor false",
        ),
        (
            _is_given(text["first_seen_at"]) & first_seen_at.isNull(),
            "first_seen_at is not a time",
        ),
    )
    columns = text | {
        "price": price,
        "attributes": _attributes(),
        "available": F.coalesce(available, F.lit(True)),
        "first_seen_at": first_seen_at,
    }
    # With the binary columns, one of which may hold photos. If it has the name of a field, it
    # couldn't be told from it.
    own = [name for name in raw.columns if name.lower() not in _ITEM_FIELDS]
    return _with_duplicates(_select(raw, own, columns, reason), "item_id")


def parse_users(raw: DataFrame) -> DataFrame:
    """Rows of `reader.read` with the columns of `users`, and `reason`, `duplicate` as for items."""
    text = _fields("user_id", "segment", "region", "consent")
    consent = _boolean(text["consent"])
    reason = _first_reason(
        (_malformed(), "the row isn't well formed"),
        (_is_empty(text["user_id"]), "user_id is missing"),
        (_is_given(text["consent"]) & consent.isNull(), "consent is neither true nor false"),
    )
    columns = text | {"consent": consent, "gone_at": _no_time()}
    return _with_duplicates(_select(raw, _ROW, columns, reason), "user_id")


def parse_identities(raw: DataFrame) -> DataFrame:
    """Rows of `reader.read` with the columns of `identities` and `reason`, `duplicate`."""
    text = _fields("anonymous_id", "user_id")
    reason = _first_reason(
        (_malformed(), "the row isn't well formed"),
        *[(_is_empty(column), f"{name} is missing") for name, column in text.items()],
    )
    rows = _select(raw, _ROW, text | {"since": _no_time()}, reason)
    return _with_duplicates(rows, "anonymous_id")


def parse_interactions(raw: DataFrame, latest: datetime) -> DataFrame:
    """Rows of `reader.read` with the columns of `interactions`, and `reason`, `duplicate`.

    event_time is ISO 8601, or seconds or milliseconds since 1970. An event after `latest` lies in
    the future. One before 1970 is taken, as long as every reader can hold its time.
    """
    text = _fields(*_EVENT_FIELDS)
    given_id = F.col("fields")["event_id"]
    derived_id = F.sha2(F.to_json(F.struct(*text.values())), 256)
    time = _timestamp(text["event_time"])
    reason = _first_reason(
        (_malformed(), "the row isn't well formed"),
        *[(_is_empty(column), f"{name} is missing") for name, column in text.items()],
        (time.isNull(), "event_time is not a time"),
        (time > F.lit(latest), "event_time lies in the future"),
    )
    columns = text | {
        "event_id": F.when(_is_empty(given_id), derived_id).otherwise(given_id),
        "event_time": time,
        "event_date": time.cast("date"),
    }
    rows = _select(raw, ("source", "row"), columns, reason)
    # Any row with the event_id will do, as long as it is always the same.
    is_good = F.col("reason").isNull()
    order = Window.partitionBy("event_id", is_good).orderBy("event_time", "row", "source")
    return rows.withColumn("duplicate", is_good & (F.row_number().over(order) > 1))


def _fields(*names: str) -> dict[str, Column]:
    return {name: F.col("fields")[name] for name in names}


def _select(
    raw: DataFrame, own: Sequence[str], columns: dict[str, Column], reason: Column
) -> DataFrame:
    """`own` are columns of the raw rows that are kept."""
    return raw.select(
        *[column_named(name) for name in own],
        *[column.alias(name) for name, column in columns.items()],
        reason.alias("reason"),
    )


def _with_duplicates(rows: DataFrame, key: str) -> DataFrame:
    """`rows` with `duplicate`, and with a reason if a row contradicts another of the same file.

    The row of the newest file is no duplicate.
    """
    newest_first = Window.partitionBy(key).orderBy(
        F.desc_nulls_last("modified_at"), F.desc("source"), "row"
    )
    ranked = rows.where("reason IS NULL").select(
        "*",
        F.first("source").over(newest_first).alias("_source"),
        F.first("row").over(newest_first).alias("_row"),
        F.row_number().over(newest_first).alias("_rank"),
    )
    contradicts = F.expr("source = _source AND row != _row")
    reason = F.when(contradicts, f"{key} stands twice in one file, with different values")
    good = ranked.select(
        *rows.drop("reason").columns,
        reason.alias("reason"),
        F.expr("_rank > 1").alias("duplicate"),
    )
    bad = rows.where("reason IS NOT NULL").withColumn("duplicate", F.lit(False))
    return good.unionByName(bad)


def accepted(parsed: DataFrame) -> DataFrame:
    """The good rows, one for each key."""
    return parsed.where("reason IS NULL AND NOT duplicate")


def rejected(parsed: DataFrame, kind: str) -> DataFrame:
    """The bad rows as rows of the table `rejected`; identical ones are counted together."""
    source = F.concat(F.lit(f"{kind} "), F.coalesce("source", F.lit("")))
    return (
        parsed.where("reason IS NOT NULL")
        .groupBy(source.alias("source"), "row")
        .agg(F.min("reason").alias("reason"), F.count("*").alias("occurrences"))
    )


def counts_by_file(parsed: Mapping[str, DataFrame]) -> DataFrame:
    """name, source, ok, rejected, skipped of parsed rows by name. All need one shuffle."""
    rows = [
        frame.select(F.lit(name).alias("name"), "source", "reason", "duplicate")
        for name, frame in parsed.items()
    ]
    by_file = reduce(DataFrame.unionByName, rows).groupBy("name", "source")
    return by_file.agg(
        F.count_if(F.expr("reason IS NULL AND NOT duplicate")).alias("ok"),
        F.count_if(F.expr("reason IS NOT NULL")).alias("rejected"),
        F.count_if(F.expr("reason IS NULL AND duplicate")).alias("skipped"),
    )


def catalogue_gaps(items: DataFrame, events: DataFrame, photos: DataFrame) -> DataFrame:
    """One row: unknown_item_events, items_without_photo, untouched_items."""
    rows = {"items": items, "events": events, "photos": photos}
    ids = [frame.select("item_id", F.lit(name).alias("name")) for name, frame in rows.items()]
    counts = [F.count_if(F.col("name") == name).alias(name) for name in rows]
    by_item = reduce(DataFrame.unionByName, ids).groupBy("item_id").agg(*counts)
    return by_item.agg(
        F.expr("coalesce(sum(IF(items = 0, events, 0)), 0)").alias("unknown_item_events"),
        F.count_if(F.expr("items > 0 AND photos = 0")).alias("items_without_photo"),
        F.count_if(F.expr("items > 0 AND events = 0")).alias("untouched_items"),
    )


def photo_rows(files: DataFrame, items: DataFrame) -> DataFrame:
    """`files` (item_id, position, uri) with `reason`, why a file can't be an item's photo.

    It is null if the file can. Other columns of a listing stay.
    """
    in_catalogue = items.select("item_id", F.lit(True).alias("in_catalogue"))
    same_position = Window.partitionBy("item_id", "position").orderBy("uri")
    reason = _first_reason(
        (F.expr("item_id IS NULL"), "the file name doesn't fit ingest.photos.file_name"),
        (
            F.expr("position IS NULL OR position < 0"),
            "the position in the file name is not a number",
        ),
        (F.expr("in_catalogue IS NULL"), "no such item in the catalogue"),
        (F.row_number().over(same_position) > 1, "the item has another photo at this position"),
    )
    rows = files.join(in_catalogue, on="item_id", how="left").withColumn("reason", reason)
    return rows.drop("in_catalogue")


def with_stored(rows: DataFrame, photos: DataFrame, keep: bool) -> DataFrame:
    """Adds the stored_bytes, stored_at and stored_sha256 of the table `photos`, and `unchanged`.

    With a listing's bytes and modified_at, photos that are stored like that are unchanged. Without
    them, the task that would read a photo checks first whether it has changed. With `keep`, a photo
    stored without its bytes counts as not stored. No photo is opened.
    """
    if keep:
        # Parquet's statistics of nulls answer this. A filter on not null would read every photo.
        without_bytes = photos.where("image IS NULL").select("item_id", "position")
        photos = photos.join(without_bytes, on=["item_id", "position"], how="left_anti")
    stored = photos.selectExpr(
        "item_id",
        "position",
        "uri",
        "bytes AS stored_bytes",
        "modified_at AS stored_at",
        "image_sha256 AS stored_sha256",
    )
    is_listed = "bytes" in rows.columns
    unchanged = F.expr("bytes <=> stored_bytes AND modified_at <=> stored_at")
    rows = rows.join(stored, on=["item_id", "position", "uri"], how="left")
    if not is_listed:
        rows = rows.withColumn("modified_at", _no_time())
    return rows.withColumn("unchanged", unchanged if is_listed else F.lit(False))


def read_photos(rows: DataFrame, count: int, slots: int, settings: PhotoSource) -> DataFrame:
    """Reads the photos of `rows`: the `count` rows of `with_stored` that may have changed.

    Columns: those of `photos`, and `reason` if a photo can't be read. `image` is null unless
    settings.keep. A photo that hasn't changed has no row. Uses a task per slot, or more. A task
    reads consecutive item_ids, so that one file of `photos` holds them.
    """
    tasks = max(min(slots, count), -(-count // _PHOTOS_PER_FILE), 1)
    to_read = rows.selectExpr(
        "item_id",
        "position",
        "uri",
        "stored_bytes",
        "stored_sha256",
        # pandas holds no time before 1678 or after 2261, and a file may have one.
        "unix_millis(modified_at) AS modified_at",
        "unix_millis(stored_at) AS stored_at",
    )
    return (
        to_read.repartitionByRange(tasks, "item_id", "position")
        .mapInPandas(
            _photo_reader(settings.http, settings.keep),
            "item_id STRING, position INT, uri STRING, image BINARY, image_sha256 STRING, "
            "bytes BIGINT, modified_at BIGINT, reason STRING",
        )
        .withColumn("modified_at", F.timestamp_millis("modified_at"))
        .withColumn("version", F.lit(None).cast("string"))
    )


def photos_from_column(items: DataFrame, column: str) -> DataFrame:
    """item_id, position, uri: the photos whose addresses stand in a catalogue column."""
    rows = items.select(
        "item_id",
        F.lit(0).alias("position"),
        F.col("fields")[column].alias("uri"),
    )
    return rows.where("uri != ''").distinct()


def photos_from_bytes(items: DataFrame, column: str) -> DataFrame:
    """Photos whose bytes stand in a catalogue column, in the shape of `read_photos`."""
    image = column_named(column)
    return items.where(image.isNotNull()).select(
        "item_id",
        F.lit(0).alias("position"),
        F.lit(None).cast("string").alias("uri"),
        image.alias("image"),
        F.sha2(image, 256).alias("image_sha256"),
        F.length(image).cast("bigint").alias("bytes"),
        "modified_at",
        F.lit(None).cast("string").alias("version"),
        F.lit(None).cast("string").alias("reason"),
    )


def rejected_photos(rows: DataFrame) -> DataFrame:
    """Photos with a reason (item_id, position, uri, reason) as rows of the table `rejected`."""
    return rows.where("reason IS NOT NULL").selectExpr(
        "'photos' AS source",
        "to_json(struct(item_id, position, uri)) AS row",
        "reason",
        "1L AS occurrences",
    )


Batches = Iterator[pd.DataFrame]
_PHOTOS_PER_FILE = 500
"""100 MB of photos of 200 kB."""
_PHOTOS_PER_BATCH = 32
_BYTES_PER_BATCH = 64_000_000
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


def _photo_reader(http: HttpSettings, keep: bool) -> Callable[[Batches], Batches]:
    def read_row(row: dict) -> dict | None:
        return _read_photo(row, http, keep)

    def read(batches: Batches) -> Batches:
        for batch in batches:
            rows = batch.to_dict("records")
            files = (row for row in rows if not download.is_url(row["uri"]))
            urls = (row for row in rows if download.is_url(row["uri"]))
            downloaded = download.concurrently(read_row, urls, http.concurrency)
            yield from _small_batches(chain(map(read_row, files), downloaded))

    return read


def _small_batches(photos: Iterator[dict | None]) -> Batches:
    """A few photos per batch: an Arrow batch of 10,000 photos would be gigabytes."""
    batch: list[dict] = []
    size = 0
    for photo in photos:
        if photo is not None:
            batch.append(photo)
            size += len(photo["image"] or b"")
        if len(batch) == _PHOTOS_PER_BATCH or size > _BYTES_PER_BATCH:
            yield pd.DataFrame(batch, columns=_PHOTO_COLUMNS)
            batch = []
            size = 0
    yield pd.DataFrame(batch, columns=_PHOTO_COLUMNS)


def _read_photo(row: dict, http: HttpSettings, keep: bool) -> dict | None:
    """The photo of a row, with a reason if it can't be read; None if it hasn't changed."""
    photo: dict = dict.fromkeys(_PHOTO_COLUMNS)
    photo |= {name: row[name] for name in ("item_id", "position", "uri")}
    stored = PhotoVersion(
        _integer(row["stored_bytes"]),
        _integer(row["stored_at"]),
        row["stored_sha256"],
    )
    changed_at = _integer(row["modified_at"])
    try:
        file = photo_reader.read_if_changed(row["uri"], http, stored, changed_at)
    except Exception as error:
        return photo | {"reason": f"the photo can't be read: {error}"}
    if file is None:
        return None
    return photo | {
        "image": file.image if keep else None,
        "image_sha256": hashlib.sha256(file.image).hexdigest(),
        "bytes": len(file.image),
        "modified_at": file.modified_at,
    }


def _integer(value: float | None) -> int | None:
    """pandas turns a column of integers and nulls into floats and NaN."""
    return None if value is None or pd.isna(value) else int(value)


def _malformed() -> Column:
    return F.get_json_object("row", "$._corrupt_record").isNotNull()


def _is_given(text: Column) -> Column:
    return text.isNotNull() & (F.trim(text) != "")


def _is_empty(text: Column) -> Column:
    return text.isNull() | (text == "")


def _boolean(text: Column) -> Column:
    """Null for what is neither true nor false."""
    word = F.lower(F.trim(text))
    return F.when(word.isin(*_TRUE), True).when(word.isin(*_FALSE), False)


def _timestamp(text: Column) -> Column:
    """Null for what is no time, and for a time that Python can't hold in every time zone.

    Python's years are 1 to 9999.
    """
    time = (
        F.when(text.rlike(r"^\d{10}$"), F.timestamp_seconds(text.try_cast("bigint")))
        .when(text.rlike(r"^\d{13}$"), F.timestamp_millis(text.try_cast("bigint")))
        # With a year, or Spark takes 10:00 for ten o'clock on the day of the run.
        .when(text.rlike(r"^\s*\d{4}"), text.try_cast("timestamp"))
    )
    # As text, since Python's times follow another calendar in the year 1.
    first = F.lit("0001-01-03").cast("timestamp")
    last = F.lit("9999-12-30").cast("timestamp")
    return F.when(time.between(first, last), time)


def _no_time() -> Column:
    return F.lit(None).cast("timestamp")


def _attributes() -> Column:
    """The fields whose names begin with `attributes.`, without the prefix and without nulls."""
    values = F.map_filter(
        "fields", lambda name, value: name.startswith(_ATTRIBUTE_PREFIX) & value.isNotNull()
    )
    start = len(_ATTRIBUTE_PREFIX) + 1
    return F.transform_keys(values, lambda name, _: F.substring(name, start, 1_000))


def _first_reason(*cases: tuple[Column, str]) -> Column:
    """The reason of the first condition that holds; null if none does."""
    return F.coalesce(*[F.when(condition, reason) for condition, reason in cases])
