"""Caption and embed: photos to descriptions, descriptions to vectors."""

from __future__ import annotations

import json
import time

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark import schemas
from vlm4rec_spark.caption import plan, worker
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.prompts import load_prompt
from vlm4rec_spark.pipeline.intake import caption_rows
from vlm4rec_spark.pipeline.run import Outcome, Run, one
from vlm4rec_spark.stages import embed as stage


def caption(run: Run, outcome: Outcome) -> None:
    settings = run.config.caption
    prompt, model_id = load_prompt(settings.prompt), settings.model.model_id()
    photos, captions = run.read(schemas.PHOTOS), run.tables.read(schemas.CAPTIONS)
    imported = plan.imported_captions(run.tables.read(schemas.ITEM_CAPTIONS), captions)
    wanted = plan.wanted_captions(photos, imported, prompt, model_id, settings)
    pending = plan.photos_to_caption(wanted, photos, captions)
    total, distinct = one(wanted.agg(F.count(F.lit(1)), F.countDistinct("caption_key")))
    todo = pending.count()
    shown = {"model": model_id, "prompt_id": prompt.prompt_id, "photos_wanted": str(total),
             "reused": str(distinct - todo), "duplicates": str(total - distinct)}  # fmt: skip
    outcome.skipped = total - todo
    failures: dict[str, int] = {}
    if todo:
        run.voice.say(f"captioning {todo:,} photos with {model_id}, reusing {distinct - todo:,}")
        began = time.monotonic()
        made = worker.caption_photos(pending, settings, prompt.text, -(-todo // settings.photos_per_task))
        with run.voice.watch("captioning photos", todo):
            rows = run.tables.staged(schemas.CAPTIONS, made)
        seconds = time.monotonic() - began
        named = rows.withColumns({"prompt_id": F.lit(prompt.prompt_id), "model": F.lit(model_id)})
        run.tables.insert(schemas.CAPTIONS, caption_rows(run, named))
        by_status = {row["status"]: row["count"] for row in rows.groupBy("status").count().collect()}
        outcome.ok = by_status.get("ok", 0)
        outcome.failed = todo - outcome.ok
        bad = rows.where(F.col("status") != "ok").groupBy("error_class").count()
        failures = {row["error_class"]: row["count"] for row in bad.collect()}
        outcome.device_seconds = one(rows.agg(F.sum("seconds")))[0]
        shown |= {name: str(by_status.get(name, 0)) for name in ("ok", "failed", "rejected")}
        shown["photos_per_second"] = f"{todo / seconds:.1f}"
        run.tables.unstage(schemas.CAPTIONS)
    outcome.details = shown | {"failures": json.dumps(failures)}
    now = plan.item_captions(wanted, run.tables.read(schemas.CAPTIONS), imported)
    run.tables.sync(schemas.ITEM_CAPTIONS, now)
    if outcome.failed > settings.max_failed_share * todo:
        raise RunError(f"caption: {outcome.failed} of {todo} photos failed ({failures}), more than "
                       f"caption.max_failed_share = {settings.max_failed_share}. Their errors are in the table "
                       "captions.")  # fmt: skip


def beside_captions(run: Run) -> object:
    settings = run.config.caption
    return [settings.model_dump(mode="json"), load_prompt(settings.prompt).text, settings.model.model_id()]


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
