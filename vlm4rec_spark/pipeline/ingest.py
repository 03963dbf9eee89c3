"""Ingest: a company's files into items, users, interactions and photos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row, grouped
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.file_listing import escape_glob, list_files
from vlm4rec_spark.sources.photo_files import photo_files
from vlm4rec_spark.stages import ingest as stage
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.schemas import Table


class _UserTable(NamedTuple):
    table: Table
    parse: Callable[[DataFrame], DataFrame]


_USER_TABLES = {
    "users": _UserTable(schemas.USERS, stage.parse_users),
    "identities": _UserTable(schemas.IDENTITIES, stage.parse_identities),
}


@dataclass(frozen=True)
class RawSources:
    """The configured sources as raw rows. None: not configured, or no new file."""

    items: DataFrame | None
    events: DataFrame | None
    log_files: DataFrame | None
    """New files of the log: a listing with settings_sha256. None for a log in a Delta table."""
    users: dict[str, DataFrame]
    """By the name in _USER_TABLES."""


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of a source. `skipped`: repeated, or unchanged."""

    ok: int
    rejected: int
    skipped: int

    def less(self, repeated: int) -> RowCounts:
        """With some of the good rows counted as skipped."""
        return RowCounts(self.ok - repeated, self.rejected, self.skipped + repeated)

    def figures(self) -> dict[str, int]:
        return {"in": self.ok + self.rejected + self.skipped, **asdict(self)}


def open_sources(context: RunContext) -> RawSources:
    """Open every configured source. Raises UsageError if one or one of its columns is missing."""
    settings = context.config.ingest
    if not settings.items.path and not settings.interactions.path:
        raise UsageError("ingest: neither ingest.items.path nor ingest.interactions.path is set.")
    if settings.photos.folder:
        photo_files(context.spark, settings.photos)
    items = _open_items(context)
    users = _open_user_tables(context)
    log = settings.interactions
    if log.path and log.format != "delta":
        files = _new_log_files(context)
        rows = files.select("uri").collect()
        paths = tuple(escape_glob(row["uri"]) for row in rows)
        log = log.model_copy(update={"path": paths})
    else:
        files = None
    events = reader.read(context.spark, "ingest.interactions", log) if log.path else None
    return RawSources(items, events, files, users)


def _open_items(context: RunContext) -> DataFrame | None:
    settings = context.config.ingest
    if not settings.items.path:
        return None
    items = reader.read(context.spark, "ingest.items", settings.items)
    column = settings.photos.bytes_column
    if column and column not in items.columns:
        raise UsageError(
            f"ingest.photos.bytes_column: the catalogue has no binary column {column!r}."
        )
    column = settings.photos.path_column
    if column and not _has_values(items, column):
        raise UsageError(
            f"ingest.photos.path_column: the catalogue has no column {column!r} with a path in it."
        )
    return items


def _open_user_tables(context: RunContext) -> dict[str, DataFrame]:
    raw: dict[str, DataFrame] = {}
    for name, target in _USER_TABLES.items():
        source = getattr(context.config.ingest, name)
        if not source.path:
            continue
        raw[name] = reader.read(context.spark, f"ingest.{name}", source)
        (key,) = target.table.key
        if not _has_values(raw[name], key):
            raise UsageError(
                f"ingest.{name}: the source has no column {key} with a value. Name it in "
                f"ingest.{name}.columns."
            )
    return raw


def _has_values(raw: DataFrame, field: str) -> bool:
    return not raw.where(F.col("fields")[field].isNotNull()).isEmpty()


def _new_log_files(context: RunContext) -> DataFrame:
    """The files of the log that weren't read yet with these settings."""
    log = context.config.ingest.interactions
    files = list_files(context.spark, "ingest.interactions.path", log.path).withColumn(
        "settings_sha256", F.sha2(F.lit(log.model_dump_json()), 256)
    )
    ledger = context.tables.read(schemas.INGESTED_FILES).where("source = 'interactions'")
    read = ledger.selectExpr(
        "file AS uri",
        "size AS bytes",
        "modified_at",
        "settings_sha256",
    )
    return files.join(read, on=read.columns, how="left_anti")


