"""Captions photos a second time for the audit: perturbed ones, and a blank one.

Knows which photos the model may see again; knows no figure.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from vlm4rec_spark.caption import plan as planning
from vlm4rec_spark.caption import worker
from vlm4rec_spark.caption.recaption import recaption
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.prompts import Prompt
from vlm4rec_spark.models.photos import perturbations
from vlm4rec_spark.pipeline.caption import caption_spec
from vlm4rec_spark.pipeline.context import RunContext
from vlm4rec_spark.spark import gpus
from vlm4rec_spark.storage import schemas

_BLANK_KEY = "nothing"


@dataclass
class Recaptions:
    """`captions`: the new caption by caption_key, None where the model gave none."""

    captions: dict[str, str | None]
    blank_caption: str | None = None
    blank_error: str = ""
    """Why the blank photo has no caption."""
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cost: float = 0.0


def recaption_sample(context: RunContext, sampled: Sequence[Row]) -> Recaptions | None:
    """Caption `evaluate.audit_again` photos whose captions have the keys that they'd get now.

    None where no caption is. Raises what the model raises if it can't be called at all.
    """
    spec = caption_spec(context)
    in_sample = F.col("item_id").isin([row["item_id"] for row in sampled])
    photos = context.tables.read(schemas.PHOTOS).where(in_sample)
    items = context.read(schemas.ITEMS).where(in_sample) if spec.prompt.fields else None
    wanted = planning.wanted_captions(photos, photos.limit(0), items, spec)
    chosen = _choose(wanted, sampled)[: context.config.evaluate.audit_again]
    if not chosen:
        return None
    perturbed = _perturbed(context, photos, chosen)
    batches = -(-len(chosen) // spec.settings.batch_size)
    captions = worker.caption_photos(
        _with_blank(context, perturbed, spec.prompt, len(chosen)),
        worker.Job(spec.settings, spec.prompt, context.config.ingest.photos.http, None),
        max(1, min(gpus.slots(context.spark), batches)),
        gpus.profile(context.spark),
    )
    context.reporter.info(
        f"captioning {len(chosen):,} photos again with {spec.model_id}, slightly changed, "
        "and a blank photo"
    )
    with context.reporter.progress("captioning photos again", len(chosen)):
        results = {row["caption_key"]: row for row in captions.collect()}
    return _recaptions([row["caption_key"] for row in chosen], results, context)


def _choose(wanted: DataFrame, sampled: Sequence[Row]) -> list[Row]:
    """Rows of `wanted` whose caption is in the sample, in its order.

    A key depends on photo, prompt, model and settings: other captioners' captions have other keys.
    """
    keys = [row["caption_key"] for row in sampled]
    rows = wanted.where(F.col("caption_key").isin(keys)).collect()
    by_key = {row["caption_key"]: row for row in sorted(rows, reverse=True)}
    return [by_key[key] for key in keys if key in by_key]


def _perturbed(context: RunContext, photos: DataFrame, chosen: Sequence[Row]) -> DataFrame:
    """Rows for `worker.caption_photos`, in the order of `chosen`."""
    identity = ("caption_key", "item_id", "position", "image_sha256", "prompt")
    rows = [(*(row[name] for name in identity), 0, rank) for rank, row in enumerate(chosen)]
    schema = (
        "caption_key STRING, item_id STRING, position INT, image_sha256 STRING, prompt STRING, "
        "attempts INT, rank INT"
    )
    images = photos.select("item_id", "position", "uri", "image")
    columns = ["caption_key", "image_sha256", "uri", "image", "attempts", "prompt", "rank"]
    stored = context.spark.createDataFrame(rows, schema).join(
        images, on=["item_id", "position"], how="inner"
    )
    max_side = context.config.caption.model.max_side
    return recaption(stored.select(*columns), max_side, context.config.ingest.photos.http)


def _with_blank(context: RunContext, photos: DataFrame, prompt: Prompt, rank: int) -> DataFrame:
    """`photos` and the blank photo."""
    image = perturbations.blank_photo()
    text = prompt.render({}) if prompt.fields else None
    row = (_BLANK_KEY, hashlib.sha256(image).hexdigest(), None, image, 0, text, rank)
    return photos.unionByName(context.spark.createDataFrame([row], photos.schema))


def _recaptions(keys: Sequence[str], results: dict[str, Row], context: RunContext) -> Recaptions:
    captions = {key: results[key]["caption"] if key in results else None for key in keys}
    failures = Counter(
        results[key]["error_class"] if key in results else "not_tried"
        for key, caption in captions.items()
        if caption is None
    )
    blank = results.get(_BLANK_KEY)
    sums = {
        name: sum(row[name] or 0 for row in results.values())
        for name in ("seconds", "input_tokens", "output_tokens")
    }
    return Recaptions(
        captions=captions,
        blank_caption=blank["caption"] if blank else None,
        blank_error="not tried" if blank is None else blank["error"] or "",
        failures=failures,
        seconds=sums["seconds"],
        cost=context.config.caption.prices.cost(*sums.values()),
    )


def inputs_fingerprint(context: RunContext) -> object:
    """What the captions depend on besides the tables; None where no photo is captioned again."""
    if not context.config.evaluate.audit_again:
        return None
    try:
        spec = caption_spec(context)
        return [spec.settings.model_dump(mode="json"), spec.prompt.text, spec.model_id]
    except UsageError as error:
        return str(error)
