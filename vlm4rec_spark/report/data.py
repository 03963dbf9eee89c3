"""What the report shows, as plain values: the seam between collecting (Spark) and rendering (Jinja2).

Knows no DataFrame and no HTML. Everything is bounded and in a fixed order, so that equal tables give an equal page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class ReportSettings(BaseModel):
    """Where the page goes, and how much it shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field("report.html", min_length=1)
    users: int = Field(6, ge=0, le=100)
    """Users whose history and recommendations are shown; one of them with a short history."""
    photos: int = Field(24, ge=0, le=500)
    """Photos shown beside their captions."""


@dataclass(frozen=True)
class StageRun:
    """The latest good run of a stage; `failed_since`: a later one that failed."""

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
    """What the last run that took any items, photos or interactions found; read = taken + rejected + skipped."""

    name: str
    read: int
    taken: int
    rejected: int
    skipped: int
    delivered_at: datetime


@dataclass(frozen=True)
class Rejection:
    """Rows of a source that were not taken for one reason, with one of them."""

    source: str
    reason: str
    rows: int
    example: str


@dataclass(frozen=True)
class ShownPhoto:
    """An item's photo as a `data:` URI, or what is wrong with it. The caption is what the model said of it."""

    item_id: str
    title: str | None = None
    src: str | None = None
    problem: str = "no photo"
    caption: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    """What a structured prompt was told of it, by name."""


@dataclass(frozen=True)
class Failure:
    """A photo without a caption, and why."""

    photo: ShownPhoto
    error_class: str
    error: str


@dataclass(frozen=True)
class Captions:
    """How the captions in force came about, with some of them."""

    statuses: Mapping[str, int] = field(default_factory=dict)
    failed_classes: Mapping[str, int] = field(default_factory=dict)
    samples: tuple[ShownPhoto, ...] = ()
    failures: tuple[Failure, ...] = ()
    worked: StageRun | None = None
    """The last run in which the model had something to do."""
    shortest: tuple[ShownPhoto, ...] = ()
    longest: tuple[ShownPhoto, ...] = ()
    covered: int = 0
    """Items that have a caption."""
    attributes: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """Of each attribute the commonest values, with the photos that have them."""


@dataclass(frozen=True)
class AuditExample:
    """A photo whose caption is in doubt: described `again` otherwise (None: not at all), its own caption at that rank;
    or its caption doesn't name what the catalogue says."""

    photo: ShownPhoto
    again: str | None = None
    rank: float | None = None
    attribute: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class SharedPhoto:
    """Identical bytes under several items."""

    photo: ShownPhoto
    other_item_id: str
    items: int


@dataclass(frozen=True)
class PhotoStock:
    """What kinds of photos there are, among `looked_at`, and which contents stand under several items."""

    looked_at: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    shared_contents: int = 0
    shared_photos: int = 0
    shared: tuple[SharedPhoto, ...] = ()


@dataclass(frozen=True)
class Recommended:
    """One recommendation, the history item that it is nearest to, and what shares its place."""

    photo: ShownPhoto
    score: float
    because: ShownPhoto | None = None
    terms: tuple[str, ...] = ()
    collapsed: tuple[ShownPhoto, ...] = ()


@dataclass(frozen=True)
class User:
    """A user's history, most recent first (`history_items` of them, some shown), and their list in rank order."""

    user_id: str
    history_items: int
    events: int
    history: tuple[ShownPhoto, ...]
    recommended: tuple[Recommended, ...]


@dataclass(frozen=True)
class Metric:
    """One row of the table `metrics`; value is None where the slice has too few users for a number."""

    split: str
    arm: str
    metric: str
    k: int
    slice: str
    value: float | None
    low: float | None
    high: float | None
    users: int
    control: str | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class DiscordantUser:
    """A user for whom the arm `by` found an item, at this rank, and `not_by` nothing, which recommended others."""

    split: str
    user_id: str
    by: str
    not_by: str
    rank: int
    found: ShownPhoto
    instead: tuple[ShownPhoto, ...] = ()


@dataclass(frozen=True)
class Setting:
    """A setting of the search that the calibration tried: recall, its lower 95 % bound, lists a second."""

    leaves: int
    candidates: int
    recall: float
    low: float
    per_second: float


@dataclass(frozen=True)
class RecallCurve:
    """What recommend tried before it took a search. `exact`: lists a second of exact search. `k`: of the recall.

    `taken`: None for exact search."""

    tried: tuple[Setting, ...]
    promise: float
    exact: float | None
    taken: Setting | None
    k: str


@dataclass(frozen=True)
class ReportData:
    """Everything on the page. `counts`: rows of items, photos, captions, interactions, users with a list."""

    counts: Mapping[str, int] = field(default_factory=dict)
    runs: tuple[StageRun, ...] = ()
    sources: tuple[SourceSummary, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    stock: PhotoStock = PhotoStock()
    captions: Captions = Captions()
    audit: tuple[AuditExample, ...] = ()
    users: tuple[User, ...] = ()
    metrics: tuple[Metric, ...] = ()
    apart: tuple[DiscordantUser, ...] = ()

    @property
    def latest_at(self) -> datetime | None:
        return max((run.started_at for run in self.runs), default=None)

    def run(self, stage: str) -> StageRun | None:
        return next((run for run in self.runs if run.stage == stage), None)


def arm_name(arm: str) -> str:
    """`title_caption/max_similarity` as people read it."""
    representation, _, shape = arm.partition("/")
    return ", ".join(filter(None, [representation.replace("_", " + "), shape.replace("_", " ")]))


def figures(text: str | None) -> dict[str, object]:
    """A structure out of `runs.details`; empty where there is none or it can't be read."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
