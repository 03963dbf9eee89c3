"""Embed: titles and descriptions to vectors."""

from __future__ import annotations

import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark import schemas
from vlm4rec_spark.pipeline.run import Outcome, Run
from vlm4rec_spark.stages import embed as stage


def embed(run: Run, outcome: Outcome) -> None:
    settings, encoder = run.config.embed, run.encoder_id()
    texts = item_texts(run)
    there = run.tables.read(schemas.EMBEDDINGS)
    pending = stage.pending_texts(texts, there, encoder, settings.max_words)
    total, todo = texts.count(), pending.count()
    if todo:
        run.voice.say(f"embedding {todo:,} texts with {encoder}")
        cut = pending.repartition(max(2, -(-todo // 2_000)))
        with run.voice.watch("embedding texts", todo):
            rows = run.tables.staged(schemas.EMBEDDINGS, stage.embed(cut, encoder, settings))
        outcome.ok = rows.count()
        run.tables.upsert(schemas.EMBEDDINGS, rows)
        run.tables.unstage(schemas.EMBEDDINGS)
    outcome.failed = todo - outcome.ok
    outcome.skipped = total - todo
    mine = run.tables.read(schemas.EMBEDDINGS).where(F.col("encoder_id") == encoder)
    figures = mine.groupBy("representation").agg(
        F.count(F.lit(1)).alias("rows"),
        F.countDistinct(F.xxhash64("embedding")).alias("distinct"),
        F.count_if("fallback").alias("fallback"),
    ).collect()  # fmt: skip
    identical = {row["representation"]: row["rows"] - row["distinct"] for row in figures}
    fallback = next((row["fallback"] for row in figures if row["representation"] == "caption"), 0)
    outcome.details = {"encoder_id": encoder, "identical_vectors": json.dumps(identical), "fallback": str(fallback)}


def beside_embeddings(run: Run) -> object:
    return [run.config.embed.model_dump(mode="json"), run.encoder_id()]


def item_texts(run: Run) -> DataFrame:
    """Every item's text in every representation, from the tables as they are."""
    return stage.item_texts(
        run.read(schemas.ITEMS), run.tables.read(schemas.ITEM_CAPTIONS), run.tables.read(schemas.CAPTIONS)
    )
