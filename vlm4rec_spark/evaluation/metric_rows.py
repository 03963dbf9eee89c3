"""Lists of arms to rows of `metrics`: values with intervals, paired differences, slices. numpy and
pandas only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from vlm4rec_spark.evaluation import guards
from vlm4rec_spark.evaluation.arms import EvaluateSettings
from vlm4rec_spark.evaluation.inference import holm, interval, paired_p_values, resampled_means
from vlm4rec_spark.evaluation.metrics import (
    ACCURACY,
    aggregate_diversity,
    beyond_accuracy,
    hit_mask,
    per_user,
)
from vlm4rec_spark.evaluation.slices import MIN_USERS, Slice

SLICED = ("recall", "ndcg")
SHUFFLED = "recall_shuffled"
_OPTIONAL = (
    "value",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
)
"""Columns that are null for too few users, or without a control."""


class _Key(NamedTuple):
    arm: str
    metric: str
    k: int


@dataclass(frozen=True)
class ArmLists:
    """Lists of the test users by arm, (users, longest) of positions, and their relevant items as
    sorted codes.

    vectors: float32 (items, dimension), the space in which diversity is measured; None for no such
    metric. user_counts: how many of `total_users` know each item.
    """

    lists: Mapping[str, ndarray]
    relevant: ndarray
    items: int
    user_counts: ndarray
    total_users: int
    vectors: ndarray | None

    @property
    def users(self) -> int:
        return len(next(iter(self.lists.values())))

    def hit_mask(
        self,
        arm: str,
        relevant: ndarray,
    ) -> ndarray:
        return hit_mask(self.lists[arm], relevant, self.items)

    def relevant_counts(self, relevant: ndarray) -> ndarray:
        """How many items are relevant to each user."""
        return np.bincount(relevant // self.items, minlength=self.users)


def rows(
    split: str,
    arm_lists: ArmLists,
    slices: Iterable[Slice],
    settings: EvaluateSettings,
) -> Iterator[dict]:
    """Rows of `metrics` without run_id. A user whose list has no hit counts 0."""
    yield from _overall(split, arm_lists, settings)
    for part in slices:
        relevant = arm_lists.relevant
        if part.items is not None:
            relevant = relevant[part.items[relevant % arm_lists.items]]
        counts = arm_lists.relevant_counts(relevant)
        members = part.users & (counts > 0)
        users = int(members.sum())
        keys = [_Key(arm, metric, settings.k) for arm in arm_lists.lists for metric in SLICED]
        if users < MIN_USERS:
            yield from (_row(split, key, users, part.name) for key in keys)
            continue
        columns = []
        for arm in arm_lists.lists:
            hits = arm_lists.hit_mask(arm, relevant)[members]
            member_metrics = per_user(hits, counts[members], settings.k)
            columns += [member_metrics[metric] for metric in SLICED]
        values = np.stack(columns, axis=1)
        low, high = interval(resampled_means(values, settings.seed))
        for column, key in enumerate(keys):
            estimate = _estimate(values[:, column].mean(), low[column], high[column])
            yield _row(split, key, users, part.name) | estimate


def shuffled_recall(arm_lists: ArmLists, settings: EvaluateSettings) -> dict[str, ndarray]:
    """By arm, each user's recall at k on shuffled items: chance, unless something leaks."""
    relevant = guards.shuffle_items(arm_lists.relevant, arm_lists.items, settings.seed)
    counts = arm_lists.relevant_counts(relevant)
    return {
        arm: per_user(arm_lists.hit_mask(arm, relevant), counts, settings.k)["recall"]
        for arm in arm_lists.lists
    }


def above_chance(arm_lists: ArmLists, settings: EvaluateSettings) -> list[str]:
    """Arms whose `shuffled_recall` exceeds chance."""
    return [
        arm
        for arm, recall in shuffled_recall(arm_lists, settings).items()
        if guards.above_chance(recall, settings.k, arm_lists.items)
    ]


