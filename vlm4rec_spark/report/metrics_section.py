"""Metrics put in order for the page: the headline, charts and tables per split. Knows no HTML but the charts' SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlm4rec_spark.report import caption_audit_section, charts
from vlm4rec_spark.report.data import DiscordantUser, Metric, ReportData, arm_name, figures

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
BEYOND = {
    "coverage": "Coverage",
    "gini": "Gini",
    "novelty": "Novelty, bits",
    "intra_list_distance": "Distance in a list",
    "near_duplicate_share": "Near-duplicates",
    "recall_shuffled": "Recall, items exchanged",
}
_SPLITS = {"time": "Split by time", "leave_one_out": "Leave one out"}
_FAMILIES = {
    "segment": "Segment",
    "history": "Items in the history",
    "last seen": "Days since the last event",
    "popularity": "Popularity of what they chose, in tenths of the items",
    "items": "What they chose was new",
    "category": "Category of what they chose",
}
_LINES = 4


@dataclass(frozen=True)
class Headline:
    """What the arm in use scores against its control, on one metric and all users."""

    arm: Metric
    control: Metric

    @property
    def subject(self) -> str:
        """The arm and its verb, to begin a sentence with."""
        subject = {
            "caption": "Captions find",
            "title": "Titles find",
            "title_caption": "Titles and captions find",
        }
        return subject.get(self.arm.arm, f"{arm_name(self.arm.arm).capitalize()} finds")

    @property
    def apart(self) -> bool:
        low, high = self.arm.low, self.control.high
        return low is not None and high is not None and low > high

    @property
    def times(self) -> float | None:
        return (
            self.arm.value / self.control.value if self.arm.value and self.control.value else None
        )


@dataclass(frozen=True)
class SplitSection:
    """One split: charts as SVG ("" for none), tables of arm -> column -> Metric, users whom one arm served alone."""

    title: str
    k: int
    facts: Mapping[str, object]
    forest: str
    differences: str
    multiples: str
    by_metric: Mapping[str, Mapping[str, Metric]]
    beyond: Mapping[str, Mapping[str, Metric]]
    other_k: Mapping[str, Mapping[str, Metric]]
    apart: tuple[DiscordantUser, ...]
    highlight: str
    compared: str | None
    """The arm that the others are compared with."""
    unseen: tuple[str, ...]
    """Arms of which no difference from it is seen."""
    chance: float | None


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
        rows = {
            metric.arm: metric for metric in _of(data.metrics, split) if metric.metric == "recall"
        }
        arm = rows.get(arm_in_use(data))
        control = rows.get((arm and arm.control) or "popularity")
        if (
            arm
            and control
            and arm is not control
            and arm.value is not None
            and control.value is not None
        ):
            return Headline(arm, control)
    return None


def splits(data: ReportData) -> list[SplitSection]:
    evaluated = data.run("evaluate")
    return [
        _split(
            data, name, figures(evaluated.details.get(name)) if evaluated else {}, arm_in_use(data)
        )
        for name in _splits(data.metrics)
    ]


def _split(
    data: ReportData, name: str, facts: Mapping[str, object], highlight: str
) -> SplitSection:
    overall = _of(data.metrics, name)
    k = overall[0].k if overall else 0
    found = {(metric.arm, metric.metric): metric for metric in overall}
    base, shape = _place(ARMS), _place(())
    arms = sorted(
        {metric.arm for metric in overall},
        key=lambda arm: (base(arm.partition("/")[0]), shape(arm)),
    )
    compared = next((m.control for m in overall if m.control and m.p_value is not None), None)
    others = [arm for arm in arms if (arm, "recall_difference") in found]
    plotted = [metric for metric in _PLOTTED if any((arm, metric) in found for arm in arms)]
    panels = [
        (f"{METRICS[metric]}@{k}", [found.get((arm, metric)) for arm in arms]) for metric in plotted
    ]
    apart = [
        (
            f"{METRICS[metric]}@{k}, less {arm_name(compared or '')}",
            [found.get((arm, f"{metric}_difference")) for arm in others],
        )
        for metric in plotted[:2]
    ]
    candidates = facts.get("candidates")
    return SplitSection(
        title=_SPLITS.get(name, name.capitalize()),
        k=k,
        facts=facts,
        forest=charts.forest(panels, arms, highlight) if panels else "",
        differences=charts.forest(apart, others, highlight) if others else "",
        multiples=_multiples(data.metrics, name, k, found, highlight, compared),
        by_metric=_table(found, arms, METRICS),
        beyond=_table(found, arms, BEYOND),
        other_k=_lengths(data.metrics, name, arms, k),
        apart=tuple(each for each in data.apart if each.split == name),
        highlight=highlight,
        compared=compared,
        unseen=tuple(arm for arm in others if not _seen(found[arm, "recall_difference"])),
        chance=min(1.0, k / candidates) if isinstance(candidates, int) and candidates else None,
    )


def _table(
    found: Mapping[tuple[str, str], Metric], arms: Sequence[str], names: Mapping[str, str]
) -> dict[str, dict[str, Metric]]:
    """By arm and column; no rows where no arm has any of them."""
    table = {
        arm: {said: found[arm, name] for name, said in names.items() if (arm, name) in found}
        for arm in arms
    }
    return table if any(table.values()) else {}


def _lengths(
    metrics: Sequence[Metric], split: str, arms: Sequence[str], k: int
) -> dict[str, dict[str, Metric]]:
    """Recall and NDCG at the other lengths, as columns."""
    ours = [
        m
        for m in metrics
        if m.split == split and m.slice == "all" and m.k != k and m.metric in ("recall", "ndcg")
    ]
    ordered = sorted(ours, key=lambda m: (m.k, _place(tuple(METRICS))(m.metric)))
    table = {
        arm: {f"{METRICS[m.metric]}@{m.k}": m for m in ordered if m.arm == arm} for arm in arms
    }
    return table if any(table.values()) else {}


def _seen(difference: Metric) -> bool:
    """Whether a difference is one: its interval doesn't hold 0."""
    return (
        difference.low is not None
        and difference.high is not None
        and not difference.low <= 0 <= difference.high
    )


