"""The caption audit, a part of evaluate: figures on a seeded sample of every captioner's captions.

Knows the tables that the sample, the catalogue's values and earlier captions come from. The figures
are those of `evaluation.caption_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark.errors import error_line
from vlm4rec_spark.evaluation import caption_metrics as metrics
from vlm4rec_spark.evaluation.caption_metrics import Figure
from vlm4rec_spark.pipeline import caption_audit_recaption
from vlm4rec_spark.pipeline.caption_audit_recaption import Recaptions
from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.stages import embed
from vlm4rec_spark.storage import schemas

IMPORTED = "imported"
"""The arm of captions that were made elsewhere."""
_MAX_ARMS = 5
"""Captioners whose captions items have now; more than two are rare."""
_EXAMPLES = 12
_MAX_CHARACTERS = 400


@dataclass
class _Sample:
    """Current captions of one captioner, in the order of a hash."""

    arm: str
    captions_total: int
    """Of this captioner, in the sample or not."""
    texts_total: int
    """How many of these are distinct."""
    rows: list[Row] = field(default_factory=list)
    earlier: dict[str, Row] = field(default_factory=dict)
    """The caption that a photo had before, by the photo's SHA-256."""
    recaptions: Recaptions | None = None

    @property
    def captions(self) -> list[str]:
        return [row["caption"] for row in self.rows]

    def changed_captions(self) -> list[_ChangedCaption]:
        return [
            _ChangedCaption(self.earlier[row["image_sha256"]]["caption"], row["caption"])
            for row in self.rows
            if row["image_sha256"] in self.earlier
        ]


class _ChangedCaption(NamedTuple):
    """What a photo was described as before, and what it is now."""

    before: str
    now: str


class _Judgment(NamedTuple):
    """The figures of a captioner, and its worst captions."""

    figures: list[Figure]
    examples: list[dict]


def audit(context: RunContext, result: StageResult) -> tuple[list[dict], dict | None]:
    """Rows of `metrics` without run_id, and examples and summaries for the report.

    Nothing without any caption.
    """
    samples = _samples(context)
    if not samples:
        return [], None
    _add_earlier(context, samples)
    trouble = _recaption(context, result, samples)
    texts = {text for sample in samples for text in _texts(sample)}
    vectors = _vectors(context, texts) if texts else {}
    rows: list[dict] = []
    examples: list[dict] = []
    for sample in samples:
        judgment = _judge(sample, vectors, context.config.evaluate.seed)
        context.reporter.info(_message(sample, judgment.figures))
        rows += [figure.row(sample.arm) for figure in judgment.figures]
        examples += judgment.examples
    audit = {
        "captioners": [_summary(sample) for sample in samples],
        "examples": examples[:_EXAMPLES],
    }
    return rows, audit | trouble


def inputs_fingerprint(context: RunContext) -> object:
    return [
        context.config.embed.model_dump(mode="json"),
        caption_audit_recaption.inputs_fingerprint(context),
    ]


def _samples(context: RunContext) -> list[_Sample]:
    """A sample for every captioner, of the same photos whoever has described them."""
    settings = context.config.evaluate
    if not settings.audit_photos:
        return []
    rows = _counts_and_captions(context, settings.audit_photos, settings.seed).collect()
    rows.sort(key=lambda row: (-(row["captions"] or 0), row["arm"], row["number"]))
    samples = {
        row["arm"]: _Sample(row["arm"], row["captions"], row["texts"])
        for row in [row for row in rows if row["captions"]][:_MAX_ARMS]
    }
    for row in rows:
        if row["number"] and row["arm"] in samples:
            samples[row["arm"]].rows.append(row)
    return list(samples.values())


def _counts_and_captions(context: RunContext, photos: int, seed: int) -> DataFrame:
    """For each arm a row of captions and texts, their number, and the first `photos` of them.

    The captions have `number`, caption_key, item_id, position, image_sha256, caption, and the
    item's category and attributes. Several photos may share a caption: it has the first of them.
    """
    links = context.tables.read(schemas.ITEM_CAPTIONS)
    arm = F.coalesce("model", F.lit(IMPORTED)).alias("arm")
    captions = context.tables.read(schemas.CAPTIONS).where(F.col("caption").isNotNull())
    captions = captions.select("caption_key", "image_sha256", "caption", arm)
    # 64 bits of its hash identify a text well enough, and a shuffle of hashes is a light one.
    texts = F.countDistinct(F.xxhash64("caption")).alias("texts")
    in_use = captions.join(links, on="caption_key", how="left_semi")
    counts = in_use.groupBy("arm").agg(F.count(F.lit(1)).alias("captions"), texts)
    first_photo = F.min(F.struct("item_id", "position")).alias("photo")
    current = captions.join(
        links.groupBy("caption_key").agg(first_photo), on="caption_key", how="inner"
    ).select("*", "photo.*")
    order = F.xxhash64(F.coalesce("image_sha256", "item_id"), F.lit(seed))
    by_hash = Window.partitionBy("arm").orderBy(order, "caption_key")
    numbered = current.drop("photo").withColumn("number", F.row_number().over(by_hash))
    items = context.tables.read(schemas.ITEMS).select("item_id", "category", "attributes")
    first = numbered.where(F.col("number") <= photos).join(items, on="item_id", how="left")
    return counts.unionByName(first, allowMissingColumns=True)


