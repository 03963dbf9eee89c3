"""Metrics put in order for the page: the headline, charts and tables per split. Knows no HTML but the charts' SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlm4rec_spark.report import audit, charts
from vlm4rec_spark.report.data import Metric, ReportData, arm_name, figures

ARMS = ("random", "popularity", "title", "caption", "title_caption", "oracle")
METRICS = {"recall": "Recall", "ndcg": "NDCG", "hit_rate": "Hit rate"}
_SPLITS = {"time": "Split by time", "leave_one_out": "Leave one out"}


@dataclass(frozen=True)
class Headline:
    """What the arm in use scores against its control, on one metric and all users."""

    arm: Metric
    control: Metric

    @property
    def subject(self) -> str:
        """The arm and its verb, to begin a sentence with."""
        subject = {"caption": "Captions find", "title": "Titles find", "title_caption": "Titles and captions find"}
        return subject.get(self.arm.arm, f"{arm_name(self.arm.arm).capitalize()} finds")

    @property
    def apart(self) -> bool:
        low, high = self.arm.low, self.control.high
        return low is not None and high is not None and low > high

    @property
    def times(self) -> float | None:
        return self.arm.value / self.control.value if self.arm.value and self.control.value else None


@dataclass(frozen=True)
class Split:
    """One split: charts as (metric's name, SVG), and two tables of arm -> column -> Metric."""

    title: str
    k: int
    facts: Mapping[str, object]
    charts: tuple[tuple[str, str], ...]
    by_metric: Mapping[str, Mapping[str, Metric]]
    by_slice: Mapping[str, Mapping[str, Metric]]
    slices: Mapping[str, int]
    highlight: str
    compared: str | None
    """The arm that the others' p-values compare them with."""


def arm_in_use(data: ReportData) -> str:
    """The arm that production lists are made with: a blend, or representation and shape of the profiles."""
    lists = data.run("recommend")
    if lists and float(lists.details.get("cooccurrence_share", 0)):
        return "blend"
    profiles = data.run("profiles")
    details = profiles.details if profiles else {}
    shape = details.get("shape", "mean")
    return details.get("representation", "caption") + (f"/{shape}" if shape != "mean" else "")


def headline(data: ReportData) -> Headline | None:
    """Recall over all users of the arm in use against its control, by time if that was evaluated; None without both."""
    for split in _splits(data.metrics):
        rows = {metric.arm: metric for metric in _of(data.metrics, split) if metric.metric == "recall"}
        arm = rows.get(arm_in_use(data))
        control = rows.get((arm and arm.control) or "popularity")
        if arm and control and arm is not control and arm.value is not None and control.value is not None:
            return Headline(arm, control)
    return None


def splits(data: ReportData) -> list[Split]:
    evaluated = data.run("evaluate")
    return [
        _split(data.metrics, name, figures(evaluated.details.get(name)) if evaluated else {}, arm_in_use(data))
        for name in _splits(data.metrics)
    ]


def _split(metrics: Sequence[Metric], name: str, facts: Mapping[str, object], highlight: str) -> Split:
    overall = _of(metrics, name)
    k = overall[0].k if overall else 0
    arms = sorted({metric.arm for metric in overall}, key=_place(ARMS))
    names = sorted({metric.metric for metric in overall}, key=_place(METRICS))
    found = {(metric.arm, metric.metric): metric for metric in overall}
    sliced = [m for m in metrics if (m.split, m.metric, m.k) == (name, "recall", k) and m.slice != "all"]
    return Split(
        title=_SPLITS.get(name, name),
        k=k,
        facts=facts,
        charts=tuple(
            (METRICS.get(metric, metric), charts.intervals(
                [found[arm, metric] for arm in arms if (arm, metric) in found], highlight))
            for metric in names
        ),
        by_metric={arm: {METRICS.get(m, m): found[arm, m] for m in names if (arm, m) in found} for arm in arms},
        by_slice={arm: {m.slice: m for m in sliced if m.arm == arm} for arm in arms} if sliced else {},
        slices={m.slice: m.users for m in sorted(sliced, key=lambda m: _place([])(m.slice))},
        highlight=highlight,
        compared=next((m.control for m in overall if m.control and m.p_value is not None), None),
    )  # fmt: skip


def _of(metrics: Sequence[Metric], split: str) -> list[Metric]:
    """The rows over all users of a split, at 10 or else at the longest list that was judged."""
    rows = [metric for metric in metrics if metric.split == split and metric.slice == "all"]
    ks = {metric.k for metric in rows}
    k = 10 if 10 in ks else max(ks, default=0)
    return [metric for metric in rows if metric.k == k]


def _splits(metrics: Sequence[Metric]) -> list[str]:
    # Figures on captions, which are no scores of lists, stand with the captions.
    return sorted({metric.split for metric in metrics} - {audit.SPLIT}, key=_place(tuple(_SPLITS)))


def _place(order: Iterable[str]) -> Callable[[str], tuple[int, str, int, str]]:
    """A sort key: the known ones in their order, others by name after them; "5-19" before "20+"."""
    known = {name: place for place, name in enumerate(order)}

    def place(name: str) -> tuple[int, str, int, str]:
        digits = "".join(c if c.isdigit() else " " for c in name).split()
        return known.get(name, len(known)), name.rstrip("0123456789-+ "), int(digits[0]) if digits else -1, name

    return place
