"""Lists of arms to rows of `metrics`: values with intervals, paired differences, slices. numpy and pandas only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vlm4rec_spark.evaluation import guards
from vlm4rec_spark.evaluation.arms import EvaluateSettings
from vlm4rec_spark.evaluation.inference import ends, holm, paired_p_values, resampled
from vlm4rec_spark.evaluation.metrics import ACCURACY, beyond_accuracy, hits, per_user, together
from vlm4rec_spark.evaluation.slices import LEAST_USERS, Slice

SLICED = ("recall", "ndcg")
DIFFERENCE = "_difference"
"""What stands after a metric's name where it is the arm's less its control's."""
SHUFFLED = "recall_shuffled"
_Key = tuple[str, str, int]
"""Arm, metric and length."""


@dataclass(frozen=True)
class Judged:
    """Lists of some users, (users, longest) of positions by arm, and what is relevant to them as sorted codes.

    vectors: float32 (items, dimension), in which lists are called diverse, None for no such figures. known_by: users of
    `everybody` who know each item.
    """

    lists: Mapping[str, np.ndarray]
    relevant: np.ndarray
    items: int
    known_by: np.ndarray
    everybody: int
    vectors: np.ndarray | None

    def found(self, arm: str, relevant: np.ndarray | None = None) -> np.ndarray:
        return hits(self.lists[arm], self.relevant if relevant is None else relevant, self.items)

    def sizes(self, relevant: np.ndarray | None = None) -> np.ndarray:
        """How many items are relevant to each user."""
        users = len(next(iter(self.lists.values())))
        return np.bincount(
            (self.relevant if relevant is None else relevant) // self.items, minlength=users
        )


def rows(
    split: str, judged: Judged, slices: Iterable[Slice], settings: EvaluateSettings
) -> Iterator[dict]:
    """Rows of `metrics` without run_id; a user counts 0 where a list finds nothing."""
    yield from _overall(split, judged, settings)
    for each in slices:
        yield from _sliced(split, judged, each, settings)


def shuffled(judged: Judged, settings: EvaluateSettings) -> dict[str, np.ndarray]:
    """By arm the recall at k of each user where the relevant items are exchanged for others: chance, if all is well."""
    relevant, k = guards.shuffled(judged.relevant, judged.items, settings.seed), settings.k
    sizes = judged.sizes()
    return {arm: per_user(judged.found(arm, relevant), sizes, k)["recall"] for arm in judged.lists}


def _overall(split: str, judged: Judged, settings: EvaluateSettings) -> Iterator[dict]:
    sizes, columns = judged.sizes(), dict[_Key, np.ndarray]()
    for arm, top in judged.lists.items():
        found = judged.found(arm)
        for k in settings.lengths:
            columns |= {
                (arm, metric, k): each for metric, each in per_user(found, sizes, k).items()
            }
        if judged.vectors is not None:
            short = top[:, : settings.k]
            told = beyond_accuracy(short, judged.vectors, judged.known_by, judged.everybody)
            columns |= {(arm, metric, settings.k): each for metric, each in told.items()}
    columns |= {
        (arm, SHUFFLED, settings.k): each for arm, each in shuffled(judged, settings).items()
    }
    if len(sizes) < LEAST_USERS:
        yield from (_row(split, key, len(sizes)) for key in columns)
        return
    values = np.stack(list(columns.values()), axis=1)
    means, place = resampled(values, settings.seed), {key: n for n, key in enumerate(columns)}
    low, high = ends(means)
    with np.errstate(invalid="ignore"):
        value = np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0)
    p_values = _against(values, place, settings)
    for key, n in place.items():
        if np.isnan(value[n]):
            yield _row(split, key, 0)
            continue
        row = _row(split, key, int((~np.isnan(values[:, n])).sum()))
        row |= {"value": float(value[n]), "low": float(low[n]), "high": float(high[n])}
        yield row | (
            {"control": settings.control, "p_value": p_values[key]} if key in p_values else {}
        )
    for arm, metric, k in p_values:
        mine, theirs = place[arm, metric, k], place[settings.control, metric, k]
        first, last = ends(means[:, [mine]] - means[:, [theirs]])[:, 0]
        yield _row(split, (arm, metric + DIFFERENCE, k), len(values)) | {
            "value": float(value[mine] - value[theirs]),
            "low": float(first),
            "high": float(last),
            "control": settings.control,
            "p_value": p_values[arm, metric, k],
        }
    for arm, top in judged.lists.items():
        for metric, figure in together(top[:, : settings.k], judged.items).items():
            yield _row(split, (arm, metric, settings.k), len(sizes)) | {"value": figure}


def _against(
    values: np.ndarray, place: Mapping[_Key, int], settings: EvaluateSettings
) -> dict[_Key, float]:
    """p-values of the arms against the control, corrected for the number of arms; none where it isn't among them."""
    corrected = dict[_Key, float]()
    for k in settings.lengths:
        for metric in ACCURACY:
            if (settings.control, metric, k) not in place:
                continue
            keys = [key for key in place if key[1:] == (metric, k) and key[0] != settings.control]
            control = values[:, place[settings.control, metric, k]]
            differences = values[:, [place[key] for key in keys]] - control[:, None]
            raw = paired_p_values(differences, settings.seed).tolist() if keys else []
            corrected |= dict(zip(keys, holm(raw), strict=True))
    return corrected


def _sliced(split: str, judged: Judged, part: Slice, settings: EvaluateSettings) -> Iterator[dict]:
    relevant = judged.relevant
    if part.items is not None:
        relevant = relevant[part.items[relevant % judged.items]]
    sizes = judged.sizes(relevant)
    members = part.users & (sizes > 0)
    users, keys = (
        int(members.sum()),
        [(arm, metric, settings.k) for arm in judged.lists for metric in SLICED],
    )
    if users < LEAST_USERS:
        yield from (_row(split, key, users, part.name) for key in keys)
        return
    columns = []
    for arm in judged.lists:
        # All of them are members' own: nobody else's have a size.
        found = per_user(judged.found(arm, relevant)[members], sizes[members], settings.k)
        columns += [found[metric] for metric in SLICED]
    values = np.stack(columns, axis=1)
    low, high = ends(resampled(values, settings.seed))
    for n, key in enumerate(keys):
        row = _row(split, key, users, part.name)
        yield row | {
            "value": float(values[:, n].mean()),
            "low": float(low[n]),
            "high": float(high[n]),
        }


def _row(split: str, key: _Key, users: int, slice_: str = "all") -> dict:
    arm, metric, k = key
    return {
        "split": split,
        "arm": arm,
        "metric": metric,
        "k": k,
        "slice": slice_,
        "users": users,
        "value": None,
        "low": None,
        "high": None,
        "control": None,
        "p_value": None,
    }
