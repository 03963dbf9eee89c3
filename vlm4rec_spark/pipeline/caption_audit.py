"""The caption audit, a part of evaluate: figures on a seeded sample of each captioner's captions in force.

Knows which tables the sample, the catalogue's word and earlier captions come from; `evaluation.audit` has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from vlm4rec_spark.errors import first_words
from vlm4rec_spark.evaluation import caption_metrics as figures
from vlm4rec_spark.evaluation.caption_metrics import Figure
from vlm4rec_spark.pipeline import caption_audit_questions
from vlm4rec_spark.pipeline.caption_audit_questions import Asked
from vlm4rec_spark.pipeline.context import RunContext, StageResult
from vlm4rec_spark.stages import embed
from vlm4rec_spark.storage import schemas

IMPORTED = "imported"
"""The arm of captions that were made elsewhere."""
_ARMS = 5
"""Captioners whose captions are in force together; more than two are rare."""
_EXAMPLES, _LONGEST = 12, 400


@dataclass
class _Sample:
    """Captions in force of one captioner, in the order of a hash: `rows` of how many, and all their distinct texts."""

    arm: str
    in_force: int
    texts: int
    rows: list[Row]
    earlier: dict[str, Row] = field(default_factory=dict)
    """By photo, the latest caption that it had before."""
    asked: Asked | None = None

    @property
    def captions(self) -> list[str]:
        return [row["caption"] for row in self.rows]

    @property
    def drifted(self) -> list[tuple[Row, Row]]:
        """Captions that a photo had before, with those that it has now."""
        return [
            (self.earlier[row["image_sha256"]], row)
            for row in self.rows
            if row["image_sha256"] in self.earlier
        ]


def audit(context: RunContext, result: StageResult) -> list[dict]:
    """Rows of `metrics` without run_id; `result.details` gets examples and texts. Nothing without any caption."""
    samples = _samples(context)
    if not samples:
        return []
    _add_earlier(context, samples)
    troubles = _ask(context, result, samples)
    texts = {text for sample in samples for text in _texts(sample)}
    vectors = _vectors(context, texts) if texts else {}
    rows, told, examples = [], [], []
    for sample in samples:
        found, few = _judge(sample, vectors, context.config.evaluate.seed)
        context.reporter.info(_words(sample, found))
        rows += [figure.row(sample.arm) for figure in found]
        told.append(_told(sample))
        examples += few
    result.details["caption_audit"] = json.dumps(
        {"captioners": told, "examples": examples[:_EXAMPLES]} | troubles, ensure_ascii=False
    )
    return rows


def inputs_fingerprint(context: RunContext) -> object:
    return [
        context.config.embed.model_dump(mode="json"),
        caption_audit_questions.inputs_fingerprint(context),
    ]


def _samples(context: RunContext) -> list[_Sample]:
    """Of each captioner as many captions as are to be looked at: the same photos whoever has described them."""
    settings = context.config.evaluate
    if not settings.audit_photos:
        return []
    links = (
        context.tables.read(schemas.ITEM_CAPTIONS)
        .groupBy("caption_key")
        .agg(F.min(F.struct("item_id", "position")).alias("place"))
    )
    captions = context.tables.read(schemas.CAPTIONS).where(F.col("caption").isNotNull())
    in_force = captions.join(links, on="caption_key", how="inner").select(
        "caption_key",
        "place.*",
        "image_sha256",
        "caption",
        F.coalesce("model", F.lit(IMPORTED)).alias("arm"),
    )
    # By 64 bits of its hash a text is known well enough, and a shuffle of hashes is a light one.
    texts = F.countDistinct(F.xxhash64("caption")).alias("texts")
    by_arm = in_force.groupBy("arm").agg(F.count(F.lit(1)).alias("captions"), texts)
    items = context.tables.read(schemas.ITEMS).select("item_id", "category", "attributes")
    order = F.xxhash64(F.coalesce("image_sha256", "item_id"), F.lit(settings.seed)).alias("order")
    samples = []
    for row in by_arm.orderBy(F.desc("captions"), "arm").limit(_ARMS).collect():
        mine = in_force.where(F.col("arm") == row["arm"]).select("*", order)
        few = mine.orderBy("order", "caption_key").limit(settings.audit_photos)
        found = few.join(items, on="item_id", how="left").collect()
        found.sort(key=lambda row: (row["order"], row["caption_key"]))
        samples.append(_Sample(row["arm"], row["captions"], row["texts"], found))
    return samples


def _add_earlier(context: RunContext, samples: Sequence[_Sample]) -> None:
    """What the sampled photos were called before: by another model, prompt or setting, and in force nowhere."""
    captions = context.tables.read(schemas.CAPTIONS).where(F.col("status") == "ok")
    old = captions.join(
        context.tables.read(schemas.ITEM_CAPTIONS), on="caption_key", how="left_anti"
    )
    latest = F.row_number().over(
        Window.partitionBy("image_sha256").orderBy(F.desc("captioned_at"), "caption_key")
    )
    for sample in samples:
        photos = [row["image_sha256"] for row in sample.rows if row["image_sha256"]]
        mine = old.where(F.col("image_sha256").isin(photos)).select(
            "image_sha256", "caption", "model", "prompt_id", latest.alias("nth")
        )
        sample.earlier = {
            row["image_sha256"]: row for row in mine.where(F.col("nth") == 1).collect()
        }


def _ask(context: RunContext, result: StageResult, samples: Sequence[_Sample]) -> dict[str, str]:
    """Ask the captioner again about its sample. What keeps it from answering is said, and costs nothing but figures."""
    if not context.config.evaluate.audit_again:
        return {}
    try:
        mine = context.config.caption.model.model_id()
        for sample in samples:
            if sample.arm == mine:
                sample.asked = caption_audit_questions.ask(context, sample.rows)
                result.device_seconds = sample.asked.seconds if sample.asked else None
    except (
        Exception
    ) as trouble:  # a model fails in ways of its own, and the lists can be judged without it
        said = first_words(trouble)[:_LONGEST]
        context.reporter.info(f"the captioner couldn't be asked again: {said}")
        result.complete = False  # the next run tries it once more
        return {"trouble": said}
    return {}


def _texts(sample: _Sample) -> Iterable[str]:
    """Those that are compared by their vectors."""
    for pair in sample.drifted:
        yield from (row["caption"] for row in pair)
    if sample.asked:
        yield from sample.captions
        yield from filter(None, [*sample.asked.said.values(), sample.asked.of_nothing])


def _vectors(context: RunContext, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Unit vectors by text, as items get theirs; none for a text that is empty once cleaned."""
    known = dict(enumerate(sorted(texts)))
    rows = [(str(number), "audit", text, "", False) for number, text in known.items()]
    frame = context.spark.createDataFrame(
        rows,
        "item_id STRING, representation STRING, text STRING, content_sha256 STRING, fallback BOOLEAN",
    )
    made = embed.embed(
        _in_tasks(context, frame, len(rows)), context.encoder_id(), context.config.embed
    )
    found = made.select("item_id", "embedding").collect()
    return {known[int(row["item_id"])]: np.asarray(row["embedding"], np.float32) for row in found}


