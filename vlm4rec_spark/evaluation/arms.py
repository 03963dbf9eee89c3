"""What is compared: arms, each the configuration in use with something else in a few places. Knows names and settings.

An arm named after a representation of `embeddings` ranks by its vectors with the mean of the history; after a slash
stands another profile shape (`caption/max_similarity`). `fusion_average` and `fusion_concat` put the vectors of the
representation in use and of the photo together. `random`, `popularity` and `als` rank without content, `cooccurrence`
by what is found together with the history; `blend` ranks as the lists in use are ranked, with a share of it. Other arms
are defined in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlm4rec_spark.errors import UsageError, first_words
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.stages.profiles import ProfileSettings

BASELINES = ("random", "popularity", "als", "cooccurrence")
BLEND = "blend"
IMAGE = "image"
_SHARE = 0.4
"""Co-occurrence's share in the arm `blend` where the lists in use have none."""
_PLAIN = {"shape": "mean", "half_life_days": None, "position_decay": 1.0}
SHAPES: dict[str, dict[str, Any]] = {
    "mean": {"shape": "mean"},
    "plain_mean": {**_PLAIN, "event_weights": 1.0},
    "event_weighted": _PLAIN,
    "recency_time": {**_PLAIN, "half_life_days": 30.0},
    "recency_position": {**_PLAIN, "position_decay": 0.9},
    "max_similarity": {"shape": "max_similarity"},
    "multi_taste": {"shape": "multi_taste"},
}
"""What may stand after a slash, and what it changes in `profiles`; a single event weight is that of every type."""


def _average(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    if text.shape[1] != image.shape[1]:
        raise UsageError(
            f"evaluate.arms: fusion_average needs vectors of one length; those of the texts have "
            f"{text.shape[1]}, those of the photos {image.shape[1]}. Take fusion_concat."
        )
    return text + image


def _concatenation(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    return np.concatenate([text, image], axis=1)


FUSIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "fusion_average": _average,
    "fusion_concat": _concatenation,
}
"""Unit vectors of texts and photos, (items, dimension) each, to one vector per item, of any length. Learned ones have
their place here."""


class Overrides(BaseModel):
    """What an arm of the configuration's own has otherwise than the lists in use; anything else is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    representation: str | None = None
    profiles: dict[str, Any] = {}
    item_item: dict[str, Any] = {}

    @model_validator(mode="after")
    def _apply(self) -> Overrides:
        ProfileSettings(**self.profiles)
        ItemItemSettings(**self.item_item)
        return self


class EvaluateSettings(BaseModel):
    """Splits, arms and how much is judged; how many captions are looked at, and how many photos asked about again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    splits: tuple[str, ...] = ("time", "leave_one_out")
    cut: str | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    replay_cuts: int = Field(3, ge=2, le=50)
    arms: tuple[str, ...] = ("random", "popularity", "title", "caption", "title_caption")
    custom_arms: dict[str, Overrides] = {}
    control: str = "popularity"
    popularity_days: int | None = Field(None, ge=1)
    k: int = Field(10, ge=1)
    also_k: tuple[int, ...] = (5, 20)
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
            if "/" in arm and arm.partition("/")[2] not in SHAPES:
                raise ValueError(
                    f"{arm}: after the slash stands a profile shape, {' or '.join(SHAPES)}"
                )
        return tuple(dict.fromkeys(arms))

    @field_validator("splits")
    @classmethod
    def _known(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(splits) - {"time", "leave_one_out", "replay"}:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: a split is time, leave_one_out or replay"
            )
        return splits

    @field_validator("also_k")
    @classmethod
    def _positive(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if min(lengths, default=1) < 1:
            raise ValueError("a list has at least one item")
        return tuple(sorted(set(lengths)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """At how many items lists are judged, the shortest first."""
        return tuple(sorted({self.k, *self.also_k}))


@dataclass(frozen=True)
class ServingConfig:
    """The settings that the lists in use are made with."""

    representation: str
    profiles: ProfileSettings
    item_item: ItemItemSettings


@dataclass(frozen=True)
class Arm:
    """How an arm ranks, and for `matched` the settings that it does so by."""

    name: str
    ranks: Literal["random", "popularity", "als", "matched"]
    by: ServingConfig


def resolve(name: str, define: Mapping[str, Overrides], in_use: ServingConfig) -> Arm:
    """The arm of a name; one that is defined, or a representation, known or not, if it is none of ours."""
    if name in ("random", "popularity", "als"):
        return Arm(name, name, in_use)  # type: ignore[arg-type]
    if name in define:
        own = define[name]
        return Arm(
            name, "matched", changed(in_use, own.representation, own.profiles, own.item_item)
        )
    if name == "cooccurrence":
        return Arm(name, "matched", changed(in_use, item_item={"share": 1.0}))
    if name == BLEND:
        return Arm(
            name, "matched", changed(in_use, item_item={"share": in_use.item_item.share or _SHARE})
        )
    representation, _, shape = name.partition("/")
    shaped = dict(SHAPES[shape or "mean"])
    if "event_weights" in shaped:
        shaped["event_weights"] = dict.fromkeys(
            in_use.profiles.event_weights, shaped["event_weights"]
        )
    return Arm(name, "matched", changed(in_use, representation, shaped, {"share": 0.0}))


def changed(
    in_use: ServingConfig,
    representation: str | None = None,
    profiles: Mapping[str, Any] | None = None,
    item_item: Mapping[str, Any] | None = None,
) -> ServingConfig:
    """The settings with others in their place. Raises UsageError for values that don't go together."""
    try:
        return ServingConfig(
            representation or in_use.representation,
            ProfileSettings(**in_use.profiles.model_dump() | dict(profiles or {})),
            ItemItemSettings(**in_use.item_item.model_dump() | dict(item_item or {})),
        )
    except ValidationError as wrong:
        raise UsageError(f"an arm's settings don't go together: {first_words(wrong)}") from wrong


def vectors_of(representation: str, in_use: ServingConfig) -> set[str]:
    """The representations of `embeddings` that this one is made of."""
    return {in_use.representation, IMAGE} if representation in FUSIONS else {representation}


def needed(arms: Iterable[Arm], in_use: ServingConfig) -> set[str]:
    """The representations of which the arms need vectors."""
    return {
        name
        for arm in arms
        if arm.ranks == "matched" and arm.by.item_item.share < 1
        for name in vectors_of(arm.by.representation, in_use)
    }
