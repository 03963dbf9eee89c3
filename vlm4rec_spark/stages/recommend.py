"""Profiles to everybody's k best items: calibrate the search on this run's profiles, then one pass.

Knows exclusions, recall and reasons; candidates come from the searcher, the order from `models/ranking.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.calibration import Calibration, cheapest_effort
from vlm4rec_spark.models.ranking.list_rules import AVAILABLE, MAX_RULES, ListRules, Rule
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, recommend_lists
from vlm4rec_spark.models.ranking.user_queries import (
    MaxSimilarityQuery,
    MeanQuery,
    MultiInterestQuery,
    Queries,
    Shape,
)
from vlm4rec_spark.sources.reader import Source

_TERMS = 3
_PAIRS_AT_ONCE = 4_096


class RecommendSettings(BaseModel):
    """How many items, and how much of an exact search's list the approximate one must find."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(10, ge=1)
    target_recall: float = Field(0.95, gt=0, le=1)
    recall_sample: int = Field(1_000, ge=1)
    explain: bool = True
    popularity_fallback: bool = True
    rules: tuple[Rule, ...] = Field((), max_length=MAX_RULES)
    allow: Source = Source()
    deny: Source = Source()
    caps: dict[str, PositiveInt] = {}
    variants: tuple[Literal["parent", "photo"], ...] = ("parent", "photo")
    similarity_threshold: float | None = Field(None, ge=0, le=1)
    min_score: float | None = Field(None, ge=-1, le=1)
    diversity: float = Field(0.0, ge=0, lt=1)
    repeatable_events: tuple[str, ...] = ()
    repurchase_days: dict[str, PositiveInt] = {}


class Matches(Protocol):
    """How profiles are matched with items; `sources` says of what an item speaks without and with co-occurrence,
    `by_history` whether scores hang on the history itself."""

    sources: ClassVar[tuple[str, str]]

    @property
    def by_history(self) -> bool: ...

    def tastes(self, batch: pa.RecordBatch, searcher: Searcher, why: bool = True) -> Queries: ...


@dataclass(frozen=True)
class Matching:
    """How an item's score comes from a profile: the profile's shape, and the share that co-occurrence has.

    `opens` gives a worker the co-occurrence that the driver has built. There an item of the history weighs
    `position_decay` of the one after it, beyond what its weight says. `tastes_per_user`: into how many a history is
    divided at most, where the shape is multi_taste. `neighbours` spares max_similarity searches, and changes no list.
    """

    sources: ClassVar[tuple[str, str]] = ("content", "cooccurrence")

    shape: Shape = "mean"
    share: float = 0.0
    position_decay: float = 1.0
    opens: Callable[[], ItemItemScores] | None = None
    tastes_per_user: int = 3
    neighbors: Callable[[], Neighbors] | None = None

    @property
    def by_history(self) -> bool:
        return self.shape != "mean" or self.share > 0

    def tastes(self, batch: pa.RecordBatch, searcher: Searcher, why: bool = True) -> Queries:
        """Of profiles that have a vector; weights are those of `history` over its heaviest. Not `why`: for lists whose
        reasons nobody asks for."""
        blended = self.share > 0 and self.opens is not None
        if self.shape == "mean" and not blended and not why:
            return MeanQuery(_queries(batch.column("embedding")), None)
        history, flat = batch.column("history"), batch.column("history").flatten()
        positions = _per_user(searcher.positions_of(flat.field("item_id")), history)
        known = [mine >= 0 for mine in positions]
        positions = [mine[there] for mine, there in zip(positions, known, strict=True)]
        weights = _per_user(flat.field("weight").to_numpy(zero_copy_only=False), history)
        weights = [mine[there] for mine, there in zip(weights, known, strict=True)]
        weights = [mine / mine.max(initial=1e-300) for mine in weights]
        content: Queries = MeanQuery(_queries(batch.column("embedding")), positions)
        if self.shape == "max_similarity":
            near = self.neighbors() if self.neighbors else None
            content = MaxSimilarityQuery(
                positions, [mine.astype(np.float32) for mine in weights], near
            )
        elif self.shape == "multi_taste":
            content = MultiInterestQuery.from_histories(
                positions, weights, searcher, self.tastes_per_user
            )
        if not blended or self.opens is None:
            return content
        later = [mine * self.position_decay ** np.arange(len(mine)) for mine in weights]
        return BlendedQuery(content, self.opens(), self.share, positions, later)


CONTENT = Matching()


def calibrate(
    searcher: Searcher,
    sample: pa.Table,
    offer: ListRules,
    k: int,
    promise: float,
    matching: Matches = CONTENT,
) -> Calibration:
    """As `models/calibration.py` does, on `sample`: embedding, history and seen of some profiles, and `rules` where
    some apply to some of them."""
    if not searcher.approximate or len(sample) == 0:
        return Calibration(None, 1.0, 1.0, len(sample))
    (batch,) = sample.combine_chunks().to_batches()
    asked, excluded = matching.tastes(batch, searcher), _positions(batch.column("seen"), searcher)
    requests = ListRequests(asked, excluded, _rules(batch))
    return cheapest_effort(searcher, requests, offer, k, promise)


def without(searcher: Searcher, withdrawn: Sequence[str]) -> ListRules:
    """All items of the index but these, with no rule and no groups."""
    allowed = np.full(len(searcher), AVAILABLE, np.int64)
    positions = searcher.positions(withdrawn)
    allowed[positions[positions >= 0]] = 0
    return ListRules(allowed)


