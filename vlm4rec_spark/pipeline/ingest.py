"""Ingest and import-captions: the company's files into items, interactions, photos and captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.caption import plan
from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.sources import reader
from vlm4rec_spark.stages import ingest as stage
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.schemas import Table


@dataclass(frozen=True)
class Raw:
    """The sources as they are: rows of catalogue and log, None where there is nothing (new), the new log files, and
    what is said of users, by its table's name."""

    items: DataFrame | None
    events: DataFrame | None
    log_files: DataFrame
    people: dict[str, DataFrame]


_PEOPLE: dict[str, tuple[Table, Callable[[DataFrame], DataFrame]]] = {
    "users": (schemas.USERS, stage.parse_users),
    "identities": (schemas.IDENTITIES, stage.parse_identities),
}


def raw_sources(context: RunContext) -> Raw:
    """Open every configured source. Raises UsageError when one isn't there or lacks a mapped column."""
    settings, no_files = (
        context.config.ingest,
        context.spark.createDataFrame([], schemas.INGESTED_FILES.schema),
    )
    if not settings.items.path and not settings.interactions.path:
        raise UsageError("ingest: neither ingest.items.path nor ingest.interactions.path is set.")
    if settings.photos.folder:
        reader.photo_files(context.spark, settings.photos)
    items = (
        reader.read(context.spark, "ingest.items", settings.items) if settings.items.path else None
    )
    column = settings.photos.bytes_column
    if column and items is not None and column not in items.columns:
        raise UsageError(
            f"ingest.photos.bytes_column: the catalogue has no binary column {column!r}."
        )
    column = settings.photos.path_column
    if column and items is not None and items.where(F.col("fields")[column].isNotNull()).isEmpty():
        raise UsageError(
            f"ingest.photos.path_column: the catalogue has no column {column!r} with a path in it."
        )
    log = settings.interactions
    people = {
        name: reader.read(context.spark, f"ingest.{name}", source)
        for name in _PEOPLE
        if (source := getattr(settings, name)).path
    }
    for name, rows in people.items():
        (key,) = _PEOPLE[name][0].key
        if rows.where(F.col("fields")[key].isNotNull()).isEmpty():
            raise UsageError(
                f"ingest.{name}: the source has no column {key} with a value. Name it in "
                f"ingest.{name}.columns."
            )
    if not log.path:
        return Raw(items, None, no_files, people)
    if log.format == "delta":
        return Raw(items, reader.read(context.spark, "ingest.interactions", log), no_files, people)
    files = reader.listing(context.spark, "ingest.interactions", log).select(
        F.lit("interactions").alias("source"),
        F.col("uri").alias("file"),
        F.col("bytes").alias("size"),
        "modified_at",
        F.sha2(F.lit(log.model_dump_json()), 256).alias("settings_sha256"),
        *(
            F.lit(None).cast("bigint").alias(name)
            for name in ("rows_read", "rows_taken", "rows_rejected", "rows_repeated")
        ),
        F.lit(context.run_id).alias("run_id"),
    )
    new = context.tables.pending(files, schemas.INGESTED_FILES)
    paths = tuple(reader.literal(row["file"]) for row in new.select("file").collect())
    if not paths:
        return Raw(items, None, new, people)
    events = reader.read(
        context.spark, "ingest.interactions", log.model_copy(update={"path": paths})
    )
    return Raw(items, events, new, people)


def inputs_fingerprint(context: RunContext) -> object:
    """The settings and what the sources' listings say; None where a listing can't tell whether anything changed."""
    settings = context.config.ingest
    logs = {
        f"ingest.{name}": getattr(settings, name) for name in ("items", "interactions", *_PEOPLE)
    }
    if settings.photos.path_column or any(source.format == "delta" for source in logs.values()):
        return None
    listed = [
        reader.listing(context.spark, key, source) for key, source in logs.items() if source.path
    ]
    if settings.photos.folder:
        listed.append(reader.photo_files(context.spark, settings.photos))
    marks = [
        F.sum(F.xxhash64("uri", "bytes", "modified_at").cast("decimal(38)")).cast("string"),
        F.count(F.lit(1)),
    ]
    return [
        settings.model_dump(mode="json"),
        *(list(first_row(files.agg(*marks))) for files in listed),
    ]


