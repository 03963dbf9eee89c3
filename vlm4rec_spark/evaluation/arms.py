"""What is compared: arms. An arm is the serving configuration with a few settings replaced. Knows
names and settings.

An arm named after a representation of `embeddings` ranks by its vectors and the mean of the
history. A profile shape may follow a slash (`caption/max_similarity`). `fusion_average` and
`fusion_concat` combine the vectors of the served representation and of the photo. `random`,
`popularity` and `als` rank without content; `cooccurrence` ranks by what other histories hold
together. `blend` ranks like the served lists, with a share of co-occurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from pydantic import Field, ValidationError, field_validator, model_validator

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.stages.profiles import ProfileSettings

BASELINES = ("random", "popularity", "als", "cooccurrence")
BLEND = "blend"
IMAGE = "image"
_DEFAULT_BLEND_SHARE = 0.4
"""Co-occurrence's share in the arm `blend` if the served lists have none."""
_WITHOUT_DECAY = {"shape": "mean", "half_life_days": None, "position_decay": 1.0}
SHAPES: dict[str, dict[str, Any]] = {
    "mean": {"shape": "mean"},
    "plain_mean": {**_WITHOUT_DECAY, "event_weights": 1.0},
    "event_weighted": _WITHOUT_DECAY,
    "recency_time": {**_WITHOUT_DECAY, "half_life_days": 30.0},
    "recency_position": {**_WITHOUT_DECAY, "position_decay": 0.9},
    "max_similarity": {"shape": "max_similarity"},
    "multi_taste": {"shape": "multi_taste"},
}
"""What may follow the slash, and the `profiles` settings it replaces. A single event weight holds
for every type."""


def _average(text: ndarray, image: ndarray) -> ndarray:
    if text.shape[1] != image.shape[1]:
        raise UsageError(
            f"evaluate.arms: fusion_average needs vectors of one length. Texts have "
            f"{text.shape[1]} dimensions, photos {image.shape[1]}. Use fusion_concat."
        )
    return text + image


def _concatenation(text: ndarray, image: ndarray) -> ndarray:
    return np.concatenate([text, image], axis=1)


FUSIONS: dict[str, Callable[[ndarray, ndarray], ndarray]] = {
    "fusion_average": _average,
    "fusion_concat": _concatenation,
}
"""Combine unit vectors of texts and photos, both (items, dimension), to one vector per item, of any
length and dimension. Learned fusions belong here."""


class Overrides(Settings):
    """The settings that a custom arm replaces. All others are those of the served lists."""

    representation: str | None = None
    profiles: dict[str, Any] = Field({})
    item_item: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _check_sections(self) -> Overrides:
        ProfileSettings(**self.profiles)
        ItemItemSettings(**self.item_item)
        return self


class EvaluateSettings(Settings):
    """Splits, arms and limits of an evaluation, and the sizes of the caption audit."""

    splits: tuple[str, ...] = ("time", "leave_one_out")
    cut: str | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    arms: tuple[str, ...] = ("random", "popularity", "title", "caption", "title_caption")
    custom_arms: dict[str, Overrides] = Field({})
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
    def _check_cut(cls, cut: object) -> object:
        # YAML reads 2025-05-01 as a date.
        if isinstance(cut, str):
            datetime.fromisoformat(cut)
        return str(cut) if isinstance(cut, date) else cut

    @field_validator("arms")
    @classmethod
    def _check_shapes(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            _, slash, shape = arm.partition("/")
            if slash and shape not in SHAPES:
                raise ValueError(f"{arm}: a profile shape follows the slash: {' or '.join(SHAPES)}")
        return tuple(dict.fromkeys(arms))

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(splits) - {"time", "leave_one_out"}:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"{names}: a split is time or leave_one_out")
        return splits

    @field_validator("also_k")
    @classmethod
    def _check_lengths(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if min(lengths, default=1) < 1:
            raise ValueError("a list has at least one item")
        return tuple(sorted(set(lengths)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The list lengths at which metrics are computed, the shortest first."""
        return tuple(sorted({self.k, *self.also_k}))


@dataclass(frozen=True)
class ServingConfig:
    """The settings that the served lists are made with."""

    representation: str
    profiles: ProfileSettings
    item_item: ItemItemSettings

    def with_overrides(
        self,
        representation: str | None = None,
        profiles: Mapping[str, Any] | None = None,
        item_item: Mapping[str, Any] | None = None,
    ) -> ServingConfig:
        """A copy with these settings replaced. Raises UsageError for values that contradict each
        other."""
        try:
            return ServingConfig(
                representation or self.representation,
                ProfileSettings(**self.profiles.model_dump() | dict(profiles or {})),
                ItemItemSettings(**self.item_item.model_dump() | dict(item_item or {})),
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"the settings of an arm are invalid: {reason}") from error


@dataclass(frozen=True)
class Arm:
    """How an arm ranks. An arm that ranks by `profiles` does so with the settings in `serving`."""

    name: str
    ranking: Literal["random", "popularity", "als", "profiles"]
    serving: ServingConfig

    @property
    def needs_vectors(self) -> bool:
        return self.ranking == "profiles" and self.serving.item_item.share < 1


def resolve(
    name: str,
    custom_arms: Mapping[str, Overrides],
    serving: ServingConfig,
) -> Arm:
    """The arm of this name: a baseline, a custom arm, `blend`, or else a representation, which need
    not exist."""
    if name in ("random", "popularity", "als"):
        return Arm(name, name, serving)  # type: ignore[arg-type]
    if name in custom_arms:
        custom = custom_arms[name]
        settings = serving.with_overrides(custom.representation, custom.profiles, custom.item_item)
    elif name == "cooccurrence":
        settings = serving.with_overrides(item_item={"share": 1.0})
    elif name == BLEND:
        share = serving.item_item.share or _DEFAULT_BLEND_SHARE
        settings = serving.with_overrides(item_item={"share": share})
    else:
        representation, _, shape = name.partition("/")
        profiles = dict(SHAPES[shape or "mean"])
        if "event_weights" in profiles:
            types = serving.profiles.event_weights
            profiles["event_weights"] = dict.fromkeys(types, profiles["event_weights"])
        settings = serving.with_overrides(representation, profiles, {"share": 0.0})
    return Arm(name, "profiles", settings)


def required_representations(arms: Iterable[Arm], serving: ServingConfig) -> set[str]:
    """The representations whose vectors the arms need."""
    required = set()
    for arm in arms:
        if arm.needs_vectors and arm.serving.representation in FUSIONS:
            required |= {serving.representation, IMAGE}
        elif arm.needs_vectors:
            required.add(arm.serving.representation)
    return required
