"""Settings tuned on a validation split within the train events. The test part is never looked at.

One setting after another, each varied from the best so far. Embeddings, indexes and counts are
computed once. Knows arms and their recall; knows no file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from pyspark.sql import SparkSession

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation import splits
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.evaluate import (
    EvaluationTables,
    open_inputs,
    open_point_in_time,
)
from vlm4rec_spark.evaluation.inference import bootstrap_interval
from vlm4rec_spark.evaluation.list_batches import user_item_codes
from vlm4rec_spark.evaluation.metrics import hit_mask, per_user
from vlm4rec_spark.evaluation.point_in_time import PointInTime
from vlm4rec_spark.models.ranking.user_queries import Shape

Metric = Literal["ndcg", "recall"]
OPTIONS: dict[str, tuple[Any, ...]] = {
    "profiles.position_decay": (1.0, 0.98, 0.95, 0.9, 0.8, 0.65),
    "profiles.half_life_days": (None, 14.0, 60.0, 180.0),
    "profiles.last_n": (10, 20, 50, 200),
    "profiles.tastes": (2, 3, 5),
    "item_item.share": (0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
    "item_item.position_decay": (1.0, 0.95, 0.85, 0.7),
    "item_item.popularity_power": (0.0, 0.2, 0.35, 0.5),
    "item_item.distance_decay": (1.0, 0.8, 0.6),
}
"""The values that are tried of each setting."""
_SHARE_STEPS = (-0.1, -0.05, 0.05, 0.1)
"""The last trials: item_item.share close to the best one."""
_Candidate = tuple[str, ServingConfig]
"""Settings to try, and what they change."""


@dataclass(frozen=True)
class Trial:
    """Settings, and what their lists reach on the validation users at k."""

    description: str
    serving: ServingConfig
    recall: float
    ndcg: float
    low: float
    high: float
    """95 % over users, of the metric that is tuned."""
    seconds: float

    @property
    def blended(self) -> bool:
        return self.serving.item_item.share > 0


@dataclass
class Tuned:
    """All trials in their order; name, cut, users and candidates of the validation split."""

    split: str
    cut: str | None
    users: int
    candidates: int
    k: int
    metric: Metric
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        return self._best(self.trials)

    @property
    def best_content(self) -> Trial:
        return self._best([trial for trial in self.trials if not trial.blended])

    def value(self, trial: Trial) -> float:
        """The metric that is tuned."""
        return getattr(trial, self.metric)

    def _best(self, trials: Sequence[Trial]) -> Trial:
        # max takes the earlier of equals, which is the simpler.
        return max(trials, key=lambda trial: round(self.value(trial), 12))


def tune(
    spark: SparkSession,
    tables: EvaluationTables,
    settings: EvaluateSettings,
    serving: ServingConfig,
    representations: Sequence[str],
    metric: Metric,
    info: Callable[[str], None],
) -> Tuned:
    """Try settings on the validation split of the first split that `settings` names.

    Raises RunError if it has no test users.
    """
    with open_inputs(tables, settings, serving, set(representations)) as inputs:
        split = next(splits.of(inputs.log, settings))
        validation = splits.validation(split, settings.test_share)
        with open_point_in_time(spark, inputs, validation) as point_in_time:
            if point_in_time is None:
                raise RunError(
                    f"tune: the split {validation.name} has no test users. No user has a new item "
                    f"after {validation.cut or 'the first event'}, or no item has a vector in each "
                    f"of {', '.join(representations)}."
                )
            tuned = Tuned(
                validation.name,
                validation.cut,
                len(point_in_time.users),
                len(point_in_time.item_ids),
                settings.k,
                metric,
            )
            _search(point_in_time, tuned, representations, info)
    return tuned


def _search(
    point_in_time: PointInTime,
    tuned: Tuned,
    representations: Sequence[str],
    info: Callable[[str], None],
) -> None:
    relevant = user_item_codes(point_in_time.users["relevant"], point_in_time.item_ids)
    counts = np.bincount(relevant // tuned.candidates, minlength=tuned.users)
    planned = len(representations) * len(get_args(Shape)) + sum(map(len, OPTIONS.values()))
    started = time.monotonic()
    for description, serving in _candidates(tuned, point_in_time.serving, representations):
        if any(trial.serving == serving for trial in tuned.trials):
            continue
        tried_at = time.monotonic()
        top = point_in_time.lists(Arm("trial", "profiles", serving), tuned.k)
        values = per_user(hit_mask(top, relevant, tuned.candidates), counts, tuned.k)
        low, high = bootstrap_interval(values[tuned.metric], point_in_time.settings.seed)
        trial = Trial(
            description,
            serving,
            recall=float(values["recall"].mean()),
            ndcg=float(values["ndcg"].mean()),
            low=low,
            high=high,
            seconds=time.monotonic() - tried_at,
        )
        tuned.trials.append(trial)
        done = len(tuned.trials)
        pace = (time.monotonic() - started) / done
        info(
            f"trial {done}, {description}: recall {trial.recall:.4f}, ndcg {trial.ndcg:.4f}; "
            f"best {tuned.metric} {tuned.value(tuned.best):.4f}; {60 / pace:.1f} trials a minute, "
            f"about {max(planned - done, 0) * pace:.0f} s left"
        )


def _candidates(
    tuned: Tuned,
    serving: ServingConfig,
    representations: Sequence[str],
) -> Iterator[_Candidate]:
    """The settings to try next, by the trials so far."""
    content = serving.with_overrides(item_item={"share": 0.0})
    for name in representations:
        for shape in get_args(Shape):
            yield f"{name}, {shape}", content.with_overrides(name, {"shape": shape})
    # The two best so far: which of them is better may depend on the decay.
    for base in sorted(tuned.trials, key=tuned.value, reverse=True)[:2]:
        for description, candidate in _vary(base, "profiles.position_decay"):
            shape = base.serving.profiles.shape
            yield f"{base.serving.representation}, {shape}, {description}", candidate
    yield from _vary(tuned.best_content, "profiles.half_life_days")
    types = serving.profiles.event_weights
    if len(types) > 1:
        equal = {"event_weights": dict.fromkeys(types, 1.0)}
        yield "equal event weights", tuned.best_content.serving.with_overrides(profiles=equal)
    yield from _vary(tuned.best_content, "profiles.last_n")
    if tuned.best_content.serving.profiles.shape == "multi_taste":
        yield from _vary(tuned.best_content, "profiles.tastes")
    yield from _vary(tuned.best_content, "item_item.share")
    yield from _vary(tuned.best, "item_item.position_decay")
    yield from _vary(tuned.best, "item_item.popularity_power")
    yield from _vary(tuned.best, "item_item.distance_decay")
    share = tuned.best.serving.item_item.share
    close = [round(share + step, 2) for step in _SHARE_STEPS]
    yield from _vary(tuned.best, "item_item.share", [value for value in close if 0 < value < 1])


def _vary(
    base: Trial,
    name: str,
    values: Sequence[Any] | None = None,
) -> Iterator[_Candidate]:
    """The settings of `base` with each of the values, by default OPTIONS, of the setting
    `section.key`."""
    section, key = name.split(".")
    for value in OPTIONS[name] if values is None else values:
        changes: dict[str, Any] = {section: {key: value}}
        yield f"{name} {value}", base.serving.with_overrides(**changes)


def overrides(serving: ServingConfig) -> dict[str, Any]:
    """The settings as they are written in a configuration."""
    tuned = {"shape", "position_decay", "half_life_days", "last_n", "event_weights", "tastes"}
    return {
        "representation": serving.representation,
        "profiles": serving.profiles.model_dump(mode="json", include=tuned),
        "item_item": serving.item_item.model_dump(mode="json", exclude={"max_neighbors"}),
    }
