"""Which photos are to be captioned: the content keys of all items' photos, less those that are done.

Knows keys and joins; opens no photo and loads no model.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.models.captioners import ModelSettings
from vlm4rec_spark.models.prompts import Prompt


class CaptionSettings(BaseModel):
    """Model, prompt, and how the work is cut."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: ModelSettings = ModelSettings()
    prompt: str = "describe.1"
    photos_per_item: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    photos_per_task: int = Field(64, ge=1)
    max_failed_share: float = Field(0.2, ge=0, le=1)


def wanted_captions(
    photos: DataFrame, imported: DataFrame, prompt: Prompt, model_id: str, settings: CaptionSettings
) -> DataFrame:
    """item_id, position, image_sha256 and caption_key of every photo that the model shall describe, no bytes.

    caption_key = SHA-256 of the photo's bytes, the prompt's text, the model at its revision, and the generation and
    pixel parameters: whatever changes the text, and nothing else.
    """
    parameters = {"max_new_tokens": settings.model.max_new_tokens, "max_side": settings.model.max_side}
    rest = json.dumps([prompt.text, model_id, parameters], sort_keys=True)
    first = Window.partitionBy("item_id").orderBy("position")
    return (
        photos.join(imported.select("item_id"), on="item_id", how="left_anti")
        .select("item_id", "position", "image_sha256", F.row_number().over(first).alias("nth"))
        .where(F.col("nth") <= settings.photos_per_item)
        .select(
            "item_id",
            "position",
            "image_sha256",
            F.sha2(F.concat_ws("\n", F.col("image_sha256"), F.lit(rest)), 256).alias("caption_key"),
        )
    )


def photos_to_caption(wanted: DataFrame, photos: DataFrame, captions: DataFrame) -> DataFrame:
    """One row per content key that has no caption row yet, with the bytes of one photo that has this content."""
    pending = wanted.join(captions.select("caption_key"), on="caption_key", how="left_anti")
    one = pending.groupBy("caption_key").agg(F.min(F.struct("item_id", "position")).alias("photo"))
    return one.select("caption_key", "photo.item_id", "photo.position").join(
        photos.select("item_id", "position", "image_sha256", "image"), on=["item_id", "position"], how="inner"
    ).select("caption_key", "image_sha256", "image")  # fmt: skip


def item_captions(wanted: DataFrame, captions: DataFrame, imported: DataFrame) -> DataFrame:
    """Which caption each item has now: the wanted ones that are there, and those that were imported."""
    done = captions.where(F.col("status") == "ok").select("caption_key")
    made = wanted.join(done, on="caption_key", how="left_semi").select("item_id", "position", "caption_key")
    return made.unionByName(imported.select("item_id", "position", "caption_key"))


def imported_captions(item_captions: DataFrame, captions: DataFrame) -> DataFrame:
    """item_id, position and caption_key of the items whose caption came from elsewhere; the model leaves them alone."""
    imported = captions.where(F.col("status") == "imported").select("caption_key")
    return item_captions.join(imported, on="caption_key", how="left_semi")


def import_rows(raw: DataFrame, items: DataFrame) -> DataFrame:
    """item_id, caption, caption_key, source, row and `reason` for rows of `sources.read` with item_id and text.

    Of several texts for one item the first in alphabetical order is taken; the others get a reason.
    """
    item_id, text = F.col("fields")["item_id"], F.trim(F.col("fields")["text"])
    rows = raw.select(item_id.alias("item_id"), text.alias("caption"), "source", "row").join(
        items.select("item_id", F.lit(True).alias("known")), on="item_id", how="left"
    )
    empty = F.col("caption").isNull() | F.lower("caption").isin("", "nan", "null", "none")
    fits = F.col("known").isNotNull() & ~empty
    rank = F.row_number().over(Window.partitionBy("item_id", fits).orderBy("caption"))
    return rows.select(
        "item_id",
        "caption",
        "source",
        "row",
        F.sha2(F.to_json(F.array(F.lit("imported"), "item_id", "caption")), 256).alias("caption_key"),
        F.when(F.coalesce(F.col("item_id"), F.lit("")) == "", "item_id is missing")
        .when(F.col("known").isNull(), "no such item in the catalogue")
        .when(empty, "the text is empty")
        .when(rank > 1, "the item has another text")
        .alias("reason"),
    )
