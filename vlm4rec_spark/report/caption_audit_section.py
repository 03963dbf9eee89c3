"""The caption audit in plain words: each metric with its control, and what a good value looks like;
its examples.

Knows the metrics of split `captions` and evaluate's row of `state`; knows no HTML.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlm4rec_spark.report.data import AuditExample, MetricRow, ReportData
from vlm4rec_spark.report.thumbnails import PhotoKey, Thumbnails

SPLIT = "captions"


@dataclass(frozen=True)
class Check:
    """How a metric of the table is shown. `control` is the metric that it must exceed.

    With `lower` it must not exceed its control. A metric is a share, or a plain `number`.
    """

    metric: str
    what: str
    good: str
    control: str = ""
    control_name: str = ""
    lower: bool = False
    number: bool = False


@dataclass(frozen=True)
class AuditLine:
    """`doubtful` if the metric is no better than its control."""

    check: Check
    metric: MetricRow
    control: MetricRow | None
    doubtful: bool


@dataclass(frozen=True)
class Audit:
    """The audit of one captioner; `notes` are sentences."""

    model: str
    notes: tuple[str, ...]
    lines: tuple[AuditLine, ...]


_DISTINCT = (
    Check(
        "distinct_share",
        "Distinct captions, in the sample",
        "near 100 %: photos that share a caption can't be told apart",
    ),
    Check(
        "distinct_share_all",
        "Distinct captions, of all in force",
        "less in a large catalogue",
    ),
)
_RETRIEVAL_AND_DRIFT = (
    Check(
        "self_rank_1",
        "Photos that find their own caption first, described anew",
        "far above chance",
        "self_rank_1_chance",
        "chance",
    ),
    Check(
        "self_rank_10",
        "Photos that find their own caption in the top 10",
        "far above chance",
        "self_rank_10_chance",
        "chance",
    ),
    Check(
        "self_median_rank",
        "Median rank of a photo's own caption",
        "1 or a little more",
        "self_median_rank_chance",
        "chance",
        lower=True,
        number=True,
    ),
    Check(
        "blank_equal",
        "Captions that equal the caption of a blank photo",
        "0 %",
    ),
    Check(
        "blank_cosine",
        "Their similarity to that caption (cosine)",
        "no higher than the control",
        "pair_cosine",
        "two photos' captions",
        lower=True,
        number=True,
    ),
    Check(
        "drift_changed",
        "Captions that differ from the photo's earlier one",
        "as many as the change of model or prompt should change",
    ),
    Check(
        "drift_cosine",
        "Similarity of the two (cosine)",
        "near 1 if only words have changed",
        number=True,
    ),
)


class AuditExamples:
    """The examples of the latest evaluation; each needs its photo."""

    def __init__(self, audit: Mapping[str, Any]):
        self._examples = audit.get("examples") or []

    @property
    def photo_keys(self) -> list[PhotoKey]:
        return [(example["item_id"], example["position"]) for example in self._examples]

    def with_photos(self, thumbnails: Thumbnails) -> tuple[AuditExample, ...]:
        return tuple(
            AuditExample(
                thumbnails.photo(key, example["caption"]),
                *(example.get(name) for name in ("second_caption", "rank", "attribute", "value")),
            )
            for key, example in zip(self.photo_keys, self._examples, strict=True)
        )


def audits(data: ReportData) -> list[Audit]:
    """One per captioner, in the order of the run's details; none without any value."""
    summaries = data.caption_audit.get("captioners") or []
    captioners = {captioner["model"]: captioner for captioner in summaries}
    by_model: dict[str, dict[str, MetricRow]] = {}
    for row in data.metrics:
        if row.split == SPLIT and row.value is not None:
            by_model.setdefault(row.arm, {})[row.metric] = row
    order = [*captioners, *sorted(by_model.keys() - captioners.keys())]
    audits = [
        Audit(model, tuple(_notes(captioners.get(model, {}))), tuple(_lines(by_model[model])))
        for model in order
        if model in by_model
    ]
    return [audit for audit in audits if audit.lines]


def _notes(captioner: Mapping[str, Any]) -> Iterator[str]:
    if captioner.get("sampled"):
        sampled = captioner["sampled"]
        yield f"The sample is {sampled:,} of {captioner['captions']:,} captions in force."
    if recaptioned := captioner.get("recaptioned"):
        yield (
            f"The model described {recaptioned:,} of the photos a second time, mirrored and with "
            "their margins cut."
        )
    if failures := captioner.get("failures"):
        classes = ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in failures.items()
        )
        total = sum(failures.values())
        yield f"{total:,} of them got no caption then ({classes}) and count as not found."
    if captioner.get("blank_caption"):
        yield f"For a blank grey photo the model says: “{captioner['blank_caption']}”"
    elif captioner.get("blank_error"):
        yield "For a blank grey photo the model gives no caption, as it should."
    if earlier := captioner.get("earlier"):
        yield f"Earlier captions of these photos are by {'; '.join(earlier)}."


def _lines(metrics: Mapping[str, MetricRow]) -> Iterator[AuditLine]:
    attributes = sorted(name.partition("/")[2] for name in metrics if name.startswith("agreement/"))
    agreement = [
        Check(
            f"agreement/{attribute}",
            f"Captions that name the catalogue's {attribute}",
            "far above the control",
            f"agreement_shuffled/{attribute}",
            "captions of other photos",
        )
        for attribute in attributes
    ]
    for check in (*_DISTINCT, *agreement, *_RETRIEVAL_AND_DRIFT):
        if check.metric not in metrics:
            continue
        metric = metrics[check.metric]
        control = metrics.get(check.control)
        yield AuditLine(
            check,
            metric,
            control,
            doubtful=control is not None and not _passes(metric, control, check.lower),
        )


def _passes(metric: MetricRow, control: MetricRow, lower: bool) -> bool:
    """Whether the metric is clearly above its control; with `lower`, whether it isn't clearly
    above."""
    value = metric.value or 0
    limit = control.value or 0
    if metric.low is None or metric.value is None or control.value is None:
        return value < limit if lower else value > limit
    clearly_above = metric.low > (control.value if control.high is None else control.high)
    return clearly_above != lower
