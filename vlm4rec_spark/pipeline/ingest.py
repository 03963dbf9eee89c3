"""Ingest: a company's files into items, users, interactions and photos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial, reduce
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


class _Source(NamedTuple):
    table: Table
    parse: Callable[[DataFrame], DataFrame]


def _parse_interactions(raw: DataFrame) -> DataFrame:
    return stage.parse_interactions(raw, datetime.now(UTC) + timedelta(days=1))


_SOURCES = {
    "items": _Source(schemas.ITEMS, stage.parse_items),
    "interactions": _Source(schemas.INTERACTIONS, _parse_interactions),
    "users": _Source(schemas.USERS, stage.parse_users),
    "identities": _Source(schemas.IDENTITIES, stage.parse_identities),
}
_USER_TABLES = ("users", "identities")


class LogFile(NamedTuple):
    """`modified_at` is in microseconds since 1970. `path` is in the encoding of `source`."""

    uri: str
    bytes: int
    modified_at: int
    path: str


class RawSources(NamedTuple):
    """The raw rows of each source that is configured, and has a new file if it is the log."""

    rows: dict[str, DataFrame]
    log_files: list[LogFile]
    """New files of the log; none for a log in a Delta table."""


class RowCounts(NamedTuple):
    """What became of the rows of a source. `skipped`: repeated, or unchanged."""

    ok: int = 0
    rejected: int = 0
    skipped: int = 0

    @classmethod
    def sum(cls, counts: Iterable[RowCounts]) -> RowCounts:
        return cls(*map(sum, zip(*counts, strict=True)))

    @property
    def total(self) -> int:
        return sum(self)

    def less(self, repeated: int) -> RowCounts:
        """With some of the good rows counted as skipped."""
        return RowCounts(self.ok - repeated, self.rejected, self.skipped + repeated)

    def figures(self) -> dict[str, int]:
        return {"in": self.total, **self._asdict()}


def open_sources(context: RunContext) -> RawSources:
    """Open every configured source. Raises UsageError if one or one of its columns is missing."""
    settings = context.config.ingest
    if not settings.items.path and not settings.interactions.path:
        raise UsageError("ingest: neither ingest.items.path nor ingest.interactions.path is set.")
    if settings.photos.folder:
        _files(context, "photos")
    sources = {name: getattr(settings, name) for name in _SOURCES}
    log = settings.interactions
    log_files = []
    if log.path and log.format != "delta":
        log_files = _new_log_files(context)
        paths = tuple(escape_glob(file.uri) for file in log_files)
        sources["interactions"] = log.model_copy(update={"path": paths})
    rows = {
        name: reader.read(context.spark, f"ingest.{name}", source)
        for name, source in sources.items()
        if source.path
    }
    _check_fields(context, rows)
    return RawSources(rows, log_files)


def _check_fields(context: RunContext, rows: dict[str, DataFrame]) -> None:
    if "items" in rows:
        photos = context.config.ingest.photos
        column = photos.bytes_column
        if column and column not in rows["items"].columns:
            raise UsageError(
                f"ingest.photos.bytes_column: the catalogue has no binary column {column!r}."
            )
        column = photos.path_column
        if column and rows["items"].where(F.col("fields")[column].isNotNull()).isEmpty():
            raise UsageError(
                f"ingest.photos.path_column: the catalogue has no column {column!r} with a path "
                "in it."
            )
    for name in _USER_TABLES:
        (key,) = _SOURCES[name].table.key
        if name in rows and not reader.has_field(rows[name], key):
            raise UsageError(
                f"ingest.{name}: the source has no column {key} with a value. Name it in "
                f"ingest.{name}.columns."
            )


def _files(context: RunContext, name: str) -> DataFrame:
    """The files of a source, listed once in a run: what comes later is for the next run."""
    if name == "photos":
        make = partial(photo_files, context.spark, context.config.ingest.photos)
    else:
        source = getattr(context.config.ingest, name)
        make = partial(list_files, context.spark, f"ingest.{name}.path", source.path)
    return context.once(f"ingest.{name}", make)


def _new_log_files(context: RunContext) -> list[LogFile]:
    """The files of the log that weren't read yet with these settings."""
    log_files = context.once("ingest.log_files", partial(_log_files, context))
    ledger = context.tables.read(schemas.INGESTED_FILES).where("source = 'interactions'")
    versions = ledger.select("file", "size", F.unix_micros("modified_at"), "settings_sha256")
    read = {tuple(row) for row in versions.collect()}
    settings = _log_settings(context)
    return [file for file in log_files if (*file[:3], settings) not in read]