def _overall(
    split: str,
    arm_lists: ArmLists,
    settings: EvaluateSettings,
) -> Iterator[dict]:
    columns = _user_metrics(arm_lists, settings)
    if arm_lists.users < MIN_USERS:
        yield from (_row(split, key, arm_lists.users) for key in columns)
        return
    values = np.stack(list(columns.values()), axis=1)
    resampled = resampled_means(values, settings.seed)
    users = (~np.isnan(values)).sum(axis=0)
    with np.errstate(invalid="ignore"):
        means = np.nansum(values, axis=0) / users
    low, high = interval(resampled)
    compared = _comparisons(
        list(columns),
        values,
        means,
        resampled,
        settings,
    )
    for column, key in enumerate(columns):
        row = _row(split, key, int(users[column]))
        if users[column]:
            row |= _estimate(means[column], low[column], high[column])
        yield row | compared.get(key, {})
    for arm, top in arm_lists.lists.items():
        for metric, value in aggregate_diversity(top[:, : settings.k], arm_lists.items).items():
            key = _Key(arm, metric, settings.k)
            yield _row(split, key, arm_lists.users) | {"value": value}


def _user_metrics(arm_lists: ArmLists, settings: EvaluateSettings) -> dict[_Key, ndarray]:
    """All metrics of single users: (users,) by arm, metric and length."""
    columns: dict[_Key, ndarray] = {}
    counts = arm_lists.relevant_counts(arm_lists.relevant)
    for arm, top in arm_lists.lists.items():
        hits = arm_lists.hit_mask(arm, arm_lists.relevant)
        for k in settings.lengths:
            for metric, values in per_user(hits, counts, k).items():
                columns[_Key(arm, metric, k)] = values
        if arm_lists.vectors is not None:
            novelty_and_diversity = beyond_accuracy(
                top[:, : settings.k],
                arm_lists.vectors,
                arm_lists.user_counts,
                arm_lists.total_users,
            )
            for metric, values in novelty_and_diversity.items():
                columns[_Key(arm, metric, settings.k)] = values
    for arm, values in shuffled_recall(arm_lists, settings).items():
        columns[_Key(arm, SHUFFLED, settings.k)] = values
    return columns


def _comparisons(
    keys: Sequence[_Key],
    values: ndarray,
    means: ndarray,
    resampled: ndarray,
    settings: EvaluateSettings,
) -> dict[_Key, dict]:
    """Differences to the control with p-values corrected for the number of arms; none if the
    control isn't an arm."""
    column = {key: number for number, key in enumerate(keys)}
    controls = [key for key in keys if key.arm == settings.control and key.metric in ACCURACY]
    pairs = [
        (key, control)
        for control in controls
        for key in keys
        if key[1:] == control[1:] and key != control
    ]
    if not pairs:
        return {}
    arms = [column[key] for key, _ in pairs]
    bases = [column[control] for _, control in pairs]
    low, high = interval(resampled[:, arms] - resampled[:, bases])
    raw = paired_p_values(values[:, arms] - values[:, bases], settings.seed)
    # Each metric at each length is one family of tests.
    p_values = [p_value for family in np.split(raw, len(controls)) for p_value in holm(family)]
    differences = means[arms] - means[bases]
    return {
        key: {
            "control": settings.control,
            "difference": float(differences[number]),
            "difference_low": float(low[number]),
            "difference_high": float(high[number]),
            "p_value": p_values[number],
        }
        for number, (key, _) in enumerate(pairs)
    }


def _estimate(
    value: float,
    low: float,
    high: float,
) -> dict[str, float]:
    return {"value": float(value), "low": float(low), "high": float(high)}


def _row(
    split: str,
    key: _Key,
    users: int,
    slice_: str = "all",
) -> dict:
    row = {"split": split, **key._asdict(), "slice": slice_, "users": users, "control": ""}
    return row | dict.fromkeys(_OPTIONAL)
