"""Metrics put in order for the page: the headline, charts and tables per split. Knows no HTML but
the charts' SVG."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm4rec_spark.report import caption_audit_section, charts
from vlm4rec_spark.report.charts import ForestPanel, SlicePanel
from vlm4rec_spark.report.data import (
    MetricRow,
    ReportData,
    arm_label,
)

ARMS = (
    "random",
    "popularity",
    "als",
    "cooccurrence",
    "title",
    "caption",
    "title_caption",
    "image",
    "fusion_average",
    "fusion_concat",
    "content",
    "blend",
    "oracle",
)
METRICS = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR", "hit_rate": "Hit rate"}
_PLOTTED = ("recall", "ndcg", "mrr")
_COMPARED = ("recall", "ndcg")
BEYOND = {
    "coverage": "Coverage",
    "gini": "Gini",
    "novelty": "Novelty, bits",
    "intra_list_distance": "Distance in a list",
    "near_duplicate_share": "Near-duplicates",
    "recall_shuffled": "Recall, shuffled items",
}
_SPLITS = {"time": "Split by time", "leave_one_out": "Leave one out"}
_FAMILIES = {
    "segment": "Segment",
    "history": "Items in the history",
    "last seen": "Days since the last event",
    "popularity": "Popularity of the chosen items, in tenths of all items",
    "items": "New items that were chosen",
    "category": "Category of the chosen items",
}
_MAX_LINES = 4
"""Arms in the charts by slice."""
_DEFAULT_K = 10
_Table = dict[str, dict[str, MetricRow]]
"""By arm and column."""


@dataclass(frozen=True)
class Headline:
    """Recall over all users of the served arm and of its control."""

    arm: MetricRow
    control: MetricRow

    @property
    def subject(self) -> str:
        """The arm and its verb, to begin a sentence with."""
        subject = {
            "caption": "Captions find",
            "title": "Titles find",
            "title_caption": "Titles and captions find",
        }
        return subject.get(self.arm.arm, f"{arm_label(self.arm.arm).capitalize()} finds")

    @property
    def separate(self) -> bool:
        """Whether the arm's interval lies above the control's."""
        if self.arm.low is None or self.control.high is None:
            return False
        return self.arm.low > self.control.high

    @property
    def ratio(self) -> float | None:
        if not self.arm.value or not self.control.value:
            return None
        return self.arm.value / self.control.value


@dataclass(frozen=True)
class SplitSection:
    """One split: charts as SVG ("" for none), and tables of arm -> column -> MetricRow."""

    title: str
    k: int
    facts: Mapping[str, Any]
    forest: str
    differences: str
    multiples: str
    accuracy: Mapping[str, Mapping[str, MetricRow]]
    beyond: Mapping[str, Mapping[str, MetricRow]]
    other_k: Mapping[str, Mapping[str, MetricRow]]
    served: str
    """The arm that ranks like the served lists."""
    control: str
    """The arm that the others are compared with; empty for none."""
    indistinct: tuple[str, ...]
    """Arms whose recall doesn't differ from the control's."""
    chance: float | None
    """Recall of a list drawn at random."""


def served_arm(data: ReportData) -> str:
    """The arm that ranks like the served lists: a blend, or the profiles' representation and
    shape."""
    if float(data.details("recommend").get("cooccurrence_share", 0)):
        return "blend"
    profiles = data.details("profiles")
    representation = profiles.get("representation", "caption")
    shape = profiles.get("shape", "mean")
    return representation if shape == "mean" else f"{representation}/{shape}"


def headline(data: ReportData) -> Headline | None:
    """From the first split, by time if there is one, that has a recall for both; None without
    any."""
    for split in _split_names(data.metrics):
        overall = _overall(data.metrics, split)
        recall = {row.arm: row for row in overall if row.metric == "recall"}
        arm = recall.get(served_arm(data))
        if arm is None:
            continue
        control = recall.get(arm.control or "popularity")
        if control is None or control is arm or None in (arm.value, control.value):
            continue
        return Headline(arm, control)
    return None


def splits(data: ReportData) -> list[SplitSection]:
    return [_section(data, split) for split in _split_names(data.metrics)]


def _section(data: ReportData, split: str) -> SplitSection:
    facts = data.splits.get(split, {})
    overall = _overall(data.metrics, split)
    k = overall[0].k if overall else 0
    rows = {(row.arm, row.metric): row for row in overall}
    arms = _sorted_arms({row.arm for row in overall})
    control = next((row.control for row in overall if row.p_value is not None), "")
    differing = [arm for arm in arms if _difference(rows.get((arm, "recall")))]
    served = served_arm(data)
    return SplitSection(
        title=_SPLITS.get(split, split.capitalize()),
        k=k,
        facts=facts,
        forest=_forest(rows, arms, served, {name: f"{METRICS[name]}@{k}" for name in _PLOTTED}),
        differences=_forest(
            {key: _difference(row) for key, row in rows.items()},
            differing,
            served,
            {name: f"{METRICS[name]}@{k}, less {arm_label(control)}" for name in _COMPARED},
        ),
        multiples=_multiples(data.metrics, overall, served, control),
        accuracy=_table(rows, arms, METRICS),
        beyond=_table(rows, arms, BEYOND),
        other_k=_other_lengths(data.metrics, split, arms, k),
        served=served,
        control=control,
        indistinct=tuple(arm for arm in differing if not rows[arm, "recall"].differs),
        chance=_chance(facts, k),
    )


def _chance(facts: Mapping[str, Any], k: int) -> float | None:
    candidates = facts.get("candidates")
    return min(1.0, k / candidates) if candidates else None


def _difference(row: MetricRow | None) -> MetricRow | None:
    return row.as_difference() if row and row.difference is not None else None


def _forest(
    rows: Mapping[tuple[str, str], MetricRow | None],
    arms: Sequence[str],
    served: str,
    titles: Mapping[str, str],
) -> str:
    """A panel for each metric of `titles` that any arm has."""
    panels = []
    for metric, title in titles.items():
        metrics = [rows.get((arm, metric)) for arm in arms]
        if any(metrics):
            panels.append(ForestPanel(title, metrics))
    return charts.forest(panels, arms, served) if panels else ""


def _table(
    rows: Mapping[tuple[str, str], MetricRow], arms: Sequence[str], columns: Mapping[str, str]
) -> _Table:
    """No rows if no arm has any of the columns."""
    table = {
        arm: {title: rows[arm, name] for name, title in columns.items() if (arm, name) in rows}
        for arm in arms
    }
    return table if any(table.values()) else {}


def _other_lengths(metrics: Sequence[MetricRow], split: str, arms: Sequence[str], k: int) -> _Table:
    """Recall and NDCG at the other list lengths, as columns."""
    rows = [
        row
        for row in metrics
        if row.split == split and row.slice == "all" and row.k != k and row.metric in _COMPARED
    ]
    rows.sort(key=lambda row: (row.k, _COMPARED.index(row.metric)))
    table: _Table = {arm: {} for arm in arms}
    for row in rows:
        if row.arm in table:
            table[row.arm][f"{METRICS[row.metric]}@{row.k}"] = row
    return table if any(table.values()) else {}


def _multiples(
    metrics: Sequence[MetricRow], overall: Sequence[MetricRow], served: str, control: str
) -> str:
    """Recall by slice of the served arm, the control and the best others but the oracle."""
    recall = {row.arm: row.value for row in overall if row.metric == "recall"}
    best = [arm for arm, value in recall.items() if value is not None and arm != "oracle"]
    best.sort(key=lambda arm: -(recall[arm] or 0))
    candidates = dict.fromkeys([served, control, *best])
    arms = [arm for arm in candidates if arm in recall][:_MAX_LINES]
    if not arms:
        return ""
    split = overall[0].split
    k = overall[0].k
    sliced = {
        (row.slice, row.arm): row
        for row in metrics
        if (row.split, row.metric, row.k) == (split, "recall", k) and row.slice != "all"
    }
    panels = [_slice_panel(sliced, family, arms) for family in _FAMILIES]
    shown = [
        panel
        for panel in panels
        if any(row and row.value is not None for line in panel.lines.values() for row in line)
    ]
    return charts.multiples(shown, served) if shown else ""


def _slice_panel(
    sliced: Mapping[tuple[str, str], MetricRow], family: str, arms: Sequence[str]
) -> SlicePanel:
    """The slices of a family, such as `history`, in their order, with their number of users."""
    names = {name for name, _ in sliced if name.startswith(f"{family} ")}
    ordered = sorted(names, key=_first_number)
    users = {
        name: "too few" if row.value is None else f"{row.users:,}"
        for (name, _), row in sliced.items()
    }
    labels = [
        name.removeprefix(f"{family} ").removesuffix(" of 10").removesuffix(" days")
        + f"\n{users[name]}"
        for name in ordered
    ]
    lines = {arm: [sliced.get((name, arm)) for name in ordered] for arm in arms}
    return SlicePanel(_FAMILIES[family], labels, lines)


def _first_number(slice_: str) -> tuple[int, str]:
    digits = re.search(r"\d+", slice_)
    return int(digits[0]) if digits else -1, slice_


def _overall(metrics: Sequence[MetricRow], split: str) -> list[MetricRow]:
    """The rows over all users of a split at k = 10, or at the longest k if 10 wasn't evaluated."""
    rows = [row for row in metrics if row.split == split and row.slice == "all"]
    lengths = {row.k for row in rows}
    k = _DEFAULT_K if _DEFAULT_K in lengths else max(lengths, default=0)
    return [row for row in rows if row.k == k]


def _split_names(metrics: Sequence[MetricRow]) -> list[str]:
    # Metrics of captions are no scores of lists: they are shown with the captions.
    names = {row.split for row in metrics} - {caption_audit_section.SPLIT}
    return sorted(names, key=_order(_SPLITS))


def _sorted_arms(arms: Iterable[str]) -> list[str]:
    by_name = _order(ARMS)
    by_shape = _order(())
    return sorted(arms, key=lambda arm: (by_name(arm.partition("/")[0]), by_shape(arm)))


def _order(names: Iterable[str]) -> Callable[[str], tuple[int, str, int, str]]:
    """A sort key: these names first, others alphabetically, numbers by size ("5-19" before
    "20+")."""
    rank = {name: number for number, name in enumerate(names)}

    def key(name: str) -> tuple[int, str, int, str]:
        number, _ = _first_number(name)
        return rank.get(name, len(rank)), name.rstrip("0123456789-+ "), number, name

    return key
