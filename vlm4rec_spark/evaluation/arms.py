"""What is compared: every arm's lists for the same users, from the same candidates, with the same exclusions.

An arm named after a representation of `embeddings` runs through the ordinary index, profile and recommend functions,
with the profile shape that stands after a slash (`caption/max_similarity`) or else the mean. `random` and `popularity`
rank without vectors, `cooccurrence` by what is found together with the history; `blend` ranks as the lists in use are
ranked, with a share of it. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import cast, get_args

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.ranking import flat_exclusions, top_k
from vlm4rec_spark.models.tastes import Shape
from vlm4rec_spark.stages import cooccurrence, profiles

BASELINES = ("random", "popularity", "cooccurrence")
BLEND = "blend"


class EvaluateSettings(BaseModel):
    """Splits, arms and how much is judged; how many captions are looked at, and how many photos asked about again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    splits: tuple[str, ...] = ("time", "leave_one_out")
    cut: str | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    arms: tuple[str, ...] = ("random", "popularity", "title", "caption", "title_caption")
    control: str = "popularity"
    k: int = Field(10, ge=1)
    max_users: int = Field(100_000, ge=1)
    seed: int = 0
    audit_photos: int = Field(500, ge=0, le=5_000)
    audit_again: int = Field(0, ge=0, le=1_000)

    @field_validator("cut", mode="before")
    @classmethod
    def _time(cls, cut: object) -> object:
        # YAML reads 2025-05-01 as a date.
        if isinstance(cut, str):
            datetime.fromisoformat(cut)
        return str(cut) if isinstance(cut, date) else cut

    @field_validator("arms")
    @classmethod
    def _shaped(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            if "/" in arm and parts(arm)[1] not in get_args(Shape):
                raise ValueError(f"{arm}: after the slash stands a profile shape, {' or '.join(get_args(Shape))}")
        return arms

    @field_validator("splits")
    @classmethod
    def _known(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(splits) - {"time", "leave_one_out"}:
            raise ValueError(f"{', '.join(sorted(unknown))}: a split is time or leave_one_out")
        return splits


@dataclass(frozen=True)
class InUse:
    """The settings of the lists in use that an arm doesn't name itself."""

    representation: str
    profiles: profiles.ProfileSettings
    cooccurrence: cooccurrence.CooccurrenceSettings


def parts(arm: str) -> tuple[str, Shape]:
    """Representation and profile shape of an arm that has vectors."""
    representation, _, shape = arm.partition("/")
    return representation, cast(Shape, shape or "mean")


def needed(arms: tuple[str, ...], in_use: InUse) -> set[str]:
    """The representations of which the arms need vectors."""
    return {in_use.representation if arm == BLEND else parts(arm)[0] for arm in arms if arm not in BASELINES}


def candidates(embeddings: DataFrame, items: DataFrame, needed: set[str]) -> DataFrame:
    """item_id of the available items that every arm can rank: a real vector in each representation, no fallback."""
    real = embeddings.where(~F.col("fallback") & F.col("representation").isin(*needed))
    counted = real.groupBy("item_id").agg(F.countDistinct("representation").alias("there"))
    complete = counted.where(F.col("there") == len(needed))
    available = items.where("available").select("item_id")
    return available.join(complete, on="item_id", how="left_semi") if needed else available


def scored_lists(histories: DataFrame, scores: pd.Series, k: int, seed: int | None = None) -> DataFrame:
    """user_id, items: the k best of `scores` (by item_id, sorted) that the user hasn't seen.

    With a `seed` every user gets scores of their own, drawn from the seed and the user's id: the random arm.
    """
    ids, values = scores.index.to_numpy(str).astype(object), scores.to_numpy(np.float32)
    return histories.select("user_id", "seen").mapInPandas(
        _scorer(ids, values, k, seed), "user_id STRING, items ARRAY<STRING>"
    )


def _scorer(
    ids: np.ndarray, values: np.ndarray, k: int, seed: int | None
) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def rank(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        positions = pd.Index(ids)
        everything = np.arange(len(ids), dtype=np.int64)
        for batch in batches:
            for start in range(0, len(batch), 256):
                part = batch.iloc[start : start + 256]
                scores = np.broadcast_to(values, (len(part), len(ids)))
                if seed is not None:
                    scores = np.stack([_draw(user, seed, len(ids)) for user in part["user_id"]])
                seen = [positions.get_indexer(pd.Index(items, dtype=object)) for items in part["seen"]]
                top, _ = top_k(
                    np.broadcast_to(everything, scores.shape), scores, flat_exclusions(seen, len(ids)),
                    np.ones(len(ids), bool), k,
                )  # fmt: skip
                yield pd.DataFrame(
                    {"user_id": part["user_id"].to_numpy(), "items": [list(ids[row[row >= 0]]) for row in top]}
                )

    return rank


def _draw(user_id: str, seed: int, items: int) -> np.ndarray:
    return np.random.default_rng([seed, *user_id.encode()]).random(items, np.float32)
