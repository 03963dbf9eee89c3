"""Profiles to the k best items of every user: calibrates the search on a sample, then one pass.

Knows profiles, exclusions and explanations. Candidates and their order come from `models/ranking`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy import ndarray
from pydantic import Field, PositiveInt
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.calibration import Calibration, cheapest_effort
from vlm4rec_spark.models.ranking.event_weights import list_array
from vlm4rec_spark.models.ranking.list_rules import AVAILABLE, MAX_RULES, ListRules, Rule
from vlm4rec_spark.models.ranking.top_k import no_positions
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, RankedLists, recommend_lists
from vlm4rec_spark.models.ranking.user_queries import (
    MaxSimilarityQuery,
    MeanQuery,
    MultiTasteQuery,
    Queries,
    Shape,
)
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.sources.reader import Source

_MAX_TERMS = 3
_PAIRS_PER_BLOCK = 4_096
_PROFILE_COLUMNS = ("user_id", "embedding", "seen", "history", "segment", "rules", "only")
_ITEM_TYPE = (
    "STRUCT<item_id: STRING, score: DOUBLE, because_item_id: STRING, because_terms: ARRAY<STRING>, "
    "source: STRING, collapsed: ARRAY<STRING>>"
)
_LIST_SCHEMA = f"user_id STRING, items ARRAY<{_ITEM_TYPE}>, k INT, index_id STRING"


class RecommendSettings(Settings):
    """How many items, and how much of an exact search's list the approximate one must find."""

    k: int = Field(10, ge=1)
    target_recall: float = Field(0.95, gt=0, le=1)
    recall_sample: int = Field(1_000, ge=1)
    explain: bool = True
    popularity_fallback: bool = True
    rules: tuple[Rule, ...] = Field((), max_length=MAX_RULES)
    allow: Source = Source()
    deny: Source = Source()
    caps: dict[str, PositiveInt] = Field({})
    variants: tuple[Literal["parent", "photo"], ...] = ("parent", "photo")
    similarity_threshold: float | None = Field(None, ge=0, le=1)
    min_score: float | None = Field(None, ge=-1, le=1)
    diversity: float = Field(0.0, ge=0, lt=1)
    repeatable_events: tuple[str, ...] = ()
    repurchase_days: dict[str, PositiveInt] = Field({})


class Scoring(Protocol):
    """How items get their scores for a user.

    `sources` names the two score sources: content, and item-item scores. `by_history` is true if
    scores depend on single history items.
    """

    sources: ClassVar[tuple[str, str]]

    @property
    def by_history(self) -> bool: ...

    def queries(
        self,
        batch: pa.RecordBatch,
        searcher: Searcher,
        explain: bool = True,
    ) -> Queries: ...


@dataclass(frozen=True)
class ProfileScoring:
    """Scores items by the user's profile: its shape, and a share of item-item scores.

    max_tastes: into how many tastes the shape multi_taste divides a history at most.
    open_item_item: opens in a worker the scores that the driver has built.
    position_decay: for item-item scores, a history item weighs this much of the item after it.
    open_neighbors: saves searches for the shape max_similarity, and changes no list.
    """

    sources: ClassVar[tuple[str, str]] = ("content", "cooccurrence")

    shape: Shape = "mean"
    share: float = 0.0
    position_decay: float = 1.0
    open_item_item: Callable[[], ItemItemScores] | None = None
    max_tastes: int = 3
    open_neighbors: Callable[[], Neighbors] | None = None

    @property
    def by_history(self) -> bool:
        return self.shape != "mean" or self.share > 0

    def queries(
        self,
        batch: pa.RecordBatch,
        searcher: Searcher,
        explain: bool = True,
    ) -> Queries:
        """Queries of profiles that have a vector.

        Weights are those of `history`, divided by the user's largest. Without `explain` the queries
        may be unable to explain their items.
        """
        blended = self.share > 0 and self.open_item_item is not None
        if self.shape == "mean" and not blended and not explain:
            return MeanQuery(_vectors(batch.column("embedding")), None)
        positions, weights = _indexed_history(batch.column("history"), searcher)
        content = self._content_queries(batch, searcher, positions, weights)
        if not blended or self.open_item_item is None:
            return content
        decayed = []
        for user_weights in weights:
            decays = self.position_decay ** np.arange(len(user_weights))
            decayed.append(user_weights * decays)
        item_item = self.open_item_item()
        return BlendedQuery(content, item_item, self.share, positions, decayed)

    def _content_queries(
        self,
        batch: pa.RecordBatch,
        searcher: Searcher,
        positions: list[ndarray],
        weights: list[ndarray],
    ) -> Queries:
        if self.shape == "max_similarity":
            neighbors = self.open_neighbors() if self.open_neighbors else None
            single = [user_weights.astype(np.float32) for user_weights in weights]
            return MaxSimilarityQuery(positions, single, neighbors)
        if self.shape == "multi_taste":
            return MultiTasteQuery.from_histories(
                positions,
                weights,
                searcher,
                self.max_tastes,
            )
        return MeanQuery(_vectors(batch.column("embedding")), positions)