def ingest(context: RunContext, result: StageResult) -> None:
    raw = raw_sources(context)
    items = None if raw.items is None else stage.parse_items(raw.items)
    latest = datetime.now(UTC) + timedelta(days=1)
    events = None if raw.events is None else stage.parse_interactions(raw.events, latest)
    # Each is used several times and would be parsed each time; photos in the catalogue would fill the disk.
    inline = context.config.ingest.photos.bytes_column
    kept = [rows.persist() for rows in (None if inline else items, events) if rows is not None]
    try:
        counts = _take(context, items, events)
        counts |= {name: _take_people(context, name, rows) for name, rows in raw.people.items()}
    finally:
        for rows in kept:
            rows.unpersist()
    # Last: a run that is killed before it reads its log files again, and their events aren't added twice.
    context.tables.insert(schemas.INGESTED_FILES, raw.log_files)
    result.ok = sum(each["ok"] for each in counts.values())
    result.failed = sum(each["rejected"] for each in counts.values())
    result.skipped = sum(each["skipped"] for each in counts.values())
    result.details = {name: json.dumps(each) for name, each in counts.items()} | _catalogue_gaps(
        context
    )


def _take(
    context: RunContext, items: DataFrame | None, events: DataFrame | None
) -> dict[str, dict[str, int]]:
    """Write what can be taken and what is rejected; rows in, ok, rejected and skipped of each source."""
    counts = {
        name: _counts(rows)
        for name, rows in (("items", items), ("interactions", events))
        if rows is not None
    }
    _refuse_nonsense(context, items, events, counts)
    if items is not None:
        context.tables.upsert(
            schemas.ITEMS, stage.taken(items).withColumn("updated_at", F.current_timestamp())
        )
        context.reject(stage.rejected(items, "items"))
    if events is not None:
        added = context.tables.insert(schemas.INTERACTIONS, stage.taken(events))
        counts["interactions"]["skipped"] += counts["interactions"]["ok"] - added
        counts["interactions"]["ok"] = added
        context.reject(stage.rejected(events, "interactions"))
    photos = _photos(context, None if items is None else stage.taken(items))
    if photos is not None:
        counts["photos"] = _store_photos(context, *photos)
    return counts


def _take_people(context: RunContext, name: str, raw: DataFrame) -> dict[str, int]:
    """Of users or identities as in `_take`; rows that are no longer delivered stay."""
    table, parse = _PEOPLE[name]
    parsed = parse(raw).persist()
    try:
        context.tables.upsert(table, stage.taken(parsed))
        context.reject(stage.rejected(parsed, name))
        return _counts(parsed)
    finally:
        parsed.unpersist()


def _refuse_nonsense(
    context: RunContext,
    items: DataFrame | None,
    events: DataFrame | None,
    counts: dict[str, dict[str, int]],
) -> None:
    """Raise RunError, before anything is written, for a catalogue without a usable row or a log of other items."""
    if items is not None and not counts["items"]["ok"]:
        raise RunError(
            f"ingest.items: the catalogue has no usable row ({counts['items']['rejected']} rejected). "
            "Nothing was written."
        )
    if events is None or not counts["interactions"]["ok"]:
        return
    known = context.tables.read(schemas.ITEMS).select("item_id")
    if items is not None:
        known = known.union(stage.taken(items).select("item_id"))
    if stage.taken(events).join(known, on="item_id", how="left_semi").isEmpty():
        raise RunError(
            "ingest.interactions: no event is about an item of the catalogue. Check that both use the same "
            "item_id, and ingest.interactions.columns. Nothing was written."
        )


def _photos(
    context: RunContext, taken: DataFrame | None
) -> tuple[int, DataFrame, DataFrame] | None:
    """How many photos the source names, the new or changed ones with their bytes, and the refused ones.

    `taken`: the catalogue's rows that were taken, so that of two rows for an item the same one gives the photo.
    """
    settings, items = context.config.ingest.photos, context.tables.read(schemas.ITEMS)
    files = None
    if settings.folder:
        files = reader.photo_files(context.spark, settings)
        rows = stage.photo_rows(files, items)
    elif settings.path_column and taken is not None:
        rows = stage.photo_rows(stage.photos_named(taken, settings.path_column), items)
    elif settings.bytes_column and taken is not None:
        inline = stage.photos_in_rows(taken, settings.bytes_column)
        known = inline.join(items.select("item_id"), on="item_id", how="left_semi")
        return known.count(), known, known.limit(0)
    else:
        return None
    good = rows.where(F.col("reason").isNull())
    changed = stage.changed_photos(good, files, context.tables.read(schemas.PHOTOS), settings.keep)
    slots = context.spark.sparkContext.defaultParallelism
    read = stage.read_photos(changed, changed.count(), slots, settings)
    return rows.count(), read, rows.where(F.col("reason").isNotNull())