def _log_files(context: RunContext) -> list[LogFile]:
    # Not as a timestamp: collecting one would turn it into this machine's time zone.
    modified_at = F.unix_micros("modified_at")
    rows = _files(context, "interactions").select("uri", "bytes", modified_at, "file_path")
    return [LogFile(*row) for row in rows.collect()]


def _log_settings(context: RunContext) -> str:
    settings = context.config.ingest.interactions.model_dump_json()
    return hashlib.sha256(settings.encode()).hexdigest()


def inputs_fingerprint(context: RunContext) -> object:
    """The settings and the listings of the sources.

    None if a listing can't show whether anything has changed.
    """
    settings = context.config.ingest
    sources = {name: getattr(settings, name) for name in _SOURCES}
    formats = {source.format for source in sources.values()}
    if settings.photos.path_column or "delta" in formats:
        return None
    listed = [name for name, source in sources.items() if source.path]
    if settings.photos.folder:
        listed.append("photos")
    digests = context.once("ingest.digests", partial(_digests, context, listed))
    return [settings.model_dump(mode="json"), digests]


def _digests(context: RunContext, names: list[str]) -> list[list[object]]:
    """Name, digest and number of files of each listing."""
    file_hash = F.xxhash64("uri", "bytes", "modified_at").cast("decimal(38)").alias("hash")
    hashes = _union(
        _files(context, name).select(F.lit(name).alias("name"), file_hash) for name in names
    )
    digests = hashes.groupBy("name").agg(F.sum("hash").cast("string"), F.count("*"))
    return sorted(map(list, digests.collect()))


def _union(frames: Iterable[DataFrame]) -> DataFrame:
    return reduce(DataFrame.unionByName, frames)


def ingest(context: RunContext, result: StageResult) -> None:
    raw = open_sources(context)
    parsed = {name: _SOURCES[name].parse(rows) for name, rows in raw.rows.items()}
    # Parsed rows are used several times. With photos in them, a catalogue would fill the disk.
    has_bytes = bool(context.config.ingest.photos.bytes_column)
    with _persisted(rows for name, rows in parsed.items() if name != "items" or not has_bytes):
        counts = _write(context, parsed, raw.log_files)
    result.ok, result.failed, result.skipped = RowCounts.sum(counts.values())
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
    context: RunContext, parsed: dict[str, DataFrame], log_files: list[LogFile]
) -> dict[str, RowCounts]:
    """Write the accepted and the rejected rows of every source, and count them."""
    by_file = _counts_by_file(context, parsed)
    counts = {name: RowCounts.sum(by_file[name].values()) for name in parsed}
    accepted = {name: stage.accepted(rows) for name, rows in parsed.items()}
    _refuse_nonsense(context, accepted, counts)
    for name, rows in accepted.items():
        if name != "interactions":
            # Rows that are no longer delivered stay.
            updated = rows.withColumn("updated_at", F.current_timestamp())
            context.tables.upsert(_SOURCES[name].table, updated)
    repeated: dict[str, int] = {}
    if "interactions" in accepted:
        repeated = _write_events(context, accepted["interactions"], counts, bool(log_files))
    rejected = [stage.rejected(parsed[name], name) for name in parsed if counts[name].rejected]
    context.tables.create(schemas.REJECTED)
    if rejected:
        context.reject(_union(rejected))
    photos = _write_photos(context, accepted.get("items"))
    if photos is not None:
        counts["photos"] = photos
    if log_files:
        # Last: if the run is killed before, the next one reads the files again and adds no event
        # twice.
        _write_ledger(context, log_files, by_file["interactions"], repeated)
    return counts


def _counts_by_file(
    context: RunContext, parsed: dict[str, DataFrame]
) -> dict[str, dict[str, RowCounts]]:
    """By name and file."""
    counts: dict[str, dict[str, RowCounts]] = {name: {} for name in parsed}
    if parsed:
        for name, source, *figures in stage.counts_by_file(parsed).collect():
            counts[name][source] = RowCounts(*figures)
    return counts


def _write_events(
    context: RunContext, events: DataFrame, counts: dict[str, RowCounts], by_file: bool
) -> dict[str, int]:
    """Add the new events, and count the others as skipped.

    Returns how many were in the table before: by file if this is wanted and not all are new.
    """
    table = schemas.INTERACTIONS
    version = context.tables.versions([table]).get(table.name)
    repeated = counts["interactions"].ok - context.tables.insert(table, events)
    counts["interactions"] = counts["interactions"].less(repeated)
    if not (repeated and by_file):
        return {}
    before = context.tables.read(table, version).select("event_id")
    in_table = events.join(before, on="event_id", how="left_semi").groupBy("source").count()
    return {row["source"]: row["count"] for row in in_table.collect()}