def inputs_fingerprint(context: RunContext) -> object:
    """The settings and the listings of the sources.

    None if a listing can't show whether anything has changed.
    """
    settings = context.config.ingest
    sources = {
        f"ingest.{name}": getattr(settings, name)
        for name in ("items", "interactions", *_USER_TABLES)
    }
    formats = {source.format for source in sources.values()}
    if settings.photos.path_column or "delta" in formats:
        return None
    listings = [
        list_files(context.spark, f"{key}.path", source.path)
        for key, source in sources.items()
        if source.path
    ]
    if settings.photos.folder:
        listings.append(photo_files(context.spark, settings.photos))
    file_hash = F.xxhash64("uri", "bytes", "modified_at").cast("decimal(38)")
    digest = F.sum(file_hash).cast("string")
    listed = [list(first_row(files.agg(digest, F.count("*")))) for files in listings]
    return [settings.model_dump(mode="json"), *listed]


def ingest(context: RunContext, result: StageResult) -> None:
    raw = open_sources(context)
    parsed: dict[str, DataFrame] = {}
    if raw.items is not None:
        parsed["items"] = stage.parse_items(raw.items)
    if raw.events is not None:
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        parsed["interactions"] = stage.parse_interactions(raw.events, tomorrow)
    # Parsed rows are used several times. With photos in them, a catalogue would fill the disk.
    has_bytes = bool(context.config.ingest.photos.bytes_column)
    with _persisted(rows for name, rows in parsed.items() if name != "items" or not has_bytes):
        counts = _write(context, parsed, raw)
    result.ok = sum(count.ok for count in counts.values())
    result.failed = sum(count.rejected for count in counts.values())
    result.skipped = sum(count.skipped for count in counts.values())
    result.details = _catalogue_gaps(context)
    for name, count in counts.items():
        result.details |= grouped(name, count.figures())


@contextmanager
def _persisted(frames: Iterable[DataFrame]) -> Iterator[None]:
    persisted = [rows.persist() for rows in frames]
    try:
        yield
    finally:
        for rows in persisted:
            rows.unpersist()


def _write(
    context: RunContext, parsed: dict[str, DataFrame], raw: RawSources
) -> dict[str, RowCounts]:
    """Write the accepted and the rejected rows of every source, and count them."""
    items = parsed.get("items")
    events = parsed.get("interactions")
    counts = {name: _counts(rows) for name, rows in parsed.items()}
    _refuse_nonsense(context, items, events, counts)
    accepted = None
    if items is not None:
        accepted = stage.accepted(items)
        updated = accepted.withColumn("updated_at", F.current_timestamp())
        context.tables.upsert(schemas.ITEMS, updated)
        context.reject(stage.rejected(items, "items"))
    repeated = None
    if events is not None:
        repeated = _write_events(context, events, counts["interactions"].ok)
        counts["interactions"] = counts["interactions"].less(repeated.count)
    photos = _find_photos(context, accepted)
    if photos is not None:
        counts["photos"] = _write_photos(context, photos)
    for name, rows in raw.users.items():
        counts[name] = _write_users(context, _USER_TABLES[name], rows)
    if events is not None and repeated is not None and raw.log_files is not None:
        # Last: if the run is killed before, the next one reads the files again and adds no event
        # twice.
        _write_ledger(context, raw.log_files, stage.counts_by_file(events, repeated.events))
    return counts


@dataclass(frozen=True)
class _Repeated:
    """Accepted events that were in the table before."""

    count: int
    events: DataFrame


def _write_events(context: RunContext, events: DataFrame, count: int) -> _Repeated:
    """Add the new ones of the `count` accepted events."""
    accepted = stage.accepted(events)
    table = schemas.INTERACTIONS
    version = context.tables.versions([table]).get(table.name)
    added = context.tables.insert(table, accepted)
    context.reject(stage.rejected(events, "interactions"))
    if added == count:
        # The usual case. The table isn't read a second time.
        return _Repeated(0, accepted.limit(0))
    before = context.tables.read(table, version).select("event_id")
    return _Repeated(count - added, accepted.join(before, on="event_id", how="left_semi"))


def _write_users(context: RunContext, target: _UserTable, raw: DataFrame) -> RowCounts:
    """Rows that are no longer delivered stay."""
    parsed = target.parse(raw)
    with _persisted([parsed]):
        context.tables.upsert(target.table, stage.accepted(parsed))
        context.reject(stage.rejected(parsed, target.table.name))
        return _counts(parsed)


def _write_ledger(context: RunContext, files: DataFrame, counts: DataFrame) -> None:
    """Record the files as read; `counts` are the columns rows_… by file_path."""
    columns = ["rows_read", "rows_taken", "rows_rejected", "rows_repeated"]
    # A file without any row has no counts.
    counted = files.join(counts, on="file_path", how="left").fillna(0, columns)
    rows = counted.selectExpr(
        "'interactions' AS source",
        "uri AS file",
        "bytes AS size",
        "modified_at",
        "settings_sha256",
        *columns,
        f"'{context.run_id}' AS run_id",
    )
    context.tables.insert(schemas.INGESTED_FILES, rows)


