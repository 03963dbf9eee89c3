"""Profiles to everybody's k best items: calibrate the search on this run's profiles, then one pass.

Knows exclusions, recall and reasons; candidates come from the searcher, the order from `models/ranking.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.models.cooccurrence import Cooccurrence
from vlm4rec_spark.models.ranking import SPARE, flat_exclusions, ordered, top_k
from vlm4rec_spark.models.searcher import Effort, Searcher
from vlm4rec_spark.models.tastes import Blend, Clusters, Histories, Means, Shape, Tastes

_TERMS = 3


class RecommendSettings(BaseModel):
    """How many items, and how much of an exact search's list the approximate one must find."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(10, ge=1)
    recall: float = Field(0.95, gt=0, le=1)
    recall_sample: int = Field(1_000, ge=1)


@dataclass(frozen=True)
class Calibration:
    """The search to use (None: exact) and the recall@k measured on `users` profiles with its lower 95 % bound."""

    effort: Effort | None
    recall: float
    low: float
    users: int

    def words(self, leaves: int) -> str:
        if self.effort is None:
            return "exact"
        return f"ScaNN, {self.effort.leaves} of {leaves} leaves, {self.effort.candidates} candidates"


@dataclass(frozen=True)
class Matching:
    """How an item's score comes from a profile: the profile's shape, and the share that co-occurrence has.

    `opens` gives a worker the co-occurrence that the driver has built. There an item of the history weighs
    `position_decay` of the one after it, beyond what its weight says. `tastes_per_user`: into how many a history is
    divided at most, where the shape is multi_taste.
    """

    shape: Shape = "mean"
    share: float = 0.0
    position_decay: float = 1.0
    opens: Callable[[], Cooccurrence] | None = None
    tastes_per_user: int = 3

    def tastes(self, batch: pa.RecordBatch, searcher: Searcher) -> Tastes:
        """Of profiles that have a vector; weights are those of `history` over its heaviest."""
        history, flat = batch.column("history"), batch.column("history").flatten()
        positions = _per_user(searcher.positions(flat.field("item_id").to_pylist()), history)
        known = [mine >= 0 for mine in positions]
        positions = [mine[there] for mine, there in zip(positions, known, strict=True)]
        weights = _per_user(flat.field("weight").to_numpy(zero_copy_only=False), history)
        weights = [mine[there] for mine, there in zip(weights, known, strict=True)]
        weights = [mine / mine.max(initial=1e-300) for mine in weights]
        content: Tastes = Means(_queries(batch.column("embedding")), positions)
        if self.shape == "max_similarity":
            content = Histories(positions, [mine.astype(np.float32) for mine in weights])
        elif self.shape == "multi_taste":
            content = Clusters.of(positions, weights, searcher, self.tastes_per_user)
        if not self.share or self.opens is None:
            return content
        later = [mine * self.position_decay ** np.arange(len(mine)) for mine in weights]
        return Blend(content, self.opens(), self.share, positions, later)


CONTENT = Matching()