def _multiples(
    metrics: Sequence[Metric],
    split: str,
    k: int,
    found: Mapping[tuple[str, str], Metric],
    highlight: str,
    compared: str | None,
) -> str:
    """Recall by slice of the arm in use, its control and the best others."""
    sliced = {
        (m.slice, m.arm): m
        for m in metrics
        if (m.split, m.metric, m.k) == (split, "recall", k) and m.slice != "all"
    }
    recalls = [
        m
        for (arm, name), m in found.items()
        if name == "recall" and m.value is not None and arm != "oracle"
    ]
    by_recall = sorted(recalls, key=lambda m: -(m.value or 0))
    wanted = dict.fromkeys([highlight, compared or "", *(metric.arm for metric in by_recall)])
    arms = [arm for arm in wanted if (arm, "recall") in found][:_LINES]
    panels = []
    for family, title in _FAMILIES.items():
        names = sorted(
            {name for name, _ in sliced if name.startswith(f"{family} ")}, key=_first_number
        )
        lines = {arm: [sliced.get((name, arm)) for name in names] for arm in arms}
        if any(metric and metric.value is not None for line in lines.values() for metric in line):
            users = {
                name: m.users if m.value is not None else None for (name, _), m in sliced.items()
            }
            panels.append((title, [_labelled(name, family, users[name]) for name in names], lines))
    return charts.multiples(panels, highlight) if panels and arms else ""


def _first_number(slice_: str) -> tuple[int, str]:
    found = re.search(r"\d+", slice_)
    return int(found[0]) if found else -1, slice_


def _labelled(slice_: str, family: str, users: int | None) -> str:
    """The slice's name below the axis, and how many users are in it; None for too few."""
    name = slice_.removeprefix(f"{family} ").removesuffix(" of 10").removesuffix(" days")
    return f"{name}\n{'too few' if users is None else format(users, ',')}"


def _of(metrics: Sequence[Metric], split: str) -> list[Metric]:
    """The rows over all users of a split, at 10 or else at the longest list that was judged."""
    rows = [metric for metric in metrics if metric.split == split and metric.slice == "all"]
    ks = {metric.k for metric in rows}
    k = 10 if 10 in ks else max(ks, default=0)
    return [metric for metric in rows if metric.k == k]


def _splits(metrics: Sequence[Metric]) -> list[str]:
    # Figures on captions, which are no scores of lists, stand with the captions.
    return sorted(
        {metric.split for metric in metrics} - {caption_audit_section.SPLIT},
        key=_place(tuple(_SPLITS)),
    )


def _place(order: Iterable[str]) -> Callable[[str], tuple[int, str, int, str]]:
    """A sort key: the known ones in their order, others by name after them; "5-19" before "20+"."""
    known = {name: place for place, name in enumerate(order)}

    def place(name: str) -> tuple[int, str, int, str]:
        digits = "".join(c if c.isdigit() else " " for c in name).split()
        return (
            known.get(name, len(known)),
            name.rstrip("0123456789-+ "),
            int(digits[0]) if digits else -1,
            name,
        )

    return place
