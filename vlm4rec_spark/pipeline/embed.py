"""Embed: titles, captions and photos to vectors."""

from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.pipeline.context import RunContext, StageResult, first_row, grouped
from vlm4rec_spark.stages import embed as stage
from vlm4rec_spark.storage import schemas

_TEXTS_PER_TASK = 2_000
_PHOTOS_PER_TASK = 1_000


def embed(context: RunContext, result: StageResult) -> None:
    encoder = context.encoder_id()
    vision = context.vision_id()
    text_problems = _embed_texts(context, result)
    unreadable = _embed_photos(context, result)
    result.details = {
        "encoder_id": encoder,
        **_vector_figures(context, [encoder, vision or encoder]),
        **grouped("text_problems", text_problems),
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


class _Counts(NamedTuple):
    """How many vectors are missing; `changed` of them have an older one to replace."""

    rows: int
    pending: int
    changed: int


def _embed_texts(context: RunContext, result: StageResult) -> dict[str, int]:
    """Returns how many texts have a problem of each kind."""
    settings = context.config.embed
    encoder = context.encoder_id()
    embeddings = context.tables.read(schemas.EMBEDDINGS)
    texts = stage.marked_texts(item_texts(context), embeddings, encoder, settings.max_words)
    problems = first_row(stage.text_figures(texts, settings.max_words)).asDict()
    counts = _Counts(*(problems.pop(name) for name in _Counts._fields))
    if counts.pending:
        context.reporter.info(f"embedding {counts.pending:,} texts with {encoder}")
        split = _split(texts.where("is_pending"), counts.pending, _TEXTS_PER_TASK)
        vectors = stage.embed(split, encoder, settings)
        _store(context, result, "embedding texts", counts, vectors)
    result.skipped = counts.rows - counts.pending
    return problems


def _embed_photos(context: RunContext, result: StageResult) -> int:
    """Returns how many of the main photos couldn't be read."""
    vision = context.vision_id()
    if vision is None:
        return 0
    photos = context.read(schemas.PHOTOS)
    embeddings = context.tables.read(schemas.EMBEDDINGS)
    main = stage.marked_photos(stage.main_photos(photos), embeddings, vision).persist()
    counts = _Counts(*first_row(main.agg(*stage.pending_figures())))
    unreadable = 0
    if counts.pending:
        context.reporter.info(f"embedding {counts.pending:,} photos with {vision}")
        with_bytes = photos.withColumnRenamed("image_sha256", "content_sha256").join(
            main.where("is_pending").select("item_id", "position"),
            on=["item_id", "position"],
            how="left_semi",
        )
        vectors = stage.embed_photos(
            _split(with_bytes, counts.pending, _PHOTOS_PER_TASK),
            vision,
            context.config.embed,
            context.config.ingest.photos.http,
        )
        unreadable = _store(context, result, "embedding photos", counts, vectors)
    main.unpersist()
    result.skipped += counts.rows - counts.pending
    return unreadable


def _split(rows: DataFrame, count: int, rows_per_task: int) -> DataFrame:
    return rows.repartition(max(2, -(-count // rows_per_task)))


def _store(
    context: RunContext, result: StageResult, label: str, counts: _Counts, vectors: DataFrame
) -> int:
    """Compute the vectors, write them, and return how many failed."""
    tables = context.tables
    with context.reporter.progress(label, counts.pending):
        if not counts.changed:
            stored = tables.append(schemas.EMBEDDINGS, vectors)
        else:
            rows = tables.staged(schemas.EMBEDDINGS, vectors)
            stored = tables.staged_rows(schemas.EMBEDDINGS)
            tables.upsert(schemas.EMBEDDINGS, rows)
            tables.unstage(schemas.EMBEDDINGS)
    missing = counts.pending - stored
    result.ok += stored
    result.failed += missing
    return missing


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
