"""The rows that the index is built from. Doesn't know how it is built or how it gets to workers."""

from pydantic import Field
from pyspark.sql import DataFrame

from vlm4rec_spark.settings_base import Settings


class IndexSettings(Settings):
    """Where indexes are stored, and when search is approximate. The driver writes the folder."""

    folder: str = "index"
    ann_min_items: int = Field(20_000, ge=1)
    rebuild_threshold: float = Field(0.1, ge=0, le=1)
    broadcast_gb: float = Field(1.0, gt=0)


def index_vectors(embeddings: DataFrame, representation: str, encoder_id: str) -> DataFrame:
    """The rows of the items to index."""
    return embeddings.where(
        (embeddings["representation"] == representation) & (embeddings["encoder_id"] == encoder_id)
    )


def index_rows(vectors: DataFrame, texts: DataFrame, representation: str) -> DataFrame:
    """item_id, embedding, content_sha256 and text of `index_vectors`, sorted by item_id."""
    text = texts.where(texts["representation"] == representation).select("item_id", "text")
    return (
        vectors.join(text, on="item_id", how="left")
        .select("item_id", "embedding", "content_sha256", "text")
        .orderBy("item_id")
    )
