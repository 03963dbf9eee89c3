"""Embed: titles, descriptions and photos to vectors."""

from __future__ import annotations

import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row
from vlm4rec_spark.stages import embed as stage
from vlm4rec_spark.storage import schemas


def embed(run: RunContext, outcome: StageResult) -> None:
    settings, encoder = run.config.embed, run.encoder_id()
    texts = item_texts(run)
    there = run.tables.read(schemas.EMBEDDINGS)
    pending = stage.pending_texts(texts, there, encoder, settings.max_words)
    total, todo = texts.count(), pending.count()
    if todo:
        run.reporter.info(f"embedding {todo:,} texts with {encoder}")
        cut = pending.repartition(max(2, -(-todo // 2_000)))
        with run.reporter.progress("embedding texts", todo):
            rows = run.tables.staged(schemas.EMBEDDINGS, stage.embed(cut, encoder, settings))
        outcome.ok = rows.count()
        run.tables.upsert(schemas.EMBEDDINGS, rows)
        run.tables.unstage(schemas.EMBEDDINGS)
    outcome.failed = todo - outcome.ok
    outcome.skipped = total - todo
    unseen = _embed_photos(run, outcome)
    mine = run.tables.read(schemas.EMBEDDINGS).where(
        F.col("encoder_id").isin(encoder, run.vision_id() or encoder)
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
    outcome.details = {
        "encoder_id": encoder,
        "identical_vectors": json.dumps(identical),
        "fallback": str(fallback),
        "untidy": json.dumps(untidy),
    }
    if vision := run.vision_id():
        outcome.details |= {"vision_id": vision, "photos_unseen": str(unseen)}


def _embed_photos(run: RunContext, outcome: StageResult) -> int:
    """How many of the main photos couldn't be read."""
    vision, http = run.vision_id(), run.config.ingest.photos.http
    if vision is None:
        return 0
    photos = run.read(schemas.PHOTOS)
    main = stage.main_photos(photos)
    pending = stage.pending_photos(main, run.tables.read(schemas.EMBEDDINGS), vision).persist()
    total, todo, made = main.count(), pending.count(), 0
    if todo:
        run.reporter.info(f"embedding {todo:,} photos with {vision}")
        there = photos.join(
            pending.drop("content_sha256"), on=["item_id", "position"], how="left_semi"
        )
        cut = there.withColumnRenamed("image_sha256", "content_sha256").repartition(
            max(2, -(-todo // 1_000))
        )
        with run.reporter.progress("embedding photos", todo):
            rows = run.tables.staged(
                schemas.EMBEDDINGS, stage.embed_photos(cut, vision, run.config.embed, http)
            )
        made = rows.count()
        run.tables.upsert(schemas.EMBEDDINGS, rows)
        run.tables.unstage(schemas.EMBEDDINGS)
    pending.unpersist()
    outcome.ok += made
    outcome.failed += todo - made
    outcome.skipped += total - todo
    return todo - made


def embed_fingerprint(run: RunContext) -> object:
    return [run.config.embed.model_dump(mode="json"), run.encoder_id(), run.vision_id()]


def item_texts(run: RunContext) -> DataFrame:
    """Every item's text in every representation, from the tables as they are."""
    return stage.item_texts(
        run.read(schemas.ITEMS),
        run.tables.read(schemas.ITEM_CAPTIONS),
        run.tables.read(schemas.CAPTIONS),
    )
