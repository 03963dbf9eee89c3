"""Which photos are captioned, why, and in which order: the content keys of all photos, less those that are done.

Knows keys and joins; opens no photo and loads no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import reduce

import pandas as pd
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from vlm4rec_spark.caption.settings import CaptionSettings
from vlm4rec_spark.models.captioning.prompts import Prompt
from vlm4rec_spark.models.photos.decode import PHOTO_ERRORS

PENDING = ("new", "photo_changed", "prompt_changed", "model_changed", "settings_changed", "retry")
"""Why a photo is captioned; `settings_changed`: other generation or pixel parameters."""


@dataclass(frozen=True)
class CaptionSpec:
    """What captions shall be made with, and which failed ones are tried again.

    `retry` names an error class, or is "" for all of them; rejected captions count too. None: only where the model
    failed, in up to `max_attempts` runs, since what is wrong with a photo or with a greedy answer stays wrong.
    """

    prompt: Prompt
    model_id: str
    settings: CaptionSettings
    retry: str | None = None

    def again(self) -> Column:
        """Whether a failed or rejected caption is tried again."""
        if self.retry is None:
            models_fault = (F.col("status") == "failed") & ~F.col("error_class").isin(*PHOTO_ERRORS)
            return models_fault & (F.col("attempts") < self.settings.max_attempts)
        return F.lit(True) if self.retry == "" else F.col("error_class") == self.retry


def wanted_captions(
    photos: DataFrame, imported: DataFrame, items: DataFrame | None, wish: CaptionSpec
) -> DataFrame:
    """item_id, position, image_sha256, prompt and caption_key of every photo that the model shall describe, no bytes.

    caption_key = SHA-256 of the photo's bytes, the prompt's text, the model at its revision, and the generation and
    pixel parameters: whatever changes the text, and nothing else. `prompt` is null where all photos have the
    same one; where it names fields it is about the photo's item, and `items` has them.
    """
    model = wish.settings.model
    parameters = {"max_new_tokens": model.max_new_tokens, "max_side": model.max_side}
    rest = json.dumps([wish.prompt.text, wish.model_id, parameters], sort_keys=True)
    first = Window.partitionBy("item_id").orderBy("position")
    chosen = (
        photos.join(imported.select("item_id"), on="item_id", how="left_anti")
        .select("item_id", "position", "image_sha256", F.row_number().over(first).alias("nth"))
        .where(F.col("nth") <= wish.settings.photos_per_item)
    )
    return _asked(chosen, items, wish.prompt).select(
        "item_id",
        "position",
        "image_sha256",
        "prompt",
        F.sha2(F.concat_ws("\n", "image_sha256", F.lit(rest), "prompt"), 256).alias("caption_key"),
    )


def _asked(photos: DataFrame, items: DataFrame | None, prompt: Prompt) -> DataFrame:
    """`photos` with the prompt about their item."""
    if items is None:
        return photos.withColumn("prompt", F.lit(None).cast("string"))

    @F.pandas_udf("string")  # type: ignore[call-overload]
    def about(values: pd.DataFrame) -> pd.Series:
        known = values.astype(object).where(values.notna(), None)
        return pd.Series([prompt.render(row) for row in known.to_dict("records")], dtype=object)

    fields = items.select("item_id", F.struct(*prompt.fields).alias("fields"))
    return photos.join(fields, on="item_id", how="left").withColumn("prompt", about("fields"))


def current_captions(item_captions: DataFrame, captions: DataFrame) -> DataFrame:
    """item_id, position and `old` (the caption's key, photo, prompt and model) of each photo that a model described."""
    old = F.struct("caption_key", "image_sha256", "prompt_id", "model").alias("old")
    described = captions.where(F.col("status") == "ok").select("caption_key", old)
    return item_captions.join(described, on="caption_key", how="inner").select(
        "item_id", "position", "old"
    )


def with_reason(
    wanted: DataFrame, captions: DataFrame, in_force: DataFrame, wish: CaptionSpec
) -> DataFrame:
    """`wanted` with `reason` (one of PENDING, or reused, kept, given_up), `old`, and `attempts` (runs that tried)."""
    done = captions.select("caption_key", "status", "error_class", "attempts")
    failed, old = F.col("status").isin("failed", "rejected"), F.col("old")
    reason = (
        F.when(failed & wish.again(), "retry")
        .when(failed, "given_up")
        .when(F.col("status").isNotNull(), "reused")
        .when(old.isNull(), "new")
        .when(old["image_sha256"] != F.col("image_sha256"), "photo_changed")
        .when(F.lit(wish.settings.on_change == "keep"), "kept")
        .when(old["model"] != wish.model_id, "model_changed")
        .when(old["prompt_id"] != wish.prompt.prompt_id, "prompt_changed")
        # Of a prompt that names fields it may be the catalogue that has changed.
        .otherwise("prompt_changed" if wish.prompt.fields else "settings_changed")
    )
    return (
        wanted.join(done, on="caption_key", how="left")
        .join(in_force, on=["item_id", "position"], how="left")
        .select(
            "item_id",
            "position",
            "image_sha256",
            "prompt",
            "caption_key",
            reason.alias("reason"),
            "old",
            F.coalesce("attempts", F.lit(0)).alias("attempts"),
        )
    )


def queue(judged: DataFrame, interactions: DataFrame | None) -> DataFrame:
    """One row per content key to caption: caption_key, a photo's item_id and position, reason, attempts, prompt, rank.

    Rank 0 is the content whose items have the most events; the key breaks ties. Without `interactions` any order does.
    """
    pending = judged.where(F.col("reason").isin(*PENDING))
    if interactions is None:
        pending = pending.withColumn("events", F.lit(0))
    else:
        events = interactions.groupBy("item_id").agg(F.count(F.lit(1)).alias("events"))
        pending = pending.join(events, on="item_id", how="left")
    keys = pending.groupBy("caption_key").agg(
        F.min(F.struct("item_id", "position", "reason", "attempts", "prompt")).alias("one"),
        F.sum("events").alias("events"),
    )
    # One task sorts all keys, some hundred bytes each: so the ranks are dense, and the same each time.
    rank = F.row_number().over(Window.orderBy(F.desc_nulls_last("events"), "caption_key")) - 1
    return keys.select("caption_key", "one.*", rank.alias("rank"))


def in_order(queue: DataFrame, now: int, first: int) -> DataFrame:
    """The first `now` rows of the queue with `tier`, and with `rank` as they are done.

    The most wanted `first` photos are tier 0, twice as many are tier 1, and so on. Inside a tier photos come by item,
    as they lie in the files of `photos`: so each tier reads that table about once, and not each chunk all of it.
    """
    tier = F.floor(F.log2(F.col("rank") / first + 1)).cast("int")
    rank = F.row_number().over(Window.orderBy("tier", "item_id", "position")) - 1
    return queue.where(F.col("rank") < now).withColumn("tier", tier).withColumn("rank", rank)


def with_photos(part: DataFrame, photos: DataFrame) -> DataFrame:
    """Rows of the ordered queue with their photo's uri, image_sha256 and image.

    Reads the files and row groups that may hold an item between the first and the last one, in each tier.
    """
    ends = (
        part.groupBy("tier")
        .agg(F.min("item_id").alias("first"), F.max("item_id").alias("last"))
        .collect()
    )
    among = [F.col("item_id").between(tier["first"], tier["last"]) for tier in ends]
    images = photos.select("item_id", "position", "uri", "image_sha256", "image").where(
        reduce(Column.__or__, among)
    )
    return part.join(images, on=["item_id", "position"], how="inner")


def item_captions(judged: DataFrame, captions: DataFrame, imported: DataFrame) -> DataFrame:
    """Which caption each item has now: the wanted one when it is there, else the one that it had of this very photo.

    And those that were imported.
    """
    done = captions.where(F.col("status") == "ok").select("caption_key", F.lit(True).alias("done"))
    same_photo = F.col("old")["image_sha256"] == F.col("image_sha256")
    key = F.when(F.col("done"), F.col("caption_key")).when(same_photo, F.col("old")["caption_key"])
    made = judged.join(done, on="caption_key", how="left").select(
        "item_id", "position", key.alias("caption_key")
    )
    return made.where(F.col("caption_key").isNotNull()).unionByName(
        imported.select("item_id", "position", "caption_key")
    )


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
        F.sha2(F.to_json(F.array(F.lit("imported"), "item_id", "caption")), 256).alias(
            "caption_key"
        ),
        F.when(F.coalesce(F.col("item_id"), F.lit("")) == "", "item_id is missing")
        .when(F.col("known").isNull(), "no such item in the catalogue")
        .when(empty, "the text is empty")
        .when(rank > 1, "the item has another text")
        .alias("reason"),
    )
