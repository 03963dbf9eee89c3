"""Asks the captioner about photos that it has described before: each slightly changed, and one that shows nothing.

Knows which photos it may be asked about; knows no figure.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark.sql import Row
from pyspark.sql import functions as F

from vlm4rec_spark.caption import plan as planning
from vlm4rec_spark.caption import worker
from vlm4rec_spark.caption.recaption import recaption
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.models.photos import perturbations
from vlm4rec_spark.pipeline.context import RunContext
from vlm4rec_spark.spark import gpus
from vlm4rec_spark.storage import schemas

_NOTHING = "nothing"
"""The key of the photo of nothing."""
_ROW = "caption_key STRING, item_id STRING, position INT, image_sha256 STRING, prompt STRING, attempts INT, rank INT"


@dataclass
class Asked:
    """`said`: by caption_key what the model says of the photo now, None where it says nothing that is a caption.

    `of_nothing`: what it says of the photo of nothing; `refused`: why it says nothing.
    """

    said: dict[str, str | None]
    of_nothing: str | None = None
    refused: str = ""
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cost: float = 0.0


def ask(context: RunContext, sampled: Sequence[Row]) -> Asked | None:
    """Ask about the first `evaluate.audit_again` of those that have the very caption that would be made of them now.

    None where there is no such caption. Raises what the model raises where it can't be asked at all.
    """
    settings, http = context.config.caption, context.config.ingest.photos.http
    prompt = load_prompt(settings.prompt, settings.language)
    wish = planning.CaptionSpec(prompt, settings.model.model_id(), settings)
    among = F.col("item_id").isin([row["item_id"] for row in sampled])
    photos = context.tables.read(schemas.PHOTOS).where(among)
    items = context.read(schemas.ITEMS).where(among) if prompt.fields else None
    keys = [row["caption_key"] for row in sampled]
    # The key holds the photo, the prompt, the model and its settings: another one's captions have other keys.
    wanted = planning.wanted_captions(photos, photos.limit(0), items, wish).where(
        F.col("caption_key").isin(keys)
    )
    found = {row["caption_key"]: row for row in sorted(wanted.collect(), reverse=True)}
    chosen = [found[key] for key in keys if key in found][: context.config.evaluate.audit_again]
    if not chosen:
        return None
    rows = [
        (
            row["caption_key"],
            row["item_id"],
            row["position"],
            row["image_sha256"],
            row["prompt"],
            0,
            rank,
        )
        for rank, row in enumerate(chosen)
    ]
    images = photos.select("item_id", "position", "uri", "image")
    there = context.spark.createDataFrame(rows, _ROW).join(
        images, on=["item_id", "position"], how="inner"
    )
    columns = ["caption_key", "image_sha256", "uri", "image", "attempts", "prompt", "rank"]
    again = recaption(there.select(*columns), settings.model.max_side, http)
    blank, about = perturbations.blank_photo(), prompt.render({}) if prompt.fields else None
    one = (_NOTHING, hashlib.sha256(blank).hexdigest(), None, blank, 0, about, len(chosen))
    tasks = max(1, min(gpus.slots(context.spark), -(-len(chosen) // settings.batch_size)))
    made = worker.caption_photos(
        again.unionByName(context.spark.createDataFrame([one], again.schema)),
        worker.Job(settings, prompt, http, None),
        tasks,
        gpus.profile(context.spark),
    )
    context.reporter.info(
        f"asking {wish.model_id} again about {len(chosen):,} photos, slightly changed, and one of nothing"
    )
    with context.reporter.progress("asking the captioner again", len(chosen)):
        answers = {row["caption_key"]: row for row in made.collect()}
    return _asked([row["caption_key"] for row in chosen], answers, context)


def _asked(keys: Sequence[str], answers: dict[str, Row], context: RunContext) -> Asked:
    failed = [
        answers[key]["error_class"] if key in answers else "not_tried"
        for key in keys
        if key not in answers or answers[key]["caption"] is None
    ]
    nothing = answers.get(_NOTHING)
    seconds, asked, said = (
        sum(row[name] or 0 for row in answers.values())
        for name in ("seconds", "input_tokens", "output_tokens")
    )
    return Asked(
        said={key: answers[key]["caption"] if key in answers else None for key in keys},
        of_nothing=nothing["caption"] if nothing else None,
        refused="not tried" if nothing is None else nothing["error"] or "",
        failures=Counter(failed),
        seconds=seconds,
        cost=context.config.caption.prices.cost(seconds, asked, said),
    )


def inputs_fingerprint(context: RunContext) -> object:
    """What the answers depend on besides the tables; None where nobody is asked."""
    settings = context.config.caption
    if not context.config.evaluate.audit_again:
        return None
    try:
        prompt = load_prompt(settings.prompt, settings.language).text
        return [settings.model_dump(mode="json"), prompt, settings.model.model_id()]
    except UsageError as wrong:
        return str(wrong)
