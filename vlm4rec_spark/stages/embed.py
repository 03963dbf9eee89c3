"""Item texts and main photos to unit vectors. Knows which text makes up each representation."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd
from PIL.Image import Image
from pydantic import Field
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.encoding.text_encoder import (
    MARKUP,
    SCRIPT,
    Embedder,
    clean,
    load_embedder,
)
from vlm4rec_spark.models.encoding.vision_encoder import Vision, load_vision
from vlm4rec_spark.models.photos import photo_reader
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.download import HttpSettings, concurrently
from vlm4rec_spark.settings_base import Settings

REPRESENTATIONS = ("title", "caption", "title_caption")
IMAGE = "image"
"""The representation that is made of the photo itself."""
_PHOTO_SIDE = 512
"""Pixels of the longer side of a decoded photo: more than vision encoders read."""
_PHOTOS_PER_BATCH = 64

Batches = Iterator[pd.DataFrame]


class EmbedSettings(Settings):
    """The encoders of texts and photos."""

    encoder: str = Field("minilm", min_length=1)
    revision: str = "main"
    max_words: int = Field(256, ge=1)
    vision: str | None = Field(None, min_length=1)
    vision_revision: str = "main"


def item_texts(items: DataFrame, item_captions: DataFrame, captions: DataFrame) -> DataFrame:
    """item_id, representation, text, fallback: the text of every item in every representation.

    The text is null where the item has none. Captions of an item are joined in the order of its
    photos, without repetitions. An item without a caption falls back to its title, and `fallback`
    is true.
    """
    by_position = F.array_sort(F.collect_list(F.struct("position", "caption")))
    ordered = F.transform(by_position, lambda photo: photo["caption"])
    joined = (
        item_captions.join(captions.select("caption_key", "caption"), on="caption_key", how="inner")
        .groupBy("item_id")
        .agg(F.array_join(F.array_distinct(ordered), " ").alias("caption"))
    )
    texts = items.select("item_id", "title").join(joined, on="item_id", how="left")
    no_caption = F.col("caption").isNull()
    title_caption = F.when(no_caption, F.col("title")).otherwise(
        F.concat_ws(". ", "title", "caption")
    )
    representations = [
        F.struct(
            F.lit(name).alias("representation"),
            text.alias("text"),
            fallback.alias("fallback"),
        )
        for name, text, fallback in (
            ("title", F.col("title"), F.lit(False)),
            ("caption", F.coalesce("caption", "title"), no_caption),
            ("title_caption", title_caption, no_caption),
        )
    ]
    return texts.select("item_id", F.inline(F.array(*representations)))


def marked_texts(
    texts: DataFrame, embeddings: DataFrame, encoder_id: str, max_words: int
) -> DataFrame:
    """`texts` with content_sha256, is_pending and has_vector.

    A text is pending unless it is null or its vector by this encoder, stored with the same
    `fallback`, is there. has_vector: one is stored, of this or an older text.
    """
    content = F.concat_ws("\n", F.lit(str(max_words)), "text")
    has_text = F.col("text").isNotNull()
    hashed = texts.withColumn("content_sha256", F.when(has_text, F.sha2(content, 256)))
    by_encoder = embeddings.where(F.col("encoder_id") == encoder_id)
    return _marked(hashed, by_encoder, ["item_id", "representation"])


def _marked(rows: DataFrame, embedded: DataFrame, key: list[str]) -> DataFrame:
    """`rows`, whose texts or photos have a content_sha256, with is_pending and has_vector."""
    content = F.struct("content_sha256", "fallback")
    old = embedded.select(*key, content.alias("old"))
    is_pending = F.col("content_sha256").isNotNull() & ~F.col("old").eqNullSafe(content)
    marked = rows.join(old, on=key, how="left").withColumn("is_pending", is_pending)
    return marked.withColumn("has_vector", F.col("old").isNotNull()).drop("old")


def pending_figures() -> list[Column]:
    """Counts of rows with is_pending and has_vector; `changed` are pending ones with a vector."""
    return [
        F.count("*").alias("rows"),
        F.count_if("is_pending").alias("pending"),
        F.count_if(F.col("is_pending") & F.col("has_vector")).alias("changed"),
    ]


def text_figures(texts: DataFrame, max_words: int) -> DataFrame:
    """One row about `marked_texts`: `pending_figures`, and scripts, markup and too_long.

    The latter count titles and captions with scripts, other markup or too many words.
    """
    is_own = F.expr("representation IN ('title', 'caption') AND NOT fallback")
    has_script = F.col("text").rlike(SCRIPT)
    has_markup = F.col("text").rlike(MARKUP)
    words = F.size(F.split(F.trim("text"), r"\s+"))
    return texts.agg(
        *pending_figures(),
        F.count_if(is_own & has_script).alias("scripts"),
        F.count_if(is_own & has_markup & ~has_script).alias("markup"),
        F.count_if(is_own & (words > max_words)).alias("too_long"),
    )


def embed(texts: DataFrame, encoder_id: str, settings: EmbedSettings) -> DataFrame:
    """Rows of `embeddings` for pending `marked_texts`, but for texts that are empty once clean."""
    return texts.mapInPandas(
        _text_udf(settings),
        "item_id STRING, representation STRING, content_sha256 STRING, fallback BOOLEAN, "
        "embedding ARRAY<FLOAT>",
    ).select(
        "item_id",
        "representation",
        F.lit(encoder_id).alias("encoder_id"),
        "content_sha256",
        "fallback",
        "embedding",
    )


_embedders: dict[tuple[str, str], Embedder] = {}


def _text_udf(settings: EmbedSettings) -> Callable[[Batches], Batches]:
    def encode(batches: Batches) -> Batches:
        for batch in batches:
            cleaned = batch["text"].map(lambda text: clean(text, settings.max_words))
            batch = batch[cleaned != ""]
            if batch.empty:
                continue
            # Not np.unique, which gives every text the width of the longest: maybe a megabyte.
            codes, distinct = pd.factorize(cleaned[cleaned != ""])
            vectors = _embedder(settings).embed(distinct.tolist())
            rows = batch[["item_id", "representation", "content_sha256", "fallback"]]
            yield rows.assign(embedding=list(vectors[codes]))

    return encode


def _embedder(settings: EmbedSettings) -> Embedder:
    key = (settings.encoder, settings.revision)
    if key not in _embedders:
        _embedders[key] = load_embedder(*key)
    return _embedders[key]


def main_photos(photos: DataFrame) -> DataFrame:
    """item_id, position, content_sha256 (of the photo): the first photo of each item, no bytes."""
    photo = F.struct("position", F.col("image_sha256").alias("content_sha256"))
    first = photos.groupBy("item_id").agg(F.min(photo).alias("first"))
    return first.select("item_id", "first.*")


def marked_photos(photos: DataFrame, embeddings: DataFrame, vision_id: str) -> DataFrame:
    """`main_photos` with is_pending and has_vector, as for `marked_texts`."""
    by_encoder = (F.col("representation") == IMAGE) & (F.col("encoder_id") == vision_id)
    rows = photos.withColumn("fallback", F.lit(False))
    return _marked(rows, embeddings.where(by_encoder), ["item_id"])


def embed_photos(
    photos: DataFrame, vision_id: str, settings: EmbedSettings, http: HttpSettings
) -> DataFrame:
    """Rows of `embeddings` for photos (item_id, content_sha256, uri, image).

    A photo that can't be read or decoded has no row.
    """
    return (
        photos.select("item_id", "content_sha256", "uri", "image")
        .mapInPandas(
            _photo_udf(settings, http),
            "item_id STRING, content_sha256 STRING, embedding ARRAY<FLOAT>",
        )
        .select(
            "item_id",
            F.lit(IMAGE).alias("representation"),
            F.lit(vision_id).alias("encoder_id"),
            "content_sha256",
            F.lit(False).alias("fallback"),
            "embedding",
        )
    )


_visions: dict[tuple[str, str], Vision] = {}


class _Photo(NamedTuple):
    item_id: str
    content_sha256: str
    image: Image


def _photo_udf(settings: EmbedSettings, http: HttpSettings) -> Callable[[Batches], Batches]:
    def read(row: dict) -> _Photo | None:
        try:
            data = row["image"]
            if data is None:
                data = photo_reader.read_unchanged(row["uri"], row["content_sha256"], http)
            return _Photo(row["item_id"], row["content_sha256"], decode(data, _PHOTO_SIDE))
        except Exception:  # any of the photo or its file system; rows without a vector are counted
            return None

    def encode(batches: Batches) -> Batches:
        for batch in batches:
            for start in range(0, len(batch), _PHOTOS_PER_BATCH):
                rows = batch.iloc[start : start + _PHOTOS_PER_BATCH].to_dict("records")
                photos = list(filter(None, concurrently(read, rows, http.concurrency)))
                if not photos:
                    continue
                # They end in any order, and the last digits of a vector depend on its batch.
                photos.sort(key=lambda photo: photo.item_id)
                vectors = _vision(settings).embed([photo.image for photo in photos])
                rows = [(photo.item_id, photo.content_sha256) for photo in photos]
                result = pd.DataFrame(rows, columns=["item_id", "content_sha256"])
                yield result.assign(embedding=list(vectors))

    return encode


def _vision(settings: EmbedSettings) -> Vision:
    assert settings.vision is not None
    key = (settings.vision, settings.vision_revision)
    if key not in _visions:
        _visions[key] = load_vision(*key)
    return _visions[key]
