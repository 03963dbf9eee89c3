"""Which photos are captioned, why, and in which order.

Knows keys and joins; opens no photo and loads no model.
"""

import json
from dataclasses import dataclass
from functools import reduce

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.caption.settings import CaptionSettings
from vlm4rec_spark.models.captioning.prompts import Prompt
from vlm4rec_spark.models.photos.photo_errors import PHOTO_ERRORS

PENDING = ("new", "photo_changed", "prompt_changed", "model_changed", "settings_changed", "retry")
"""Why a photo is captioned; `settings_changed`: other generation or pixel parameters."""


@dataclass(frozen=True)
class CaptionSpec:
    """What captions are made with, and which failed ones are tried again.

    `retry` names an error class, or is "" for all of them; rejected captions count too. With None
    only failures of the model are tried again, in up to `max_attempts` runs. A bad photo stays bad,
    and so does a greedy answer.
    """

    prompt: Prompt
    model_id: str
    settings: CaptionSettings
    retry: str | None = None

    def should_retry(self) -> Column:
        """Whether a failed or rejected caption is tried again."""
        if self.retry is None:
            photo_is_bad = F.col("error_class").isin(*PHOTO_ERRORS)
            attempts_left = F.col("attempts") < self.settings.max_attempts
            return (F.col("status") == "failed") & ~photo_is_bad & attempts_left
        return F.lit(True) if self.retry == "" else F.col("error_class") == self.retry


def wanted_captions(
    photos: DataFrame,
    imported: DataFrame,
    items: DataFrame | None,
    spec: CaptionSpec,
) -> DataFrame:
    """Every photo that the model shall describe, without bytes.

    Columns item_id, position, image_sha256, prompt and caption_key. The key is a SHA-256 of
    whatever changes the text, and of nothing else: the photo's bytes, the prompt's text, the model
    at its revision, and the generation and pixel parameters. `prompt` is null where all photos have
    the same one. Where the prompt names fields it is about the photo's item, and `items` has them.
    """
    model = spec.settings.model
    parameters = {"max_new_tokens": model.max_new_tokens, "max_side": model.max_side}
    made_with = json.dumps([spec.prompt.text, spec.model_id, parameters], sort_keys=True)
    nth = F.expr("row_number() OVER (PARTITION BY item_id ORDER BY position)")
    chosen = (
        photos.join(imported.select("item_id"), on="item_id", how="left_anti")
        .select("item_id", "position", "image_sha256", nth.alias("nth"))
        .where(F.col("nth") <= spec.settings.photos_per_item)
    )
    return _with_prompts(chosen, items, spec.prompt).select(
        "item_id",
        "position",
        "image_sha256",
        "prompt",
        F.sha2(F.concat_ws("\n", "image_sha256", F.lit(made_with), "prompt"), 256).alias(
            "caption_key"
        ),
    )


def _with_prompts(
    photos: DataFrame,
    items: DataFrame | None,
    prompt: Prompt,
) -> DataFrame:
    """`photos` with the prompt about their item."""
    if items is None:
        return photos.withColumn("prompt", F.lit(None).cast("string"))

    @F.pandas_udf("string")  # type: ignore[call-overload]
    def render(values: pd.DataFrame) -> pd.Series:
        fields = values.astype(object).where(values.notna(), None)
        return pd.Series([prompt.render(row) for row in fields.to_dict("records")], dtype=object)

    fields = items.select("item_id", F.struct(*prompt.fields).alias("fields"))
    return photos.join(fields, on="item_id", how="left").withColumn("prompt", render("fields"))


def current_captions(item_captions: DataFrame, captions: DataFrame) -> DataFrame:
    """item_id, position and `old` of every photo that a model described.

    `old` is a struct of the caption's key, photo, prompt and model.
    """
    described = captions.where("status = 'ok'").selectExpr(
        "caption_key", "struct(caption_key, image_sha256, prompt_id, model) AS old"
    )
    return item_captions.join(described, on="caption_key", how="inner").select(
        "item_id", "position", "old"
    )