CONTENT = ProfileScoring()


@dataclass(frozen=True)
class _ListSpec:
    """What the lists of all users have in common."""

    list_rules: ListRules
    k: int
    effort: Effort | None
    scoring: Scoring
    explain: bool


def calibrate(
    searcher: Searcher,
    sample: pa.Table,
    list_rules: ListRules,
    k: int,
    promise: float,
    scoring: Scoring = CONTENT,
) -> Calibration:
    """Find the cheapest search with recall@k of at least `promise` on a sample of profiles.

    `sample` has embedding, history and seen, and optionally `rules` (bits). See
    `models/ranking/calibration.py`.
    """
    if not searcher.approximate or len(sample) == 0:
        return Calibration(None, 1.0, 1.0, len(sample))
    (batch,) = sample.combine_chunks().to_batches()
    queries = scoring.queries(batch, searcher)
    seen = _positions(batch.column("seen"), searcher)
    requests = ListRequests(queries, seen, _rule_bits(batch))
    return cheapest_effort(searcher, requests, list_rules, k, promise)


def all_items_except(searcher: Searcher, item_ids: Sequence[str]) -> ListRules:
    """All items of the index but these, with no rules and no groups."""
    allowed = np.full(len(searcher), AVAILABLE, np.int64)
    positions = searcher.positions(item_ids)
    allowed[positions[positions >= 0]] = 0
    return ListRules(allowed)


def recommend(
    profiles: DataFrame,
    open_searcher: Callable[[], Searcher],
    list_rules: ListRules,
    k: int,
    effort: Effort | None,
    scoring: Scoring = CONTENT,
    explain: bool = True,
) -> DataFrame:
    """user_id, items (in rank order), k and index_id of every profile with a vector.

    Rows without the column embedding need no vector. Optional columns of `profiles`: `rules` (bits
    of the user's rules), `only` (the items that the user may get; null: all) and `segment`.
    `effort` of None means exact search. With `explain` each item says because of which item.
    """
    rank = ranker(open_searcher, list_rules, k, effort, scoring, explain)
    if "embedding" in profiles.columns:
        profiles = profiles.where(F.col("embedding").isNotNull())
    columns = [name for name in _PROFILE_COLUMNS if name in profiles.columns]
    # Histories are most of what Spark sends to Python.
    if not explain and not scoring.by_history and "history" in columns:
        columns.remove("history")
    return profiles.select(*columns).mapInArrow(rank, _LIST_SCHEMA)


