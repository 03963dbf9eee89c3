"""What the report shows, as plain values: the seam between collecting (Spark) and rendering
(Jinja2).

Knows no DataFrame and no HTML. Everything is bounded and ordered, so equal tables give an equal
page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vlm4rec_spark.settings_base import Settings

if TYPE_CHECKING:
    from vlm4rec_spark.storage.state import CalibrationState


class ReportSettings(Settings):
    """Where the page goes, and how much it shows."""

    path: str = Field("report.html", min_length=1)
    users: int = Field(6, ge=0, le=100)
    """Users whose history and recommendations are shown; one of them has a short history."""
    photos: int = Field(24, ge=0, le=500)
    """Photos shown with their captions."""


@dataclass(frozen=True)
class StageRun:
    """The latest good run of a stage. `failed_since` is the time of a later run that failed."""

    stage: str
    run_id: str
    started_at: datetime
    seconds: float
    device_seconds: float | None = None
    rows_in: int = 0
    rows_ok: int = 0
    rows_failed: int = 0
    rows_skipped: int = 0
    versions: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    failed_since: datetime | None = None


@dataclass(frozen=True)
class SourceSummary:
    """The last run that took any rows of this source; read = taken + rejected + skipped."""

    name: str
    read: int
    taken: int
    rejected: int
    skipped: int
    ingested_at: datetime


@dataclass(frozen=True)
class Rejection:
    """How many rows of a source were rejected for one reason, with an example."""

    source: str
    reason: str
    rows: int
    example: str


@dataclass(frozen=True)
class PhotoCard:
    """An item's photo as a `data:` URI, or the problem with it, and the model's caption."""

    item_id: str
    title: str | None = None
    src: str | None = None
    problem: str = "no photo"
    caption: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    """The model's answers to a structured prompt, by name."""


@dataclass(frozen=True)
class CaptionFailure:
    """A photo without a caption, and why."""

    photo: PhotoCard
    error_class: str
    error: str


@dataclass(frozen=True)
class CaptionSummary:
    """How the captions in force were made, with examples."""

    statuses: Mapping[str, int] = field(default_factory=dict)
    failed_classes: Mapping[str, int] = field(default_factory=dict)
    samples: tuple[PhotoCard, ...] = ()
    failures: tuple[CaptionFailure, ...] = ()
    model_run: StageRun | None = None
    """The last run in which the model described photos."""
    covered: int = 0
    """Items that have a caption."""
    attributes: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """The commonest values of each attribute, with their number of photos."""


@dataclass(frozen=True)
class AuditExample:
    """A photo whose caption is in doubt.

    Either a second description differs (`second_caption`, None if there is none) and the photo's
    caption has this `rank`. Or the caption doesn't name the catalogue's value of an attribute.
    """

    photo: PhotoCard
    second_caption: str | None = None
    rank: float | None = None
    attribute: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class PhotoSummary:
    """The kinds of photos in a sample, and the contents that several items share."""

    sampled: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    shared_contents: int = 0
    shared_photos: int = 0


@dataclass(frozen=True)
class RecommendedItem:
    """A recommendation, the closest item of the history, and the variants that it stands for."""

    photo: PhotoCard
    score: float
    because: PhotoCard | None = None
    terms: tuple[str, ...] = ()
    collapsed: tuple[PhotoCard, ...] = ()


@dataclass(frozen=True)
class UserCard:
    """A user's list in rank order, and the latest of their `history_items`, latest first."""

    user_id: str
    history_items: int
    events: int
    history: tuple[PhotoCard, ...]
    recommended: tuple[RecommendedItem, ...]


@dataclass(frozen=True)
class MetricRow:
    """A row of the table `metrics`; value is None if the slice has too few users for a number."""

    split: str
    arm: str
    metric: str
    k: int
    slice: str
    value: float | None
    low: float | None
    high: float | None
    users: int
    control: str = ""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference to the control excludes 0."""
        if self.difference_low is None or self.difference_high is None:
            return False
        return not self.difference_low <= 0 <= self.difference_high

    def as_difference(self) -> MetricRow:
        """The difference to the control in place of the value."""
        return replace(
            self,
            value=self.difference,
            low=self.difference_low,
            high=self.difference_high,
        )


@dataclass(frozen=True)
class ReportData:
    """Everything on the page. `counts`: items, photos, captions, interactions, users with a
    list."""

    counts: Mapping[str, int] = field(default_factory=dict)
    runs: tuple[StageRun, ...] = ()
    sources: tuple[SourceSummary, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    photos: PhotoSummary = PhotoSummary()
    captions: CaptionSummary = CaptionSummary()
    audit_examples: tuple[AuditExample, ...] = ()
    users: tuple[UserCard, ...] = ()
    metrics: tuple[MetricRow, ...] = ()
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Facts about each split of the latest evaluation."""
    caption_audit: Mapping[str, Any] = field(default_factory=dict)
    calibration: CalibrationState | None = None

    @property
    def latest_at(self) -> datetime | None:
        return max((run.started_at for run in self.runs), default=None)

    def run(self, stage: str) -> StageRun | None:
        return next((run for run in self.runs if run.stage == stage), None)

    def details(self, stage: str) -> Mapping[str, str]:
        """The details of the stage's run; empty without a run."""
        run = self.run(stage)
        return run.details if run else {}


def arm_label(arm: str) -> str:
    """`title_caption/max_similarity` as people read it."""
    representation, _, shape = arm.partition("/")
    return ", ".join(filter(None, [representation.replace("_", " + "), shape.replace("_", " ")]))


def group_of_details(details: Mapping[str, str], group: str) -> dict[str, str]:
    """The figures of one group: `items.rejected` is `rejected` of `items`."""
    prefix = f"{group}."
    return {
        name.removeprefix(prefix): figure
        for name, figure in details.items()
        if name.startswith(prefix)
    }