def _in_tasks(context: RunContext, rows: DataFrame, count: int) -> DataFrame:
    # A task loads the encoder, which takes longer than a few hundred texts.
    return rows.coalesce(max(1, min(context.spark.sparkContext.defaultParallelism, count // 500)))


def _judge(
    sample: _Sample, vectors: Mapping[str, np.ndarray], seed: int
) -> tuple[list[Figure], list[dict]]:
    """The figures of a captioner, and examples of what is worst."""
    captions = sample.captions
    catalogue = [{"category": row["category"], **(row["attributes"] or {})} for row in sample.rows]
    found = [
        figures.distinct("distinct_share", len(set(captions)), len(captions)),
        figures.distinct("distinct_share_all", sample.texts, sample.in_force),
    ]
    agreeing, misses = figures.agreement(captions, catalogue, seed)
    pairs = sample.drifted
    before, now = ([pair[at]["caption"] for pair in pairs] for at in (0, 1))
    cosines = (_stacked(before, vectors) * _stacked(now, vectors)).sum(axis=1)
    found += [*agreeing, *figures.drift(before, now, cosines, seed)]
    if sample.asked is None:
        return found, [
            _example(sample, miss.index) | {"attribute": miss.attribute, "value": miss.value}
            for miss in figures.spread(misses, _EXAMPLES)
        ]
    more, examples = _judge_again(sample, sample.asked, vectors, seed)
    return found + more, examples


def _judge_again(
    sample: _Sample, asked: Asked, vectors: Mapping[str, np.ndarray], seed: int
) -> tuple[list[Figure], list[dict]]:
    captions, found = sample.captions, []
    known = _stacked(captions, vectors)
    if asked.of_nothing:
        nothing = _stacked([asked.of_nothing], vectors)[0]
        found += figures.blank(captions, known, asked.of_nothing, nothing, seed)
    places = [place for place, row in enumerate(sample.rows) if row["caption_key"] in asked.said]
    said = [asked.said[sample.rows[place]["caption_key"]] for place in places]
    ranks = figures.ranks(_stacked([text or "" for text in said], vectors), known, np.array(places))
    # No caption finds nothing.
    ranks[[text is None for text in said]] = len(captions)
    found += figures.retrieval(ranks, len(captions), seed)
    worst = [at for at in np.argsort(-ranks, kind="stable")[:_EXAMPLES] if ranks[at] > 1]
    return found, [
        _example(sample, places[at])
        | {"again": said[at] and said[at][:_LONGEST], "rank": float(ranks[at])}
        for at in worst
    ]


def _stacked(texts: Sequence[str], vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """(texts, dimension); zeros, which are near nothing, for a text without a vector."""
    none = np.zeros_like(next(iter(vectors.values()), np.zeros(1, np.float32)))
    return np.array([vectors.get(text, none) for text in texts], np.float32).reshape(
        len(texts), len(none)
    )


def _example(sample: _Sample, place: int) -> dict:
    row = sample.rows[place]
    return {
        "model": sample.arm,
        "item_id": row["item_id"],
        "position": row["position"],
        "caption": row["caption"][:_LONGEST],
    }


def _told(sample: _Sample) -> dict:
    """What there is to say of a captioner's sample beside the figures."""
    told: dict = {"model": sample.arm, "in_force": sample.in_force, "sampled": len(sample.rows)}
    if sample.earlier:
        told["earlier"] = sorted(
            {f"{row['model']}, {row['prompt_id']}" for row in sample.earlier.values()}
        )[:_ARMS]
    if asked := sample.asked:
        told |= {
            "asked": len(asked.said),
            "failures": dict(sorted(asked.failures.items())),
            "of_nothing": (asked.of_nothing or "")[:_LONGEST],
            "refused": asked.refused[:_LONGEST],
            "cost": round(asked.cost, 6),
        }
    return told


def _words(sample: _Sample, found: Sequence[Figure]) -> str:
    by_metric = {figure.metric: figure.value for figure in found}
    parts = [
        f"{by_metric['distinct_share_all']:.1%} of {sample.in_force:,} captions are distinct"
        if by_metric["distinct_share_all"] is not None
        else f"{sample.in_force} captions, too few for figures"
    ]
    if by_metric.get("self_rank_10") is not None:
        parts.append(f"{by_metric['self_rank_10']:.1%} of photos find theirs again")
    if sample.asked and sample.asked.failures:
        parts.append(
            f"{sample.asked.failures.total()} of {len(sample.asked.said)} gave no caption when asked again"
        )
    return f"captions by {sample.arm}: {', '.join(parts)}"