def ranker(
    open_searcher: Callable[[], Searcher],
    list_rules: ListRules,
    k: int,
    effort: Effort | None,
    scoring: Scoring,
    explain: bool,
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function from batches of profiles to batches of lists that `recommend` sends to workers.

    It can also run where the batches are.
    """
    spec = _ListSpec(list_rules, k, effort, scoring, explain)

    def rank(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        for batch in batches:
            if len(batch):
                yield _recommend_batch(batch, searcher, spec)

    return rank


def _recommend_batch(
    batch: pa.RecordBatch,
    searcher: Searcher,
    spec: _ListSpec,
) -> pa.RecordBatch:
    queries = spec.scoring.queries(batch, searcher, spec.explain)
    requests = ListRequests(
        queries,
        _positions(batch.column("seen"), searcher),
        _rule_bits(batch),
        _only(batch, searcher),
    )
    lists = recommend_lists(searcher, requests, spec.list_rules, spec.k, spec.effort)
    filled = lists.items >= 0
    columns = {
        "item_id": searcher.arrow_ids.take(lists.items[filled]),
        "score": lists.scores[filled],
        **_explanations(queries, lists.items, searcher, spec),
        "collapsed": _collapsed_ids(lists, searcher),
    }
    items = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    lengths = filled.sum(axis=1)
    users = len(batch)
    return pa.RecordBatch.from_pydict(
        {
            "user_id": batch.column("user_id"),
            "items": list_array(lengths, items),
            "k": np.full(users, spec.k, np.int32),
            "index_id": [searcher.index_id] * users,
        }
    )


def _explanations(
    queries: Queries,
    positions: ndarray,
    searcher: Searcher,
    spec: _ListSpec,
) -> dict[str, pa.Array]:
    """The columns because_item_id, because_terms and source of all list items.

    All are null or empty if the lists aren't to be explained. positions: (users, k), -1 for none.
    """
    filled = positions >= 0
    items = positions[filled]
    reasons = no_positions(items.shape)
    source = pa.nulls(len(items), pa.int64())
    if spec.explain:
        because, by_item_item = queries.explain(searcher, positions)
        reasons = because[filled]
        source = pa.array(by_item_item[filled].astype(np.int64))
    return {
        "because_item_id": searcher.arrow_ids.take(pa.array(reasons, mask=reasons < 0)),
        "because_terms": shared_terms(searcher, items, reasons),
        "source": pa.array(spec.scoring.sources).take(source),
    }


def _only(batch: pa.RecordBatch, searcher: Searcher) -> list[ndarray | None] | None:
    """Positions of the items that a user may get, None for users who may get all of them."""
    if "only" not in batch.schema.names:
        return None
    only = batch.column("only")
    if only.null_count == len(batch):
        return None
    restricted = only.is_valid().to_pylist()
    positions: list[ndarray | None] = []
    positions += _positions(only.fill_null([]), searcher)
    for user, is_restricted in enumerate(restricted):
        if not is_restricted:
            positions[user] = None
    return positions


def _collapsed_ids(lists: RankedLists, searcher: Searcher) -> pa.ListArray:
    """The ids of the items collapsed into each list item, best first."""
    filled = lists.items >= 0
    users, ranks, positions = lists.collapsed.T
    cells = users * filled.shape[1] + ranks
    order = np.argsort(cells, kind="stable")
    sizes = np.bincount(cells, minlength=filled.size)
    ids = searcher.arrow_ids.take(positions[order])
    return list_array(sizes[filled.ravel()], ids)


def shared_terms(
    searcher: Searcher,
    items: ndarray,
    reasons: ndarray,
) -> pa.ListArray:
    """The rarest words that the text of each item (position) shares with that of its reason.

    At most three words; none where the reason is -1.
    """
    terms = no_positions((len(items), _MAX_TERMS))
    counts = np.zeros(len(items), np.int64)
    for start in range(0, len(items), _PAIRS_PER_BLOCK):
        block = slice(start, start + _PAIRS_PER_BLOCK)
        item_words = searcher.words[items[block]]
        reason_words = searcher.words[reasons[block]]
        equal = item_words[:, :, None] == reason_words[:, None, :]
        shared = equal.any(axis=2)
        shared &= item_words >= 0
        shared[reasons[block] < 0] = False
        rank = np.cumsum(shared, axis=1) - 1
        listed = shared & (rank < _MAX_TERMS)
        rows, _ = np.nonzero(listed)
        ranks = rank[listed]
        terms[start + rows, ranks] = item_words[listed]
        counts[block] = listed.sum(axis=1)
    words = searcher.vocabulary.take(terms[terms >= 0])
    return list_array(counts, words)


def _indexed_history(
    history: pa.ListArray,
    searcher: Searcher,
) -> tuple[list[ndarray], list[ndarray]]:
    """Positions and weights of each user's history items that are in the index.

    Weights are divided by the user's largest.
    """
    entries = history.flatten()
    positions = _per_user(searcher.positions_of(entries.field("item_id")), history)
    weights = _per_user(np.asarray(entries.field("weight")), history)
    for user, user_positions in enumerate(positions):
        indexed = user_positions >= 0
        user_weights = weights[user][indexed]
        positions[user] = user_positions[indexed]
        # The smallest normal double: an empty history has no largest weight.
        weights[user] = user_weights / user_weights.max(initial=1e-300)
    return positions, weights


def _rule_bits(batch: pa.RecordBatch) -> ndarray:
    """int64 (users,)."""
    if "rules" not in batch.schema.names:
        return np.zeros(len(batch), np.int64)
    return batch.column("rules").to_numpy()


def _vectors(embedding: pa.ListArray) -> ndarray:
    """float32 (users, dimension)."""
    values = np.asarray(embedding.flatten(), np.float32)
    return values.reshape(len(embedding), -1)


def _positions(items: pa.ListArray, searcher: Searcher) -> list[ndarray]:
    return _per_user(searcher.positions_of(items.flatten()), items)


def _per_user(values: ndarray, lists: pa.ListArray) -> list[ndarray]:
    ends = np.cumsum(np.asarray(lists.value_lengths()))
    return np.split(values, ends)[:-1]
