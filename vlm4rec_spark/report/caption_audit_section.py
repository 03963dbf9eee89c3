"""The caption audit in plain words: each figure beside its control, and what a good one looks like; its examples.

Knows the metrics of split `captions` and the figures of evaluate; knows no HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlm4rec_spark.report.data import AuditExample, Metric, ReportData, StageRun, figures
from vlm4rec_spark.report.thumbnails import Album, Place

SPLIT = "captions"
_DETAILS = "caption_audit"


@dataclass(frozen=True)
class AuditLine:
    """A figure, as a share unless it is a `number`; `doubtful` where it isn't apart from its control."""

    what: str
    figure: Metric
    control: str
    good: str
    against: Metric | None = None
    number: bool = False
    doubtful: bool = False


@dataclass(frozen=True)
class Audit:
    """What was found of one captioner's captions; `notes` are sentences."""

    model: str
    notes: tuple[str, ...]
    lines: tuple[AuditLine, ...]


class AuditExamples:
    """The examples of the latest evaluation; each needs its photo."""

    def __init__(self, evaluated: StageRun | None):
        few = figures(evaluated.details.get(_DETAILS)).get("examples") if evaluated else None
        self._few = (
            [each for each in few if isinstance(each, dict)] if isinstance(few, list) else []
        )

    @property
    def places(self) -> list[Place]:
        return [(each["item_id"], each["position"]) for each in self._few]

    def shown(self, album: Album) -> tuple[AuditExample, ...]:
        return tuple(
            AuditExample(
                album.photo(place, each["caption"]),
                each.get("again"),
                each.get("rank"),
                each.get("attribute"),
                each.get("value"),
            )
            for place, each in zip(self.places, self._few, strict=True)
        )


def audits(data: ReportData) -> list[Audit]:
    """One for each captioner whose captions were looked at; none where there were too few for any figure."""
    evaluated = data.run("evaluate")
    told = figures(evaluated.details.get(_DETAILS)) if evaluated else {}
    by_model: dict[str, dict[str, Metric]] = {}
    for metric in data.metrics:
        if metric.split == SPLIT and metric.value is not None:
            by_model.setdefault(metric.arm, {})[metric.metric] = metric
    said = told.get("captioners")
    notes = (
        {str(each.get("model")): each for each in said if isinstance(each, dict)}
        if isinstance(said, list)
        else {}
    )
    found = [
        Audit(model, tuple(_notes(notes.get(model, {}))), lines)
        for model, metrics in by_model.items()
        if (lines := tuple(_lines(metrics)))
    ]
    order = list(notes)
    return sorted(
        found,
        key=lambda audit: (order.index(audit.model) if audit.model in notes else 99, audit.model),
    )


def trouble(data: ReportData) -> str:
    """Why the captioner couldn't be asked again; empty where it could, or wasn't to be."""
    evaluated = data.run("evaluate")
    return str(figures(evaluated.details.get(_DETAILS)).get("trouble", "")) if evaluated else ""


def _notes(told: Mapping[str, object]) -> Iterator[str]:
    if told.get("sampled"):
        yield f"{told['sampled']:,} of {told['in_force']:,} captions in force were looked at."
    if told.get("asked"):
        yield f"{told['asked']:,} of the photos were described a second time, mirrored and with their margins cut."
    failures = told.get("failures")
    if isinstance(failures, dict) and failures:
        classes = ", ".join(
            f"{str(name).replace('_', ' ')} {count:,}" for name, count in failures.items()
        )
        yield f"{sum(failures.values()):,} of them got no caption then ({classes}) and count as not found."
    if told.get("of_nothing"):
        yield f"Of a photo that shows nothing but grey the model says: “{told['of_nothing']}”"
    elif told.get("refused"):
        yield "Of a photo that shows nothing but grey the model gives no caption, as it should."
    earlier = told.get("earlier")
    if isinstance(earlier, list) and earlier:
        yield f"Earlier captions of these photos are by {'; '.join(map(str, earlier))}."


def _lines(by_name: Mapping[str, Metric]) -> Iterator[AuditLine]:
    def line(
        name: str,
        what: str,
        control: str,
        good: str,
        against: str = "",
        sign: int = 1,
        number: bool = False,
    ) -> Iterator[AuditLine]:
        if name in by_name:
            other = by_name.get(against)
            doubtful = other is not None and not _apart(by_name[name], other, sign)
            yield AuditLine(
                what, by_name[name], control if other else "", good, other, number, doubtful
            )

    yield from line(
        "distinct_share",
        "Distinct captions, of those looked at",
        "",
        "near 100 %: photos that share a caption can't be told apart",
    )
    yield from line(
        "distinct_share_all", "Distinct captions, of all in force", "", "less in a large catalogue"
    )
    for name in sorted(by_name):
        kind, _, attribute = name.partition("/")
        if kind == "agreement":
            yield from line(
                name,
                f"Captions that name the catalogue's {attribute}",
                "captions of other photos",
                "far above the control",
                f"agreement_shuffled/{attribute}",
            )
    asked = "Photos that find their own caption "
    yield from line(
        "self_rank_1",
        f"{asked}first, described anew",
        "chance",
        "far above chance",
        "self_rank_1_chance",
    )
    yield from line(
        "self_rank_10",
        f"{asked}among the nearest 10",
        "chance",
        "far above chance",
        "self_rank_10_chance",
    )
    yield from line(
        "self_median_rank",
        "Rank of a photo's own caption, the median",
        "chance",
        "1 or a little more",
        "self_median_rank_chance",
        -1,
        number=True,
    )
    yield from line(
        "blank_equal", "Captions that are just what is said of a photo of nothing", "", "0 %"
    )
    yield from line(
        "blank_cosine",
        "Their similarity to that text (cosine)",
        "two photos' captions",
        "no higher than the control",
        "pair_cosine",
        -1,
        number=True,
    )
    yield from line(
        "drift_changed",
        "Captions that have changed since the photo's earlier one",
        "",
        "as many as the change of model or prompt is meant for",
    )
    yield from line(
        "drift_cosine",
        "Similarity of the two (cosine)",
        "",
        "near 1 where only words have changed",
        number=True,
    )


def _apart(figure: Metric, control: Metric, sign: int) -> bool:
    """Whether the figure lies on the good side of its control: clearly above (1), or not clearly above (-1)."""
    if figure.low is None or figure.value is None or control.value is None:
        return (figure.value or 0) * sign > (control.value or 0) * sign
    above = figure.low > (control.value if control.high is None else control.high)
    return above if sign > 0 else not above