def _add_earlier(context: RunContext, samples: Sequence[_Sample]) -> None:
    """Add the sampled photos' latest captions that no item has now, by whichever captioner."""
    unused = _unused(context, [row for sample in samples for row in sample.rows])
    unused.sort(key=lambda row: row["caption_key"], reverse=True)
    unused.sort(key=lambda row: row["at"])
    latest = {row["image_sha256"]: row for row in unused}
    for sample in samples:
        photos = latest.keys() & {row["image_sha256"] for row in sample.rows}
        sample.earlier = {photo: latest[photo] for photo in photos}


def _unused(context: RunContext, current: Sequence[Row]) -> list[Row]:
    """All captions that no item has now, of the photos of `current`; `at` is in microseconds."""
    photos = {row["image_sha256"] for row in current if row["image_sha256"]}
    is_current = F.col("caption_key").isin([row["caption_key"] for row in current])
    at = F.unix_micros("captioned_at").alias("at")
    captions = (
        context.tables.read(schemas.CAPTIONS)
        .where(F.col("image_sha256").isin(sorted(photos)) & ~is_current)
        .where(F.col("status") == "ok")
        .select("caption_key", "image_sha256", "caption", "model", "prompt_id", at)
        .collect()
    )
    keys = [row["caption_key"] for row in captions]
    links = context.tables.read(schemas.ITEM_CAPTIONS).where(F.col("caption_key").isin(keys))
    in_use = {row["caption_key"] for row in links.select("caption_key").distinct().collect()}
    return [row for row in captions if row["caption_key"] not in in_use]


def _recaption(
    context: RunContext, result: StageResult, samples: Sequence[_Sample]
) -> dict[str, str]:
    """Caption the sample a second time. A failure is reported, and costs nothing but figures."""
    if not context.config.evaluate.audit_again:
        return {}
    try:
        arm = context.config.caption.model.model_id()
        for sample in samples:
            if sample.arm == arm:
                sample.recaptions = caption_audit_recaption.recaption_sample(context, sample.rows)
                result.device_seconds = sample.recaptions.seconds if sample.recaptions else None
    # Models raise errors of any class, and the lists can be judged without this one.
    except Exception as error:
        message = error_line(error)[:_MAX_CHARACTERS]
        context.reporter.info(f"the captioner couldn't be asked again: {message}")
        # The next run tries it once more.
        result.complete = False
        return {"trouble": message}
    return {}


def _texts(sample: _Sample) -> Iterable[str]:
    """Those that are compared by their vectors."""
    for changed in sample.changed_captions():
        yield from changed
    if recaptions := sample.recaptions:
        yield from sample.captions
        yield from filter(None, [*recaptions.captions.values(), recaptions.blank_caption])