def _refuse_nonsense(
    context: RunContext,
    items: DataFrame | None,
    events: DataFrame | None,
    counts: dict[str, RowCounts],
) -> None:
    """Raise RunError for a catalogue without a good row, or a log of other items.

    Nothing has been written by then.
    """
    if items is not None and not counts["items"].ok:
        raise RunError(
            "ingest.items: the catalogue has no usable row "
            f"({counts['items'].rejected} rejected). Nothing was written."
        )
    if events is None or not counts["interactions"].ok:
        return
    item_ids = context.tables.read(schemas.ITEMS).select("item_id")
    if items is not None:
        item_ids = item_ids.union(stage.accepted(items).select("item_id"))
    accepted = stage.accepted(events)
    if accepted.join(item_ids, on="item_id", how="left_semi").isEmpty():
        raise RunError(
            "ingest.interactions: no event is about an item of the catalogue. Check that both use "
            "the same item_id, and ingest.interactions.columns. Nothing was written."
        )


class _FoundPhotos(NamedTuple):
    total: int
    """Photos that the source names."""
    to_write: DataFrame
    """New or changed photos with their bytes, or with the `reason` why they can't be read."""
    refused: DataFrame
    """item_id, position, uri, reason of files that can't be an item's photo."""


def _find_photos(context: RunContext, accepted_items: DataFrame | None) -> _FoundPhotos | None:
    """None if photos aren't configured, or if they are in a catalogue that isn't."""
    settings = context.config.ingest.photos
    items = context.tables.read(schemas.ITEMS)
    files = None
    if settings.folder:
        files = photo_files(context.spark, settings)
        rows = stage.photo_rows(files, items)
    elif settings.path_column and accepted_items is not None:
        named = stage.photos_from_column(accepted_items, settings.path_column)
        rows = stage.photo_rows(named, items)
    elif settings.bytes_column and accepted_items is not None:
        photos = stage.photos_from_bytes(accepted_items, settings.bytes_column)
        return _FoundPhotos(photos.count(), photos, photos.limit(0))
    else:
        return None
    good = rows.where("reason IS NULL")
    stored = context.tables.read(schemas.PHOTOS)
    changed = stage.changed_photos(good, files, stored, settings.keep)
    slots = context.spark.sparkContext.defaultParallelism
    to_write = stage.read_photos(changed, changed.count(), slots, settings)
    refused = rows.where("reason IS NOT NULL")
    return _FoundPhotos(rows.count(), to_write, refused)


def _write_photos(context: RunContext, photos: _FoundPhotos) -> RowCounts:
    with context.reporter.progress("reading photos", photos.total):
        read = context.tables.staged(schemas.PHOTOS, photos.to_write)
    good = read.where("reason IS NULL")
    context.tables.upsert(schemas.PHOTOS, good)
    columns = ("item_id", "position", "uri", "reason")
    unreadable = read.where("reason IS NOT NULL").select(*columns)
    bad = photos.refused.select(*columns).unionByName(unreadable)
    context.reject(
        bad.selectExpr(
            "'photos' AS source",
            "to_json(struct(item_id, position, uri)) AS row",
            "reason",
            "1L AS occurrences",
        )
    )
    ok = good.count()
    rejected = bad.count()
    context.tables.unstage(schemas.PHOTOS)
    return RowCounts(ok, rejected, photos.total - ok - rejected)


def _catalogue_gaps(context: RunContext) -> dict[str, str]:
    items = context.tables.read(schemas.ITEMS)
    events = context.tables.read(schemas.INTERACTIONS)
    photos = context.tables.read(schemas.PHOTOS)
    gaps = {
        "unknown_item_events": events.join(items, on="item_id", how="left_anti"),
        "items_without_photo": items.join(photos, on="item_id", how="left_anti"),
        "untouched_items": items.join(events, on="item_id", how="left_anti"),
    }
    return {name: str(rows.count()) for name, rows in gaps.items()}


def _counts(parsed: DataFrame) -> RowCounts:
    counted = parsed.agg(
        F.count_if(F.expr("reason IS NULL AND NOT duplicate")),
        F.count_if(F.expr("reason IS NOT NULL")),
        F.count_if(F.expr("reason IS NULL AND duplicate")),
    )
    return RowCounts(*first_row(counted))
