"""Lists of arms as of a cut, by the stages' own functions. What several arms need is computed once.

Knows how the stages fit together and what is known at the cut. Knows no metric and nothing after
the cut.
"""

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation import als, splits
from vlm4rec_spark.evaluation.arm_indexes import NO_CONTENT, ArmIndexes
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.list_batches import (
    BatchFunction,
    Rows,
    map_batches,
    positions,
    rank_by_factors,
    rank_by_value,
    rank_histories,
    user_item_codes,
)
from vlm4rec_spark.evaluation.metrics import hit_mask, per_user
from vlm4rec_spark.evaluation.splits import Split
from vlm4rec_spark.models.index.build import build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import item_item, profiles, recommend
from vlm4rec_spark.stages.profiles import ProfileSettings

_ALS_SAMPLE = 2_000
"""Users, a seeded sample, on whose lists ALS is tuned."""
_ALS_FITS = 2
"""Fits at a time. A fit is many small jobs, between which the cores would wait."""
_DRIVER_SCORES = 2**26
"""Users x items up to which the driver ranks. Histories hold each item of a user once, so they are
a few hundred MB at most. One core scores so many pairs in seconds, and Spark needs as long to start
its tasks."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class EvaluationTables:
    """What an evaluation reads; embeddings hold one encoder per representation. users: user_id and
    segment, of those whose segment is known."""

    interactions: DataFrame
    items: DataFrame
    embeddings: DataFrame
    users: DataFrame


@dataclass
class PointInTime:
    """What is known at a cut. test_users: user_id, relevant. candidates: item_id; item_ids: the
    same, sorted."""

    spark: SparkSession
    tables: EvaluationTables
    candidates: DataFrame
    item_ids: pd.Index
    indexes: ArmIndexes
    split: Split
    test_users: DataFrame
    settings: EvaluateSettings
    serving: ServingConfig
    tuned: dict[str, object] = field(default_factory=dict)
    """The settings that arms have tuned on validation events, by arm."""
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    def lists(self, arm: Arm, k: int) -> np.ndarray:
        """Positions in `item_ids` of every test user's top k: (users, k) in the order of `users`,
        -1 past the end."""
        if arm.ranking == "profiles":
            lists = self._profile_lists(arm.serving, k)
        elif arm.ranking == "als":
            lists = self._als_lists(k)
        else:
            seed = self.settings.seed if arm.ranking == "random" else None
            popularity = self._of_candidates("events").astype(np.float32)
            rank = rank_by_value(self.item_ids, popularity, k, seed)
            lists = self._seen_lists(rank)
        return positions(lists, self.users["user_id"], self.item_ids, k)

    @cached_property
    def in_driver(self) -> bool:
        """Whether the driver ranks, which needs no task per arm. The lists are the same."""
        return len(self.relevant) * len(self.item_ids) <= _DRIVER_SCORES

    @cached_property
    def relevant(self) -> pd.DataFrame:
        """user_id, relevant, segment of the test users, by user_id."""
        segments = self.tables.users.select("user_id", "segment")
        rows = self.test_users.join(segments, on="user_id", how="left")
        users = cast(pd.DataFrame, rows.toPandas())
        return users.sort_values("user_id", ignore_index=True)

    @cached_property
    def users(self) -> pd.DataFrame:
        """The test users by user_id: relevant and seen (arrays of ids; seen of all items),
        last_event_at, segment."""
        rows = self.histories(self.serving.profiles).select(["user_id", "seen", "last_event_at"])
        table = rows if isinstance(rows, pa.Table) else rows.toArrow()
        histories = table.to_pandas()
        # The session's clock, as toPandas() has it.
        histories["last_event_at"] = histories["last_event_at"].dt.tz_localize(None)
        users = self.relevant.merge(histories, on="user_id", how="left")
        users["seen"] = users["seen"].where(users["seen"].notna(), None)
        return users

    def histories(self, settings: ProfileSettings) -> Rows:
        """The test users' histories, as `profiles.histories` makes them."""

        def compute() -> Rows:
            histories = profiles.summed_histories(self._events(settings), settings)
            return histories.toArrow() if self.in_driver else histories.persist()

        # Neither setting changes a history.
        key = settings.model_dump_json(exclude={"shape", "tastes"})
        return self._cached(("histories", key), compute)

    def _events(self, settings: ProfileSettings) -> DataFrame:
        """The test users' train events, weighted."""

        def compute() -> DataFrame:
            test_users = self.test_users.select("user_id")
            events = self.split.train.join(test_users, on="user_id", how="left_semi")
            return self._weighted(events, settings).persist()

        summed = {"half_life_days", "position_decay", "last_n", "min_items"}
        key = settings.model_dump_json(exclude={"shape", "tastes"} | summed)
        return self._cached(("events", key), compute)

    def _weighted(self, events: DataFrame, settings: ProfileSettings) -> DataFrame:
        # The log has no bots already.
        if settings.bot_events_per_day < self.serving.profiles.bot_events_per_day:
            events = profiles.without_bots(events, settings.bot_events_per_day)
        return profiles.weighted_events(events, self.tables.items, settings)

    @property
    def user_counts(self) -> np.ndarray:
        """How many users know each candidate, int64 (items,)."""
        return self._of_candidates("users")

    @property
    def total_users(self) -> int:
        return int(self._counts["users"][self._counts.index.isna()].sum())

    def close(self) -> None:
        """Release what Spark has cached."""
        for value in self._cache.values():
            if isinstance(value, DataFrame):
                value.unpersist()
        self._cache.clear()

    def _cached(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @cached_property
    def _counts(self) -> pd.DataFrame:
        """By item_id, of each candidate: users who know it, and events in the last popularity_days
        before the cut. The row without an id counts the users of all items."""
        train = self.split.train
        counted = F.lit(1)
        if days := self.settings.popularity_days:
            last_event = train.agg(F.max("event_time")).first()[0]  # type: ignore[index]
            end = F.to_timestamp(F.lit(self.split.cut)) if self.split.cut else F.lit(last_event)
            start = end - F.make_interval(days=F.lit(days))
            counted = F.when(F.col("event_time") >= start, 1)
        users = F.countDistinct("user_id").alias("users")
        counts = train.rollup("item_id").agg(users, F.count(counted).alias("events"))
        candidates = self.candidates.withColumn("is_candidate", F.lit(True))
        rows = counts.join(candidates, on="item_id", how="left")
        rows = rows.where(F.col("is_candidate") | F.col("item_id").isNull())
        return cast(pd.DataFrame, rows.toPandas()).set_index("item_id")

    def _of_candidates(self, column: str) -> np.ndarray:
        """A column of `_counts` in the order of the candidates; 0 for those without a row."""
        counts = self._counts[column].reindex(self.item_ids)
        return counts.fillna(0).to_numpy(np.int64)

    def _profile_lists(
        self,
        serving: ServingConfig,
        k: int,
    ) -> Iterable[pa.RecordBatch]:
        """user_id, items, by matching profiles with items as the stage recommend does."""
        share = serving.item_item.share
        searcher = self.indexes.searcher(NO_CONTENT if share == 1 else serving.representation)
        open_searcher = self._opener(searcher.folder, Searcher.open)
        scoring = recommend.ProfileScoring(
            serving.profiles.shape, max_tastes=serving.profiles.tastes
        )
        if share:
            scores = self._item_item_scores(serving, searcher)
            scoring = replace(
                scoring,
                share=share,
                position_decay=serving.item_item.position_decay,
                open_item_item=self._opener(scores, ItemItemScores.open),
            )
        candidates = self.item_ids.get_indexer(pd.Index(searcher.ids))
        no_candidates = list(searcher.ids[candidates < 0])
        list_rules = recommend.all_items_except(searcher, no_candidates)
        rank = recommend.ranker(
            open_searcher,
            list_rules,
            k,
            None,
            scoring,
            explain=False,
        )

        rows = self.histories(serving.profiles).select(["user_id", "history", "seen"])
        return map_batches(rows, rank_histories(open_searcher, rank))

    def _opener(
        self,
        folder: Path,
        open_artifact: Callable[[Path], _T],
    ) -> Callable[[], _T]:
        """What opens the artifact where the lists are ranked."""

        def opener() -> Callable[[], _T]:
            if not self.in_driver:
                return ship(self.spark, folder, float("inf"), open_artifact)
            artifact = open_artifact(folder)
            return lambda: artifact

        return self._cached(("opener", folder), opener)

    def _item_item_scores(self, serving: ServingConfig, searcher: Searcher) -> Path:
        """The folder of the item-item scores by the positions of the index."""
        # What the pairs depend on; weights of events change no pair.
        settings = serving.item_item.model_dump_json(
            include={"distance_decay", "popularity_power", "max_neighbors"}
        )
        key = (settings, serving.profiles.last_n, *serving.profiles.event_weights)

        def count_pairs() -> pa.Table:
            events = self._weighted(self.split.train, serving.profiles)
            histories = profiles.summed_histories(events, serving.profiles)
            return item_item.pairs(histories, serving.item_item).toArrow()

        def build() -> Path:
            pairs = self._cached(("pairs", key), count_pairs)
            return build_item_item(pairs, searcher, self.indexes.folder / "item_item")

        return self._cached(("item_item", key, searcher.index_id), build)

    def _als_lists(self, k: int) -> Iterable[pa.RecordBatch]:
        """user_id, items by ALS with the best of its settings."""
        best = self._tune_als(k)
        self.tuned["als"] = {name: float(value) for name, value in best._asdict().items()}
        with self._ratings(self.split.train) as ratings:
            factors = als.fit(
                ratings,
                best,
                self.settings.seed,
                self.relevant["user_id"],
                self.item_ids,
            )
        return self._seen_lists(rank_by_factors(self.item_ids, factors, k))

    def _ratings(self, train: DataFrame) -> AbstractContextManager[als.Ratings]:
        return als.ratings(train, dict(self.serving.profiles.event_weights))

    def _tune_als(self, k: int) -> als.AlsSetting:
        """The setting with the best recall at k on a validation split of the train events."""
        validation = splits.validation(self.split, self.settings.test_share)
        relevant = splits.relevant(validation.train, validation.test, self.candidates)
        order = F.xxhash64("user_id", F.lit(self.settings.seed))
        users = relevant.orderBy(order, "user_id").limit(_ALS_SAMPLE).toArrow()
        user_ids = users["user_id"].to_pandas()
        codes = user_item_codes(users["relevant"].to_pandas(), self.item_ids)
        counts = users["relevant"].to_pandas().map(len).to_numpy()

        def recall(setting: als.AlsSetting) -> float:
            factors = als.fit(
                ratings,
                setting,
                self.settings.seed,
                user_ids,
                self.item_ids,
            )
            lists = map_batches(users, rank_by_factors(self.item_ids, factors, k))
            top = positions(lists, user_ids, self.item_ids, k)
            hits = hit_mask(top, codes, len(self.item_ids))
            return float(per_user(hits, counts, k)["recall"].mean())

        with self._ratings(validation.train) as ratings, ThreadPoolExecutor(_ALS_FITS) as pool:
            recalls = dict(zip(als.GRID, pool.map(recall, als.GRID), strict=True))
        return max(als.GRID, key=lambda setting: recalls[setting])

    def _seen_lists(self, rank: BatchFunction) -> Iterable[pa.RecordBatch]:
        rows = self.histories(self.serving.profiles).select(["user_id", "seen"])
        return map_batches(rows, rank)
