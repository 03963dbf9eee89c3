"""Settings chosen on a validation cut: one more cut of what is known before the test part, which is never looked at.

One kind of setting after another, each tried with the best of those before it. Embeddings, indexes and counts are made
once. Knows arms and what they find; knows no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from pyspark.sql import SparkSession

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.evaluation import splits
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig, changed
from vlm4rec_spark.evaluation.evaluate import (
    EvaluationTables,
    candidates,
    codes,
    open_point_in_time,
    without_bots,
)
from vlm4rec_spark.evaluation.inference import bootstrap_interval
from vlm4rec_spark.evaluation.metrics import hits, per_user
from vlm4rec_spark.evaluation.point_in_time import PointInTime
from vlm4rec_spark.models.ranking.user_queries import Shape

Metric = Literal["ndcg", "recall"]
_DECAYS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.65)
_HALF_LIVES = (None, 14.0, 60.0, 180.0)
_LAST = (10, 20, 50, 200)
_TASTES = (2, 3, 5)
_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
_SPOKEN = (1.0, 0.95, 0.85, 0.7)
_POWERS = (0.0, 0.2, 0.35, 0.5)
_APART = (1.0, 0.8, 0.6)


@dataclass(frozen=True)
class Trial:
    """Settings, as overrides by section, and what their lists reached on the validation users at k."""

    what: str
    in_use: ServingConfig
    recall: float
    ndcg: float
    low: float
    high: float
    """Of the metric that is chosen by, 95 % over users."""
    seconds: float

    @property
    def blended(self) -> bool:
        return self.in_use.item_item.share > 0


@dataclass
class Tuned:
    """All trials in their order; users and candidates that they were judged by, on a split of this name and cut."""

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

    def _best(self, trials: Sequence[Trial]) -> Trial:
        # Of equals the earlier one: it is the simpler.
        return max(
            trials,
            key=lambda trial: (round(getattr(trial, self.metric), 12), -self.trials.index(trial)),
        )


def tune(
    spark: SparkSession,
    tables: EvaluationTables,
    settings: EvaluateSettings,
    in_use: ServingConfig,
    representations: Sequence[str],
    metric: Metric,
    say: Callable[[str], None],
) -> Tuned:
    """Try settings on the validation cut of the first split that `settings` names.

    Raises RunError where nobody can be judged there.
    """
    log = without_bots(tables.interactions, in_use)
    complete = candidates(tables, set(representations)).persist()
    split = splits.validation(next(splits.of(log, settings)), settings.test_share)
    with open_point_in_time(spark, tables, complete, split, settings, in_use) as world:
        if world is None:
            raise RunError(
                f"tune: nobody can be judged on the split {split.name}: no user has a new item after "
                f"{split.cut or 'the first event'}, or no item a vector in each of "
                f"{', '.join(representations)}."
            )
        tried = Tuned(split.name, split.cut, len(world.users), len(world.items), settings.k, metric)
        _search(world, tried, in_use, representations, say)
    complete.unpersist()
    return tried


def _search(
    world: PointInTime,
    tried: Tuned,
    in_use: ServingConfig,
    representations: Sequence[str],
    say: Callable[[str], None],
) -> None:
    relevant = codes(world.users["relevant"], world.items)
    sizes = np.bincount(relevant // len(world.items), minlength=len(world.users))
    started = time.monotonic()
    for at_least, what, settings in _trials(tried, in_use, representations):
        if any(trial.in_use == settings for trial in tried.trials):
            continue
        clock = time.monotonic()
        found = hits(
            world.lists(Arm("trial", "matched", settings), tried.k), relevant, len(world.items)
        )
        values = per_user(found, sizes, tried.k)
        low, high = bootstrap_interval(values[tried.metric], world.settings.seed)
        seconds = time.monotonic() - clock
        tried.trials.append(
            Trial(
                what,
                settings,
                float(values["recall"].mean()),
                float(values["ndcg"].mean()),
                low,
                high,
                seconds,
            )
        )
        last, done = tried.trials[-1], len(tried.trials)
        pace = (time.monotonic() - started) / done
        say(
            f"trial {done}, {what}: recall {last.recall:.4f}, ndcg {last.ndcg:.4f}; best {tried.metric} "
            f"{getattr(tried.best, tried.metric):.4f}; {60 / pace:.1f} trials a minute, some {at_least * pace:.0f} s "
            "left"
        )


def _trials(
    tried: Tuned, in_use: ServingConfig, representations: Sequence[str]
) -> Iterator[tuple[int, str, ServingConfig]]:
    """How many more there are about, what is tried, and the settings; each by what the trials so far have found."""
    later = sum(map(len, (_DECAYS, _HALF_LIVES, _LAST, _SHARES, _SPOKEN, _POWERS, _APART))) + 2

    def each(
        what: str, options: Sequence[Any], section: str, left: int, content: bool = True
    ) -> Iterator[tuple[int, str, ServingConfig]]:
        base = tried.best_content if content else tried.best
        for place, option in enumerate(options):
            mine, together = (
                {what: option} if section == name else {} for name in ("profiles", "cooccurrence")
            )
            said = f"{section}.{what} {option}"
            yield left + len(options) - place, said, changed(base.in_use, None, mine, together)

    shapes = get_args(Shape)
    plain = changed(in_use, item_item={"share": 0.0})
    for place, (name, shape) in enumerate(
        (name, shape) for name in representations for shape in shapes
    ):
        left = later + len(representations) * len(shapes) - place
        yield left, f"{name}, {shape}", changed(plain, name, {"shape": shape})
    # The two best so far: which of them is better may depend on the decay.
    ranked = sorted(tried.trials, key=lambda trial: -getattr(trial, tried.metric))[:2]
    for base in ranked:
        for decay in _DECAYS:
            said = f"{base.in_use.representation}, {base.in_use.profiles.shape}, profiles.position_decay {decay}"
            yield later, said, changed(base.in_use, profiles={"position_decay": decay})
    left = later - len(_DECAYS)
    yield from each("half_life_days", _HALF_LIVES, "profiles", left := left - len(_HALF_LIVES))
    types = in_use.profiles.event_weights
    if len(types) > 1:
        flat = dict.fromkeys(types, 1.0)
        yield (
            left,
            "every event weighs 1",
            changed(tried.best_content.in_use, profiles={"event_weights": flat}),
        )
    yield from each("last_n", _LAST, "profiles", left := left - len(_LAST))
    if tried.best_content.in_use.profiles.shape == "multi_taste":
        yield from each("tastes", _TASTES, "profiles", left)
    yield from each("share", _SHARES, "cooccurrence", left := left - len(_SHARES))
    yield from each(
        "position_decay", _SPOKEN, "cooccurrence", left := left - len(_SPOKEN), content=False
    )
    yield from each(
        "popularity_power", _POWERS, "cooccurrence", left := left - len(_POWERS), content=False
    )
    yield from each("distance_decay", _APART, "cooccurrence", 2, content=False)
    share = tried.best.in_use.item_item.share
    near = [round(share + step, 2) for step in (-0.1, -0.05, 0.05, 0.1)]
    yield from each(
        "share", [each for each in near if 0 < each < 1], "cooccurrence", 0, content=False
    )


def overrides(settings: ServingConfig) -> dict[str, Any]:
    """The settings as a configuration says them."""
    profiles = settings.profiles.model_dump(
        mode="json",
        include={"shape", "position_decay", "half_life_days", "last_n", "event_weights", "tastes"},
    )
    together = settings.item_item.model_dump(mode="json", exclude={"max_neighbors"})
    return {
        "representation": settings.representation,
        "profiles": profiles,
        "item_item": together,
    }