def _store_photos(
    context: RunContext, total: int, photos: DataFrame, refused: DataFrame
) -> dict[str, int]:
    with context.reporter.progress("reading photos", total):
        read = context.tables.staged(schemas.PHOTOS, photos)
    good = read.where(F.col("reason").isNull())
    context.tables.upsert(schemas.PHOTOS, good)
    names = ("item_id", "position", "uri", "reason")
    bad = refused.select(*names).unionByName(read.where(F.col("reason").isNotNull()).select(*names))
    context.reject(
        bad.select(
            F.lit("photos").alias("source"),
            F.to_json(F.struct("item_id", "position", "uri")).alias("row"),
            "reason",
            F.lit(1).cast("bigint").alias("occurrences"),
        )
    )
    taken, rejected = good.count(), bad.count()
    context.tables.unstage(schemas.PHOTOS)
    return {"in": total, "ok": taken, "rejected": rejected, "skipped": total - taken - rejected}


def import_captions(raw: DataFrame, context: RunContext, result: StageResult) -> None:
    for needed in ("item_id", "text"):
        if raw.where(F.col("fields")[needed].isNotNull()).isEmpty():
            raise UsageError(
                f"import-captions: the source has no column {needed} with a value. Name it with "
                f"--column {needed}=NAME."
            )
    rows = plan.import_rows(raw, context.read(schemas.ITEMS))
    good, bad = rows.where(F.col("reason").isNull()), rows.where(F.col("reason").isNotNull())
    total, result.failed = good.count(), bad.count()
    if not total:
        reason = first_row(bad)["reason"] if result.failed else "the source is empty"
        result.failed = 0
        raise RunError(
            f"import-captions: no row could be taken, such as: {reason}. Nothing was written."
        )
    new = good.select(
        "caption_key", "caption", F.lit("imported").alias("status"), F.lit(1).alias("attempts")
    )
    result.ok = context.tables.insert(schemas.CAPTIONS, caption_rows(context, new))
    result.skipped = total - result.ok
    mine = good.select("item_id", F.lit(0).alias("position"), "caption_key")
    others = context.tables.read(schemas.ITEM_CAPTIONS).join(
        mine.select("item_id"), on="item_id", how="left_anti"
    )
    context.tables.sync(schemas.ITEM_CAPTIONS, mine.unionByName(others))
    context.reject(
        bad.groupBy(F.concat(F.lit("captions "), "source").alias("source"), "row").agg(
            F.min("reason").alias("reason"), F.count(F.lit(1)).alias("occurrences")
        )
    )
    result.details = {"imported": str(total)}


def caption_rows(context: RunContext, rows: DataFrame) -> DataFrame:
    """Rows of `captions`: what `rows` has of its columns, this run and the time, null for the rest."""
    ours = {"captioned_at": F.current_timestamp(), "run_id": F.lit(context.run_id)}
    return rows.select(
        *[
            ours.get(field.name, F.col(field.name) if field.name in rows.columns else F.lit(None))
            .cast(field.dataType)
            .alias(field.name)
            for field in schemas.CAPTIONS.schema
        ]
    )


def _catalogue_gaps(context: RunContext) -> dict[str, str]:
    items, log = context.tables.read(schemas.ITEMS), context.tables.read(schemas.INTERACTIONS)
    photos = context.tables.read(schemas.PHOTOS)
    return {
        "unknown_item_events": str(log.join(items, on="item_id", how="left_anti").count()),
        "items_without_photo": str(items.join(photos, on="item_id", how="left_anti").count()),
        "untouched_items": str(items.join(log, on="item_id", how="left_anti").count()),
    }


def _counts(parsed: DataFrame) -> dict[str, int]:
    bad = F.col("reason").isNotNull()
    counted = parsed.agg(F.count(F.lit(1)), F.count_if(bad), F.count_if(F.col("duplicate") & ~bad))
    total, rejected, duplicate = first_row(counted)
    return {
        "in": total,
        "ok": total - rejected - duplicate,
        "rejected": rejected,
        "skipped": duplicate,
    }