def _vectors(context: RunContext, texts: Iterable[str]) -> dict[str, ndarray]:
    """Unit vectors by text, as items get theirs; none for a text that is empty once cleaned."""
    by_number = dict(enumerate(sorted(texts)))
    rows = [(str(number), "audit", text, "", False) for number, text in by_number.items()]
    schema = (
        "item_id STRING, representation STRING, text STRING, content_sha256 STRING, "
        "fallback BOOLEAN"
    )
    # A task loads the encoder, which takes longer than a few hundred texts.
    tasks = max(1, min(context.spark.sparkContext.defaultParallelism, len(rows) // 500))
    frame = context.spark.createDataFrame(rows, schema).coalesce(tasks)
    embeddings = embed.embed(frame, context.encoder_id(), context.config.embed)
    return {
        by_number[int(row["item_id"])]: np.asarray(row["embedding"], np.float32)
        for row in embeddings.select("item_id", "embedding").collect()
    }


def _judge(sample: _Sample, vectors: Mapping[str, ndarray], seed: int) -> _Judgment:
    captions = sample.captions
    catalogue = [{"category": row["category"], **(row["attributes"] or {})} for row in sample.rows]
    agreement, misses = metrics.agreement(captions, catalogue, seed)
    changed = sample.changed_captions()
    before = [pair.before for pair in changed]
    now = [pair.now for pair in changed]
    cosines = (_stacked(before, vectors) * _stacked(now, vectors)).sum(axis=1)
    figures = [
        metrics.distinct("distinct_share", len(set(captions)), len(captions)),
        metrics.distinct("distinct_share_all", sample.texts_total, sample.captions_total),
        *agreement,
        *metrics.drift(before, now, cosines, seed),
    ]
    if sample.recaptions:
        photos = _judge_photos(sample, sample.recaptions, vectors, seed)
        return _Judgment(figures + photos.figures, photos.examples)
    examples = [
        _example(sample, miss.index) | {"attribute": miss.attribute, "value": miss.value}
        for miss in metrics.spread(misses, _EXAMPLES)
    ]
    return _Judgment(figures, examples)


def _judge_photos(
    sample: _Sample, recaptions: Recaptions, vectors: Mapping[str, ndarray], seed: int
) -> _Judgment:
    """Whether captions come from the photos: by the blank photo, and by perturbed photos."""
    captions = sample.captions
    caption_vectors = _stacked(captions, vectors)
    figures = []
    if blank := recaptions.blank_caption:
        blank_vector = _stacked([blank], vectors)[0]
        figures += metrics.blank(captions, caption_vectors, blank, blank_vector, seed)
    positions = [
        position
        for position, row in enumerate(sample.rows)
        if row["caption_key"] in recaptions.captions
    ]
    texts = [recaptions.captions[sample.rows[position]["caption_key"]] for position in positions]
    text_vectors = _stacked([text or "" for text in texts], vectors)
    ranks = metrics.ranks(text_vectors, caption_vectors, np.array(positions))
    # A photo without a new caption has the last rank.
    ranks[[text is None for text in texts]] = len(captions)
    figures += metrics.retrieval(ranks, len(captions), seed)
    examples = []
    for worst in np.argsort(-ranks, kind="stable")[:_EXAMPLES]:
        if ranks[worst] > 1:
            text = texts[worst] and texts[worst][:_MAX_CHARACTERS]
            example = _example(sample, positions[worst])
            examples.append(example | {"second_caption": text, "rank": float(ranks[worst])})
    return _Judgment(figures, examples)


def _stacked(texts: Sequence[str], vectors: Mapping[str, ndarray]) -> ndarray:
    """(texts, dimension); zeros, which are close to nothing, for a text without a vector."""
    zeros = np.zeros_like(next(iter(vectors.values()), np.zeros(1, np.float32)))
    stacked = np.array([vectors.get(text, zeros) for text in texts], np.float32)
    return stacked.reshape(len(texts), len(zeros))


def _example(sample: _Sample, position: int) -> dict:
    row = sample.rows[position]
    return {
        "model": sample.arm,
        "item_id": row["item_id"],
        "position": row["position"],
        "caption": row["caption"][:_MAX_CHARACTERS],
    }


def _summary(sample: _Sample) -> dict:
    """What the report says of a captioner, next to its figures."""
    summary: dict = {
        "model": sample.arm,
        "captions": sample.captions_total,
        "sampled": len(sample.rows),
    }
    if sample.earlier:
        captioners = {f"{row['model']}, {row['prompt_id']}" for row in sample.earlier.values()}
        summary["earlier"] = sorted(captioners)[:_MAX_ARMS]
    if recaptions := sample.recaptions:
        summary |= {
            "recaptioned": len(recaptions.captions),
            "failures": dict(sorted(recaptions.failures.items())),
            "blank_caption": (recaptions.blank_caption or "")[:_MAX_CHARACTERS],
            "blank_error": recaptions.blank_error[:_MAX_CHARACTERS],
            "cost": round(recaptions.cost, 6),
        }
    return summary


def _message(sample: _Sample, figures: Sequence[Figure]) -> str:
    by_metric = {figure.metric: figure.value for figure in figures}
    distinct = by_metric["distinct_share_all"]
    total = f"{sample.captions_total:,} captions"
    parts = [
        f"{total}, too few for figures"
        if distinct is None
        else f"{distinct:.1%} of {total} are distinct"
    ]
    if by_metric.get("self_rank_10") is not None:
        parts.append(f"{by_metric['self_rank_10']:.1%} of photos find their captions again")
    if sample.recaptions and (failures := sample.recaptions.failures.total()):
        parts.append(
            f"{failures} of {len(sample.recaptions.captions)} gave no caption when asked again"
        )
    return f"captions by {sample.arm}: {', '.join(parts)}"
