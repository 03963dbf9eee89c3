"""Embed: titles, descriptions and photos to vectors."""

from __future__ import annotations

import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.stages import embed as stage
from vlm4rec_spark.storage import schemas


def embed(context: RunContext, result: StageResult) -> None:
    settings, encoder = context.config.embed, context.encoder_id()
    texts = item_texts(context)
    there = context.tables.read(schemas.EMBEDDINGS)
    pending = stage.pending_texts(texts, there, encoder, settings.max_words)
    total, todo = texts.count(), pending.count()
    if todo:
        context.reporter.info(f"embedding {todo:,} texts with {encoder}")
        cut = pending.repartition(max(2, -(-todo // 2_000)))
        with context.reporter.progress("embedding texts", todo):
            rows = context.tables.staged(schemas.EMBEDDINGS, stage.embed(cut, encoder, settings))
        result.ok = rows.count()
        context.tables.upsert(schemas.EMBEDDINGS, rows)
        context.tables.unstage(schemas.EMBEDDINGS)
    result.failed = todo - result.ok
    result.skipped = total - todo
    unseen = _embed_photos(context, result)
    mine = context.tables.read(schemas.EMBEDDINGS).where(
        F.col("encoder_id").isin(encoder, context.vision_id() or encoder)
    )
    figures = (
        mine.groupBy("representation")
        .agg(
            F.count(F.lit(1)).alias("rows"),
            F.countDistinct(F.xxhash64("embedding")).alias("distinct"),
            F.count_if("fallback").alias("fallback"),
        )
        .collect()
    )
    identical = {row["representation"]: row["rows"] - row["distinct"] for row in figures}
    fallback = next((row["fallback"] for row in figures if row["representation"] == "caption"), 0)
    untidy = first_row(stage.untidy(texts, settings.max_words)).asDict()
    result.details = {
        "encoder_id": encoder,
        "identical_vectors": json.dumps(identical),
        "fallback": str(fallback),
        "untidy": json.dumps(untidy),
    }
    if vision := context.vision_id():
        result.details |= {"vision_id": vision, "photos_unseen": str(unseen)}


def _embed_photos(context: RunContext, result: StageResult) -> int:
    """How many of the main photos couldn't be read."""
    vision, http = context.vision_id(), context.config.ingest.photos.http
    if vision is None:
        return 0
    photos = context.read(schemas.PHOTOS)
    main = stage.main_photos(photos)
    pending = stage.pending_photos(main, context.tables.read(schemas.EMBEDDINGS), vision).persist()
    total, todo, made = main.count(), pending.count(), 0
    if todo:
        context.reporter.info(f"embedding {todo:,} photos with {vision}")
        there = photos.join(
            pending.drop("content_sha256"), on=["item_id", "position"], how="left_semi"
        )
        cut = there.withColumnRenamed("image_sha256", "content_sha256").repartition(
            max(2, -(-todo // 1_000))
        )
        with context.reporter.progress("embedding photos", todo):
            rows = context.tables.staged(
                schemas.EMBEDDINGS, stage.embed_photos(cut, vision, context.config.embed, http)
            )
        made = rows.count()
        context.tables.upsert(schemas.EMBEDDINGS, rows)
        context.tables.unstage(schemas.EMBEDDINGS)
    pending.unpersist()
    result.ok += made
    result.failed += todo - made
    result.skipped += total - todo
    return todo - made


def inputs_fingerprint(context: RunContext) -> object:
    return [context.config.embed.model_dump(mode="json"), context.encoder_id(), context.vision_id()]


def item_texts(context: RunContext) -> DataFrame:
    """Every item's text in every representation, from the tables as they are."""
    return stage.item_texts(
        context.read(schemas.ITEMS),
        context.tables.read(schemas.ITEM_CAPTIONS),
        context.tables.read(schemas.CAPTIONS),
    )