def _write_ledger(
    context: RunContext,
    log_files: list[LogFile],
    counts: dict[str, RowCounts],
    repeated: dict[str, int],
) -> None:
    """Record the files as read. `repeated`: accepted events of a file that aren't new."""
    rows = []
    for file in log_files:
        # A file without any row has no counts.
        count = counts.get(file.path, RowCounts()).less(repeated.get(file.path, 0))
        version = ("interactions", *file[:3], _log_settings(context))
        rows.append((*version, count.total, *count, context.run_id))
    schema = schemas.INGESTED_FILES.ddl.replace("modified_at TIMESTAMP", "modified_at BIGINT")
    ledger = context.spark.createDataFrame(rows, schema).coalesce(1)
    modified_at = F.timestamp_micros("modified_at")
    context.tables.insert(schemas.INGESTED_FILES, ledger.withColumn("modified_at", modified_at))


def _refuse_nonsense(
    context: RunContext,
    accepted: dict[str, DataFrame],
    counts: dict[str, RowCounts],
) -> None:
    """Raise RunError for a source without a good row, or a log of other items.

    Nothing has been written by then.
    """
    for name in accepted:
        if name != "interactions" and not counts[name].ok:
            raise RunError(
                f"ingest.{name}: the source has no usable row ({counts[name].rejected} rejected). "
                "Nothing was written."
            )
    items = context.tables.read(schemas.ITEMS).select("item_id")
    if "items" in accepted:
        items = items.union(accepted["items"].select("item_id"))
    if "interactions" not in accepted or not counts["interactions"].ok:
        return
    gaps = stage.catalogue_gaps(items, accepted["interactions"], items.limit(0))
    if first_row(gaps)["unknown_item_events"] == counts["interactions"].ok:
        raise RunError(
            "ingest.interactions: no event is about an item of the catalogue. Check that both use "
            "the same item_id, and ingest.interactions.columns. Nothing was written."
        )


def _write_photos(context: RunContext, accepted_items: DataFrame | None) -> RowCounts | None:
    """None if photos aren't configured, or if they are in a catalogue that isn't."""
    settings = context.config.ingest.photos
    if settings.folder:
        return _write_photo_files(context, _files(context, "photos"))
    if accepted_items is None:
        return None
    if settings.path_column:
        files = stage.photos_from_column(accepted_items, settings.path_column)
        return _write_photo_files(context, files)
    if settings.bytes_column:
        photos = stage.photos_from_bytes(accepted_items, settings.bytes_column)
        return _store_photos(context, photos, photos.count())
    return None


def _write_photo_files(context: RunContext, files: DataFrame) -> RowCounts:
    """Read and store the photos among `files` that are new or changed."""
    settings = context.config.ingest.photos
    rows = stage.photo_rows(files, context.tables.read(schemas.ITEMS))
    # As the table is now, or its next version would make what is persisted anew.
    stored = context.tables.frozen(schemas.PHOTOS)
    rows = stage.with_stored(rows, stored, settings.keep)
    is_pending = F.expr("reason IS NULL AND NOT unchanged")
    counts = rows.agg(F.count("*"), F.count("reason"), F.count_if(is_pending))
    slots = context.spark.sparkContext.defaultParallelism
    with _persisted([rows]):
        total, refused, pending = first_row(counts)
        if not (refused or pending) and context.tables.exists(schemas.PHOTOS):
            return RowCounts(skipped=total)
        read = stage.read_photos(rows.where(is_pending), pending, slots, settings)
        bad = rows.where("reason IS NOT NULL").select("item_id", "position", "uri", "reason")
        return _store_photos(context, read.unionByName(bad, allowMissingColumns=True), total)


def _store_photos(context: RunContext, photos: DataFrame, total: int) -> RowCounts:
    """Write those of `total` photos that aren't skipped: `photos`, or the reason for rejection."""
    with context.reporter.progress("reading photos", total):
        read = context.tables.staged(schemas.PHOTOS, photos)
    rows, rejected = first_row(read.agg(F.count("*"), F.count("reason")))
    if rows > rejected or not context.tables.exists(schemas.PHOTOS):
        context.tables.upsert(schemas.PHOTOS, read.where("reason IS NULL"))
    if rejected:
        context.reject(stage.rejected_photos(read))
    context.tables.unstage(schemas.PHOTOS)
    return RowCounts(rows - rejected, rejected, total - rows)


def _catalogue_gaps(context: RunContext) -> dict[str, str]:
    tables = (schemas.ITEMS, schemas.INTERACTIONS, schemas.PHOTOS)
    gaps = stage.catalogue_gaps(*map(context.tables.read, tables))
    return {name: str(count) for name, count in first_row(gaps).asDict().items()}