def calibrate(
    searcher: Searcher, sample: pa.Table, eligible: np.ndarray, k: int, promise: float, matching: Matching = CONTENT
) -> Calibration:
    """The cheapest effort whose lower 95 % bound of recall@k against exact search holds the promise, on `sample`.

    `sample` holds embedding, history and seen of some profiles. Exact search when no effort holds it.
    """
    if not searcher.approximate or len(sample) == 0:
        return Calibration(None, 1.0, 1.0, len(sample))
    (batch,) = sample.combine_chunks().to_batches()
    asked, excluded = matching.tastes(batch, searcher), _positions(batch.column("seen"), searcher)
    truth, _ = best(searcher, asked, excluded, eligible, k, None)
    if (truth < 0).all():
        return Calibration(None, 1.0, 1.0, len(sample))
    leaves, candidates = max(1, searcher.manifest["leaves"] // 16), max(100, 10 * k)
    while leaves < searcher.manifest["leaves"]:
        effort = Effort(leaves, candidates)
        found, _ = best(searcher, asked, excluded, eligible, k, effort)
        shares = _recall(found, truth)
        low = shares.mean() - 1.96 * shares.std() / np.sqrt(len(shares))
        if low >= promise:
            return Calibration(effort, float(shares.mean()), float(low), len(shares))
        leaves, candidates = 2 * leaves, min(2 * candidates, len(searcher))
    return Calibration(None, 1.0, 1.0, len(sample))


def eligible_items(searcher: Searcher, withdrawn: Sequence[str]) -> np.ndarray:
    """bool (items,): False for the items that must not be recommended."""
    eligible = np.ones(len(searcher), bool)
    positions = searcher.positions(withdrawn)
    eligible[positions[positions >= 0]] = False
    return eligible


def best(
    searcher: Searcher, asked: Tastes, excluded: list[np.ndarray], eligible: np.ndarray, k: int, effort: Effort | None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Positions and scores (users, k) of the best eligible items, -1 and NaN only where the catalogue has no more.

    With an `effort`, candidates are over-fetched by the exclusions, and users who fall short are searched exactly.
    """
    tops, scores = [], []
    rows = asked.at_once(len(searcher)) if effort is None else 1_024
    for start in range(0, len(asked), rows):
        users = np.arange(start, min(start + rows, len(asked)))
        block, block_excluded = asked.part(users), excluded[start : start + rows]
        exclusions = flat_exclusions(block_excluded, len(searcher))
        if effort is None:
            found = block.exact(searcher)
        else:
            most = max(len(positions) for positions in block_excluded)
            found = block.search(searcher, Effort(effort.leaves, max(effort.candidates, k + most)))
        top, _ = top_k(*found, exclusions, eligible, k + SPARE)
        top, score = ordered(top, block.scores(searcher, top), k)
        short = np.flatnonzero(top[:, -1] < 0)
        if effort is not None and len(short):
            top[short], score[short] = best(
                searcher, block.part(short), [block_excluded[user] for user in short], eligible, k, None
            )
        tops.append(top)
        scores.append(score)
    return np.concatenate(tops), np.concatenate(scores)


def recommend(
    profiles: DataFrame, open_searcher: Callable[[], Searcher], withdrawn: Sequence[str], k: int,
    effort: Effort | None, matching: Matching = CONTENT,
) -> DataFrame:  # fmt: skip
    """user_id, items, k, index_id of every profile that has a vector; items in rank order with the reason."""

    def rank(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        eligible = eligible_items(searcher, withdrawn)
        for batch in batches:
            if len(batch):
                yield _ranked(batch, searcher, eligible, k, effort, matching)

    item = ("STRUCT<item_id: STRING, score: DOUBLE, because_item_id: STRING, because_terms: ARRAY<STRING>, "
            "source: STRING, collapsed: ARRAY<STRING>>")  # fmt: skip
    return (
        profiles.where(F.col("embedding").isNotNull())
        .select("user_id", "embedding", "seen", "history")
        .mapInArrow(rank, f"user_id STRING, items ARRAY<{item}>, k INT, index_id STRING")
    )


def _ranked(
    batch: pa.RecordBatch, searcher: Searcher, eligible: np.ndarray, k: int, effort: Effort | None, matching: Matching
) -> pa.RecordBatch:
    asked = matching.tastes(batch, searcher)
    top, scores = best(searcher, asked, _positions(batch.column("seen"), searcher), eligible, k, effort)
    kept = top >= 0
    because, together = np.full(top.shape, -1, np.int64), np.zeros(top.shape, bool)
    for user in np.flatnonzero(kept.any(axis=1)).tolist():
        because[user, kept[user]], together[user, kept[user]] = asked.reasons(user, searcher, top[user, kept[user]])
    chosen, reasons = top[kept], because[kept]
    terms = [shared_terms(searcher, item, reason) for item, reason in zip(chosen, reasons, strict=True)]
    items = pa.StructArray.from_arrays(
        [
            pa.array(searcher.ids[chosen], pa.string()),
            pa.array(scores[kept]),
            pa.array(searcher.ids[reasons], pa.string(), mask=reasons < 0),
            pa.array(terms, pa.list_(pa.string())),
            pa.array(np.where(together[kept], "cooccurrence", "content"), pa.string()),
            pa.array([[]] * len(chosen), pa.list_(pa.string())),
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


def shared_terms(searcher: Searcher, item: int, reason: int) -> list[str]:
    """The most telling words that the texts of both items hold; none without a reason."""
    if reason < 0:
        return []
    other = set(searcher.terms[reason])
    return [word for word in searcher.terms[item] if word in other][:_TERMS]


def _recall(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of each user's exact list that was found; users without a list are left out."""
    hits = (found[:, :, None] == truth[:, None, :]) & (truth[:, None, :] >= 0)
    length = (truth >= 0).sum(axis=1)
    return hits.any(axis=1).sum(axis=1)[length > 0] / length[length > 0]


def _queries(embedding: pa.ListArray) -> np.ndarray:
    return np.asarray(embedding.flatten(), np.float32).reshape(len(embedding), -1)


def _positions(items: pa.ListArray, searcher: Searcher) -> list[np.ndarray]:
    return _per_user(searcher.positions(items.flatten().to_pylist()), items)


def _per_user(values: np.ndarray, lists: pa.ListArray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(np.asarray(lists.value_lengths()))[:-1])
