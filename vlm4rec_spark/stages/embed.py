"""Item texts to unit vectors: title, caption, title + caption. Knows which text an item has in each representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.embedder import Embedder, clean, load_embedder

REPRESENTATIONS = ("title", "caption", "title_caption")


class EmbedSettings(BaseModel):
    """The sentence encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = Field("minilm", min_length=1)
    revision: str = "main"
    max_words: int = Field(256, ge=1)


_loaded: dict[tuple[str, str], Embedder] = {}


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
        .groupBy("item_id").agg(F.array_join(F.array_distinct(ordered), " ").alias("caption"))
    )  # fmt: skip
    texts = items.select("item_id", "title").join(joined, on="item_id", how="left")
    bare = F.col("caption").isNull()
    by_name = {
        "title": (F.col("title"), F.lit(False)),
        "caption": (F.coalesce("caption", "title"), bare),
        "title_caption": (F.when(~bare, F.concat_ws(". ", "title", "caption")).otherwise(F.col("title")), bare),
    }
    kinds = [
        F.struct(F.lit(name).alias("representation"), text.alias("text"), fallback.alias("fallback"))
        for name, (text, fallback) in by_name.items()
    ]
    return texts.select("item_id", F.inline(F.array(*kinds)))


def pending_texts(texts: DataFrame, embeddings: DataFrame, encoder_id: str, max_words: int) -> DataFrame:
    """The texts whose embedding by this encoder is missing or was made from another text."""
    hashed = texts.where(F.col("text").isNotNull()).withColumn(
        "text_sha256", F.sha2(F.concat_ws("\n", F.lit(str(max_words)), "text"), 256)
    )
    done = embeddings.where(F.col("encoder_id") == encoder_id)
    return hashed.join(
        done.select("item_id", "representation", "text_sha256", "fallback"),
        on=["item_id", "representation", "text_sha256", "fallback"],
        how="left_anti",
    )


def embed(texts: DataFrame, encoder_id: str, settings: EmbedSettings) -> DataFrame:
    """Rows of `embeddings` for rows of `pending_texts`. A text that is empty once cleaned gives no row."""
    return texts.mapInPandas(
        _embedder_udf(settings),
        "item_id STRING, representation STRING, text_sha256 STRING, fallback BOOLEAN, embedding ARRAY<FLOAT>",
    ).select("item_id", "representation", F.lit(encoder_id).alias("encoder_id"), "text_sha256", "fallback", "embedding")


def _embedder_udf(settings: EmbedSettings) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def encode(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            cleaned = batch["text"].map(lambda text: clean(text, settings.max_words))
            batch = batch[cleaned != ""]
            if batch.empty:
                continue
            # Not np.unique: it gives every text of the batch the width of the longest, and one may have a megabyte.
            places, distinct = pd.factorize(cleaned[cleaned != ""])
            vectors = _embedder(settings).embed(distinct.tolist())
            rows = batch[["item_id", "representation", "text_sha256", "fallback"]]
            yield rows.assign(embedding=list(vectors[places]))

    return encode


def _embedder(settings: EmbedSettings) -> Embedder:
    key = (settings.encoder, settings.revision)
    if key not in _loaded:
        _loaded[key] = load_embedder(*key)
    return _loaded[key]
