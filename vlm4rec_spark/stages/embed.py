"""Item texts, and main photos, to unit vectors. Knows which text an item has in each representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.encoding.text_encoder import (
    MARKUP,
    SCRIPT,
    Embedder,
    clean,
    load_embedder,
)
from vlm4rec_spark.models.encoding.vision_encoder import Vision, load_vision
from vlm4rec_spark.models.photos import photo_storage
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.download import HttpSettings, concurrently

REPRESENTATIONS = ("title", "caption", "title_caption")
IMAGE = "image"
"""The representation that is made of the photo itself."""
_PHOTO_SIDE = 512
"""Pixels of a decoded photo's longer side: more than vision encoders read."""
_PHOTOS_AT_ONCE = 64


class EmbedSettings(BaseModel):
    """The sentence encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = Field("minilm", min_length=1)
    revision: str = "main"
    max_words: int = Field(256, ge=1)
    vision: str | None = Field(None, min_length=1)
    vision_revision: str = "main"


_loaded: dict[tuple[str, str], Embedder] = {}
_looking: dict[tuple[str, str], Vision] = {}


def item_texts(items: DataFrame, item_captions: DataFrame, captions: DataFrame) -> DataFrame:
    """item_id, representation, text, fallback: every item's text in every representation, null where it has none.

    Several captions of an item are joined in the order of its photos, equal ones once. An item without a caption
    falls back to its title, and `fallback` says so.
    """
    ordered = F.transform(
        F.array_sort(F.collect_list(F.struct("position", "caption"))), lambda part: part["caption"]
    )
    joined = (
        item_captions.join(captions.select("caption_key", "caption"), on="caption_key", how="inner")
        .groupBy("item_id")
        .agg(F.array_join(F.array_distinct(ordered), " ").alias("caption"))
    )
    texts = items.select("item_id", "title").join(joined, on="item_id", how="left")
    bare = F.col("caption").isNull()
    by_name = {
        "title": (F.col("title"), F.lit(False)),
        "caption": (F.coalesce("caption", "title"), bare),
        "title_caption": (
            F.when(~bare, F.concat_ws(". ", "title", "caption")).otherwise(F.col("title")),
            bare,
        ),
    }
    kinds = [
        F.struct(
            F.lit(name).alias("representation"), text.alias("text"), fallback.alias("fallback")
        )
        for name, (text, fallback) in by_name.items()
    ]
    return texts.select("item_id", F.inline(F.array(*kinds)))


def pending_texts(
    texts: DataFrame, embeddings: DataFrame, encoder_id: str, max_words: int
) -> DataFrame:
    """The texts whose embedding by this encoder is missing or was made from another text."""
    hashed = texts.where(F.col("text").isNotNull()).withColumn(
        "content_sha256", F.sha2(F.concat_ws("\n", F.lit(str(max_words)), "text"), 256)
    )
    done = embeddings.where(F.col("encoder_id") == encoder_id)
    return hashed.join(
        done.select("item_id", "representation", "content_sha256", "fallback"),
        on=["item_id", "representation", "content_sha256", "fallback"],
        how="left_anti",
    )


def untidy(texts: DataFrame, max_words: int) -> DataFrame:
    """One row: how many titles and captions hold page scripts, other markup, or more than `max_words` words."""
    own = texts.where(F.col("representation").isin("title", "caption") & ~F.col("fallback"))
    scripts, markup = (F.col("text").rlike(pattern) for pattern in (SCRIPT, MARKUP))
    words = F.size(F.split(F.trim("text"), r"\s+"))
    return own.agg(
        F.count_if(scripts).alias("scripts"),
        F.count_if(markup & ~scripts).alias("markup"),
        F.count_if(words > max_words).alias("too_long"),
    )


def embed(texts: DataFrame, encoder_id: str, settings: EmbedSettings) -> DataFrame:
    """Rows of `embeddings` for rows of `pending_texts`. A text that is empty once cleaned gives no row."""
    return texts.mapInPandas(
        _embedder_udf(settings),
        "item_id STRING, representation STRING, content_sha256 STRING, fallback BOOLEAN, embedding ARRAY<FLOAT>",
    ).select(
        "item_id",
        "representation",
        F.lit(encoder_id).alias("encoder_id"),
        "content_sha256",
        "fallback",
        "embedding",
    )


def _embedder_udf(
    settings: EmbedSettings,
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def encode(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            cleaned = batch["text"].map(lambda text: clean(text, settings.max_words))
            batch = batch[cleaned != ""]
            if batch.empty:
                continue
            # Not np.unique: it gives every text of the batch the width of the longest, and one may have a megabyte.
            places, distinct = pd.factorize(cleaned[cleaned != ""])
            vectors = _embedder(settings).embed(distinct.tolist())
            rows = batch[["item_id", "representation", "content_sha256", "fallback"]]
            yield rows.assign(embedding=list(vectors[places]))

    return encode


def _embedder(settings: EmbedSettings) -> Embedder:
    key = (settings.encoder, settings.revision)
    if key not in _loaded:
        _loaded[key] = load_embedder(*key)
    return _loaded[key]


def main_photos(photos: DataFrame) -> DataFrame:
    """item_id, position, content_sha256: each item's first photo, without its bytes; the digest is that of the photo."""
    first = F.min(F.struct("position", F.col("image_sha256").alias("content_sha256"))).alias(
        "first"
    )
    return photos.groupBy("item_id").agg(first).select("item_id", "first.*")


def pending_photos(photos: DataFrame, embeddings: DataFrame, vision_id: str) -> DataFrame:
    """Those of `main_photos` whose embedding by this encoder is missing or was made from another photo."""
    done = embeddings.where((F.col("representation") == IMAGE) & (F.col("encoder_id") == vision_id))
    return photos.join(
        done.select("item_id", "content_sha256"), on=["item_id", "content_sha256"], how="left_anti"
    )


def embed_photos(
    photos: DataFrame, vision_id: str, settings: EmbedSettings, http: HttpSettings
) -> DataFrame:
    """Rows of `embeddings` for photos (item_id, content_sha256, uri, image). One that can't be read gives no row."""
    return (
        photos.select("item_id", "content_sha256", "uri", "image")
        .mapInPandas(
            _looker_udf(settings, http),
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


def _looker_udf(
    settings: EmbedSettings, http: HttpSettings
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def image(row: dict) -> Image | None:
        try:
            data = row["image"]
            if data is None:
                data = photo_storage.read_again(row["uri"], row["content_sha256"], http)
            return decode(data, _PHOTO_SIDE)
        except (
            Exception
        ):  # of the photo or of its place; the rows that don't come back are counted as failed
            return None

    def look(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for first in range(0, len(batch), _PHOTOS_AT_ONCE):
                rows = batch.iloc[first : first + _PHOTOS_AT_ONCE].to_dict("records")
                read = concurrently(lambda row: (row, image(row)), rows, http.concurrency)
                seen = [
                    (row["item_id"], row["content_sha256"], photo)
                    for row, photo in read
                    if photo is not None
                ]
                if seen:
                    # They end in any order, and a vector's last digits depend on its batch.
                    items, digests, photos = zip(
                        *sorted(seen, key=lambda each: each[0]), strict=True
                    )
                    vectors = _vision(settings).embed(photos)
                    yield pd.DataFrame(
                        {"item_id": items, "content_sha256": digests, "embedding": list(vectors)}
                    )

    return look


def _vision(settings: EmbedSettings) -> Vision:
    assert settings.vision is not None
    key = (settings.vision, settings.vision_revision)
    if key not in _looking:
        _looking[key] = load_vision(*key)
    return _looking[key]
