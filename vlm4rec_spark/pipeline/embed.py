"""Embed: titles, captions and photos to vectors."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row, grouped
from vlm4rec_spark.stages import embed as stage
from vlm4rec_spark.storage import schemas

_TEXTS_PER_TASK = 2_000
_PHOTOS_PER_TASK = 1_000


def embed(context: RunContext, result: StageResult) -> None:
    texts = item_texts(context)
    all_texts = first_row(stage.text_figures(texts, context.config.embed.max_words)).asDict()
    result.skipped = all_texts.pop("rows")
    _embed_texts(context, result, texts)
    unreadable = _embed_photos(context, result)
    encoder = context.encoder_id()
    vision = context.vision_id()
    result.details = {
        "encoder_id": encoder,
        **_vector_figures(context, [encoder, vision or encoder]),
        **grouped("text_problems", all_texts),
    }
    if vision:
        result.details |= {"vision_id": vision, "photos_unreadable": str(unreadable)}


def inputs_fingerprint(context: RunContext) -> object:
    return [
        context.config.embed.model_dump(mode="json"),
        context.encoder_id(),
        context.vision_id(),
    ]


def item_texts(context: RunContext) -> DataFrame:
    """The text of every item in every representation, from the tables as they are now."""
    return stage.item_texts(
        context.read(schemas.ITEMS),
        context.tables.read(schemas.ITEM_CAPTIONS),
        context.tables.read(schemas.CAPTIONS),
    )


def _embed_texts(context: RunContext, result: StageResult, texts: DataFrame) -> None:
    settings = context.config.embed
    encoder = context.encoder_id()
    embeddings = context.tables.read(schemas.EMBEDDINGS)
    pending = stage.pending_texts(texts, embeddings, encoder, settings.max_words).persist()
    count = pending.count()
    if count:
        context.reporter.info(f"embedding {count:,} texts with {encoder}")
        vectors = stage.embed(_split(pending, count, _TEXTS_PER_TASK), encoder, settings)
        result.ok = _store(context, "embedding texts", count, vectors)
    pending.unpersist()
    result.failed = count - result.ok
    result.skipped -= count


def _embed_photos(context: RunContext, result: StageResult) -> int:
    """Returns how many of the main photos couldn't be read."""
    vision = context.vision_id()
    if vision is None:
        return 0
    photos = context.read(schemas.PHOTOS)
    main = stage.main_photos(photos)
    embeddings = context.tables.read(schemas.EMBEDDINGS)
    pending = stage.pending_photos(main, embeddings, vision).persist()
    count = pending.count()
    stored = 0
    if count:
        context.reporter.info(f"embedding {count:,} photos with {vision}")
        with_bytes = photos.withColumnRenamed("image_sha256", "content_sha256").join(
            pending.select("item_id", "position"), on=["item_id", "position"], how="left_semi"
        )
        vectors = stage.embed_photos(
            _split(with_bytes, count, _PHOTOS_PER_TASK),
            vision,
            context.config.embed,
            context.config.ingest.photos.http,
        )
        stored = _store(context, "embedding photos", count, vectors)
    pending.unpersist()
    result.ok += stored
    result.failed += count - stored
    result.skipped += main.count() - count
    return count - stored


def _split(rows: DataFrame, count: int, rows_per_task: int) -> DataFrame:
    return rows.repartition(max(2, -(-count // rows_per_task)))


def _store(context: RunContext, label: str, count: int, vectors: DataFrame) -> int:
    """Compute the vectors, write them, and return how many there are."""
    with context.reporter.progress(label, count):
        rows = context.tables.staged(schemas.EMBEDDINGS, vectors)
    stored = context.tables.staged_rows(schemas.EMBEDDINGS)
    context.tables.upsert(schemas.EMBEDDINGS, rows)
    context.tables.unstage(schemas.EMBEDDINGS)
    return stored


def _vector_figures(context: RunContext, encoders: list[str]) -> dict[str, str]:
    """Identical vectors of each representation, and captions that fell back to the title."""
    figures = (
        context.tables.read(schemas.EMBEDDINGS)
        .where(F.col("encoder_id").isin(*encoders))
        .groupBy("representation")
        .agg(
            F.count("*").alias("rows"),
            F.countDistinct(F.xxhash64("embedding")).alias("distinct"),
            F.count_if("fallback").alias("fallback"),
        )
        .collect()
    )
    identical = {row["representation"]: row["rows"] - row["distinct"] for row in figures}
    fallback = [row["fallback"] for row in figures if row["representation"] == "caption"]
    return grouped("identical_vectors", identical) | {"fallback": str(sum(fallback))}