def recommend(
    profiles: DataFrame,
    open_searcher: Callable[[], Searcher],
    offer: ListRules,
    k: int,
    effort: Effort | None,
    matching: Matches = CONTENT,
    why: bool = True,
) -> DataFrame:
    """user_id, items, k and index_id of every profile that has a vector, or needs none; items in rank order, with the
    reason if `why`.

    profiles: as in the table, with these optional columns: `rules` (bits of the rules that apply to the user), `only`
    (the items that the user may get; null: all), `segment`.
    """

    def rank(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        for batch in batches:
            if len(batch):
                yield _ranked(batch, searcher, offer, k, effort, matching, why)

    rows = (
        profiles.where(F.col("embedding").isNotNull())
        if "embedding" in profiles.columns
        else profiles
    )
    # Histories are most of what goes to Python.
    spared = () if why or matching.by_history else ("history",)
    return rows.select(
        *(name for name in _ASKED if name in rows.columns and name not in spared)
    ).mapInArrow(rank, f"user_id STRING, items ARRAY<{_ITEM}>, k INT, index_id STRING")


_ASKED = ("user_id", "embedding", "seen", "history", "segment", "rules", "only")


_ITEM = (
    "STRUCT<item_id: STRING, score: DOUBLE, because_item_id: STRING, because_terms: ARRAY<STRING>, "
    "source: STRING, collapsed: ARRAY<STRING>>"
)


def _ranked(
    batch: pa.RecordBatch,
    searcher: Searcher,
    offer: ListRules,
    k: int,
    effort: Effort | None,
    matching: Matches,
    why: bool,
) -> pa.RecordBatch:
    asked, names = matching.tastes(batch, searcher, why), batch.schema.names
    excluded, only = _positions(batch.column("seen"), searcher), None
    if "only" in names and batch.column("only").null_count < len(batch):
        narrowed = batch.column("only").is_valid().to_numpy(zero_copy_only=False)
        mine = _positions(batch.column("only").fill_null([]), searcher)
        only = [items if has else None for items, has in zip(mine, narrowed, strict=True)]
    requests = ListRequests(asked, excluded, _rules(batch), only)
    top, scores, collapsed = recommend_lists(searcher, requests, offer, k, effort)
    kept = top >= 0
    because, together = np.full(top.shape, -1, np.int64), np.zeros(top.shape, bool)
    if why:
        because, together = asked.explain(searcher, top)
    chosen, reasons, together = top[kept], because[kept], together[kept]
    reason = searcher.arrow_ids.take(pa.array(reasons, mask=reasons < 0))
    spoke = pa.array(together.astype(np.int8), mask=np.full(len(together), not why))
    items = pa.StructArray.from_arrays(
        [
            searcher.arrow_ids.take(pa.array(chosen)),
            pa.array(scores[kept]),
            reason,
            shared_terms(searcher, chosen, reasons),
            pa.array(matching.sources).take(spoke),
            _hidden(collapsed, kept, searcher),
        ],
        names=["item_id", "score", "because_item_id", "because_terms", "source", "collapsed"],
    )
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    return pa.RecordBatch.from_arrays(
        [
            batch.column("user_id"),
            pa.ListArray.from_arrays(pa.array(offsets), items),
            pa.array(np.full(len(batch), k, np.int32)),
            pa.array([searcher.index_id] * len(batch)),
        ],
        names=["user_id", "items", "k", "index_id"],
    )


def _hidden(collapsed: np.ndarray, kept: np.ndarray, searcher: Searcher) -> pa.ListArray:
    """The ids of the items that each place hides, best first; kept: bool (users, k)."""
    users, places, items = collapsed.T
    cell = users * kept.shape[1] + places
    order = np.argsort(cell, kind="stable")
    sizes = np.bincount(cell, minlength=kept.size)[kept.ravel()]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), searcher.arrow_ids.take(pa.array(items[order]))
    )


def shared_terms(searcher: Searcher, items: np.ndarray, reasons: np.ndarray) -> pa.ListArray:
    """Of each item (position) the most telling words that its text shares with that of its reason; none where that is
    -1."""
    shared = np.full((len(items), _TERMS), -1, np.int64)
    count = np.zeros(len(items), np.int64)
    for start in range(0, len(items), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        mine, others = searcher.words[items[part]], searcher.words[reasons[part]]
        both = (
            (mine[:, :, None] == others[:, None, :]).any(axis=2)
            & (mine >= 0)
            & (reasons[part] >= 0)[:, None]
        )
        place = np.cumsum(both, axis=1) - 1
        rows, columns = np.nonzero(both & (place < _TERMS))
        shared[start + rows, place[rows, columns]] = mine[rows, columns]
        count[part] = both.sum(axis=1).clip(max=_TERMS)
    offsets = pa.array(np.concatenate([[0], np.cumsum(count)]).astype(np.int32))
    return pa.ListArray.from_arrays(
        offsets, searcher.vocabulary.take(pa.array(shared[shared >= 0]))
    )


def _rules(batch: pa.RecordBatch) -> np.ndarray:
    """int64 (users,)."""
    return (
        batch.column("rules").to_numpy()
        if "rules" in batch.schema.names
        else np.zeros(len(batch), np.int64)
    )


def _queries(embedding: pa.ListArray) -> np.ndarray:
    return np.asarray(embedding.flatten(), np.float32).reshape(len(embedding), -1)


def _positions(items: pa.ListArray, searcher: Searcher) -> list[np.ndarray]:
    return _per_user(searcher.positions_of(items.flatten()), items)


def _per_user(values: np.ndarray, lists: pa.ListArray) -> list[np.ndarray]:
    ends = np.cumsum(np.asarray(lists.value_lengths())).tolist()
    return [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