def with_reason(
    wanted: DataFrame, captions: DataFrame, current: DataFrame, spec: CaptionSpec
) -> DataFrame:
    """`wanted` with `reason` (one of PENDING, or reused, kept, given_up), `old`, and `attempts`.

    `current` is of `current_captions`; `attempts` counts the runs that tried.
    """
    tried = captions.select("caption_key", "status", "error_class", "attempts")
    failed = F.col("status").isin("failed", "rejected")
    old = F.col("old")
    reason = (
        F.when(failed & spec.should_retry(), "retry")
        .when(failed, "given_up")
        .when(F.col("status").isNotNull(), "reused")
        .when(old.isNull(), "new")
        .when(old["image_sha256"] != F.col("image_sha256"), "photo_changed")
        .when(F.lit(spec.settings.on_change == "keep"), "kept")
        .when(old["model"] != spec.model_id, "model_changed")
        .when(old["prompt_id"] != spec.prompt.prompt_id, "prompt_changed")
        # Of a prompt that names fields it may be the catalogue that has changed.
        .otherwise("prompt_changed" if spec.prompt.fields else "settings_changed")
    )
    return (
        wanted.join(tried, on="caption_key", how="left")
        .join(current, on=["item_id", "position"], how="left")
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


def queue(photos: DataFrame, interactions: DataFrame | None) -> DataFrame:
    """One row per content key to caption, from the photos with their reasons.

    Columns caption_key, a photo's item_id and position, reason, attempts, prompt and rank. Rank 0
    is the content whose items have the most events; the key breaks ties. Without `interactions` any
    order does.
    """
    pending = photos.where(F.col("reason").isin(*PENDING))
    if interactions is None:
        pending = pending.withColumn("events", F.lit(0))
    else:
        events = interactions.groupBy("item_id").agg(F.expr("count(*) AS events"))
        pending = pending.join(events, on="item_id", how="left")
    keys = pending.groupBy("caption_key").agg(
        F.expr("min(struct(item_id, position, reason, attempts, prompt)) AS photo"),
        F.expr("sum(events) AS events"),
    )
    # One task sorts all keys, some hundred bytes each: the ranks are dense and the same in every
    # run.
    rank = "row_number() OVER (ORDER BY events DESC NULLS LAST, caption_key) - 1 AS rank"
    return keys.selectExpr("caption_key", "photo.*", rank)


def in_order(queue: DataFrame, now: int, first: int) -> DataFrame:
    """The first `now` rows of the queue with `tier`, and with `rank` as they are captioned.

    The `first` photos by events are tier 0, twice as many are tier 1, and so on. Inside a tier
    photos come by item, the order of the files of `photos`. So a tier reads that table about once,
    and a chunk reads only a part of it.
    """
    tier = F.floor(F.log2(F.col("rank") / first + 1)).cast("int")
    rank = F.expr("row_number() OVER (ORDER BY tier, item_id, position) - 1")
    return queue.where(F.col("rank") < now).withColumn("tier", tier).withColumn("rank", rank)


def with_photos(part: DataFrame, photos: DataFrame) -> DataFrame:
    """Rows of the ordered queue with their photo's uri, image_sha256 and image.

    Reads only files and row groups that may hold an item between a tier's first and last.
    """
    tiers = part.groupBy("tier").agg(F.min("item_id"), F.max("item_id")).collect()
    ranges = [F.col("item_id").between(first, last) for _, first, last in tiers]
    columns = photos.select("item_id", "position", "uri", "image_sha256", "image")
    images = columns.where(reduce(Column.__or__, ranges))
    return part.join(images, on=["item_id", "position"], how="inner")


def item_captions(
    photos: DataFrame,
    captions: DataFrame,
    imported: DataFrame,
) -> DataFrame:
    """item_id, position and caption_key: which caption every photo has now, imported ones included.

    It is the wanted caption if there is one, else the one that the item had of this very photo.
    """
    ok = captions.where("status = 'ok'").selectExpr("caption_key", "true AS ok")
    described = photos.join(ok, on="caption_key", how="left").selectExpr(
        "item_id",
        "position",
        """CASE
            WHEN ok THEN caption_key
            WHEN old.image_sha256 = image_sha256 THEN old.caption_key
        END AS caption_key""",
    )
    return described.where("caption_key IS NOT NULL").unionByName(
        imported.select("item_id", "position", "caption_key")
    )


def imported_captions(item_captions: DataFrame, captions: DataFrame) -> DataFrame:
    """item_id, position and caption_key of items with an imported caption; the model skips them."""
    imported = captions.where("status = 'imported'").select("caption_key")
    return item_captions.join(imported, on="caption_key", how="left_semi")


def import_rows(raw: DataFrame, items: DataFrame) -> DataFrame:
    """item_id, caption, caption_key, source, row and `reason` of rows with an item_id and a text.

    The first of several texts for one item, in alphabetical order, is used; the rest get a reason.
    """
    rows = raw.selectExpr(
        "fields['item_id'] AS item_id", "trim(fields['text']) AS caption", "source", "row"
    )
    catalogue = items.selectExpr("item_id", "true AS in_catalogue")
    texts = rows.join(catalogue, on="item_id", how="left").withColumn(
        "has_text", F.expr("coalesce(lower(caption) NOT IN ('', 'nan', 'null', 'none'), false)")
    )
    return texts.selectExpr(
        "item_id",
        "caption",
        "source",
        "row",
        "sha2(to_json(array('imported', item_id, caption)), 256) AS caption_key",
        """CASE
            WHEN coalesce(item_id, '') = '' THEN 'item_id is missing'
            WHEN in_catalogue IS NULL THEN 'no such item in the catalogue'
            WHEN NOT has_text THEN 'the text is empty'
            WHEN row_number() OVER (PARTITION BY item_id, has_text ORDER BY caption) > 1
                THEN 'the item has another text'
        END AS reason""",
    )
