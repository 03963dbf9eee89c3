"""Lists of arms as of a cut, by the stages' own functions. What several arms need is computed once.

Knows how the stages fit together and what is known at the cut. Knows no metric and nothing after
the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
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
from vlm4rec_spark.evaluation.arms import FUSIONS, IMAGE, Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.splits import Split
from vlm4rec_spark.models.index.build import build_index, build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.top_k import flat_exclusions, top_k
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import item_item, profiles, recommend
from vlm4rec_spark.stages.profiles import ProfileSettings

NO_CONTENT = ""
"""The representation of an arm in which content has no share: every item has the same vector."""
_ALS_SAMPLE = 2_000
"""Users, a seeded sample, on whose lists ALS is tuned."""
_BLOCK = 256
"""Users whose scores of all candidates are in memory at once."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class EvaluationTables:
    """What an evaluation reads; embeddings hold one encoder per representation."""

    interactions: DataFrame
    items: DataFrame
    embeddings: DataFrame
    users: DataFrame | None = None
    """user_id, segment, if the company has them."""


@dataclass
class PointInTime:
    """What is known at a cut. test_users: user_id, relevant. candidates: item_id; item_ids: the
    same, sorted.

    Artifacts are built under `folder`, which must outlive the lists.
    """

    spark: SparkSession
    tables: EvaluationTables
    candidates: DataFrame
    item_ids: pd.Index
    split: Split
    test_users: DataFrame
    settings: EvaluateSettings
    serving: ServingConfig
    folder: Path
    tuned: dict[str, object] = field(default_factory=dict)
    """The settings that arms have tuned on validation events, by arm."""
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    def lists(
        self,
        arm: Arm,
        k: int,
    ) -> np.ndarray:
        """Positions in `item_ids` of every test user's top k: (users, k) in the order of `users`,
        -1 past the end."""
        if arm.ranking == "profiles":
            rows = self._profile_lists(arm.serving, k)
        elif arm.ranking == "als":
            rows = self._als_lists(k)
        else:
            seed = self.settings.seed if arm.ranking == "random" else None
            histories = self.histories(self.serving.profiles)
            rows = scored_lists(
                histories,
                self.item_ids,
                self._popularity,
                k,
                seed,
            )
        return self._positions(rows, k)

    @cached_property
    def users(self) -> pd.DataFrame:
        """The test users by user_id: relevant and seen (arrays of ids; seen of all items),
        last_event_at, segment."""
        histories = self.histories(self.serving.profiles)
        seen = histories.select("user_id", "seen", "last_event_at")
        rows = self.test_users.join(seen, on="user_id", how="left")
        if self.tables.users is None:
            rows = rows.withColumn("segment", F.lit(None).cast("string"))
        else:
            segments = self.tables.users.select("user_id", "segment")
            rows = rows.join(segments, on="user_id", how="left")
        users = cast(pd.DataFrame, rows.toPandas())
        return users.sort_values("user_id", ignore_index=True)

    def histories(self, settings: ProfileSettings) -> DataFrame:
        """The test users' histories, as `profiles.histories` makes them."""
        train = self.split.train

        def compute() -> DataFrame:
            test_users = self.test_users.select("user_id")
            events = train.join(test_users, on="user_id", how="left_semi")
            return profiles.histories(events, self.tables.items, settings).persist()

        # Neither setting changes a history.
        key = settings.model_dump_json(exclude={"shape", "tastes"})
        return self._cached(("histories", key), compute)

    def searcher(self, representation: str) -> Searcher:
        """The index of a representation: all items that have a vector, not only candidates."""
        return Searcher.open(self._index(representation), verify=False)

    @cached_property
    def user_counts(self) -> np.ndarray:
        """How many users know each candidate, int64 (items,)."""
        counts = self.split.train.groupBy("item_id").agg(F.countDistinct("user_id").alias("n"))
        return self._by_candidate(counts)

    @cached_property
    def total_users(self) -> int:
        return self.split.train.select("user_id").distinct().count()

    def close(self) -> None:
        """Release what Spark has cached."""
        for value in self._cache.values():
            if isinstance(value, DataFrame):
                value.unpersist()
        self._cache.clear()

    def _cached(
        self,
        key: Hashable,
        compute: Callable[[], _T],
    ) -> _T:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @cached_property
    def _popularity(self) -> np.ndarray:
        """Events of each candidate in the last popularity_days before the cut, float32 (items,)."""
        events = self.split.train
        if days := self.settings.popularity_days:
            last_event = events.agg(F.max("event_time")).first()[0]  # type: ignore[index]
            end = F.to_timestamp(F.lit(self.split.cut)) if self.split.cut else F.lit(last_event)
            start = end - F.make_interval(days=F.lit(days))
            events = events.where(F.col("event_time") >= start)
        counts = events.groupBy("item_id").agg(F.count(F.lit(1)).alias("n"))
        return self._by_candidate(counts).astype(np.float32)

    def _by_candidate(self, counts: DataFrame) -> np.ndarray:
        """The column `n` of `counts` in the order of the candidates; 0 for those without a row."""
        joined = self.candidates.join(counts, on="item_id", how="left")
        rows = joined.select("item_id", F.coalesce("n", F.lit(0)).alias("n"))
        by_item = cast(pd.DataFrame, rows.toPandas()).set_index("item_id")["n"]
        return by_item.reindex(self.item_ids).to_numpy()

    def _profile_lists(
        self,
        serving: ServingConfig,
        k: int,
    ) -> DataFrame:
        """user_id, items, by matching profiles with items as the stage recommend does."""
        share = serving.item_item.share
        folder = self._index(NO_CONTENT if share == 1 else serving.representation)
        open_searcher = self._shipped(folder, Searcher.open)
        scoring = recommend.ProfileScoring(
            serving.profiles.shape, max_tastes=serving.profiles.tastes
        )
        if share:
            scores = self._item_item_scores(serving, folder)
            scoring = replace(
                scoring,
                share=share,
                position_decay=serving.item_item.position_decay,
                open_item_item=self._shipped(scores, ItemItemScores.open),
            )
        histories = self.histories(serving.profiles)
        vectors = profiles.with_embedding(histories, serving.representation, open_searcher)
        searcher = Searcher.open(folder, verify=False)
        positions = self.item_ids.get_indexer(pd.Index(searcher.ids))
        no_candidates = list(searcher.ids[positions < 0])
        lists = recommend.recommend(
            vectors,
            open_searcher,
            recommend.all_items_except(searcher, no_candidates),
            k,
            None,
            scoring,
            explain=False,
        )
        return lists.select("user_id", F.col("items.item_id").alias("items"))

    def _shipped(
        self,
        folder: Path,
        open_artifact: Callable[[Path], Any],
    ) -> Callable[[], Any]:
        return self._cached(
            ("shipped", folder),
            lambda: ship(self.spark, folder, float("inf"), open_artifact),
        )

    def _index(self, representation: str) -> Path:
        """The folder of a representation's index."""
        return self._cached(("index", representation), lambda: self._build_index(representation))

    def _build_index(self, representation: str) -> Path:
        rows = self._vectors(representation).toArrow().sort_by("item_id")
        if representation in FUSIONS:
            fused = FUSIONS[representation](_matrix(rows["embedding"]), _matrix(rows["image"]))
            length = np.linalg.norm(fused, axis=1, keepdims=True)
            unit = (fused / length).astype(np.float32)
            rows = rows.drop_columns(["embedding", "image"])
            rows = rows.append_column("embedding", pa.array(list(unit)))
        name = representation or "no_content"
        # Exact search: an arm is measured by its vectors, not by what an approximate index loses.
        return build_index(
            rows,
            name,
            "evaluate",
            self.folder,
            ann_min_items=2**62,
        )

    def _vectors(self, representation: str) -> DataFrame:
        """item_id, embedding, content_sha256, text of all items with a vector; for a fusion also
        image."""
        text = F.lit("").alias("text")
        if representation == NO_CONTENT:
            vector = F.array(F.lit(1.0).cast("float")).alias("embedding")
            content = F.lit("").alias("content_sha256")
            return self.candidates.select("item_id", vector, content, text)
        real = self.tables.embeddings.where(~F.col("fallback"))
        is_fusion = representation in FUSIONS
        stored = self.serving.representation if is_fusion else representation
        rows = real.where(F.col("representation") == stored)
        rows = rows.select("item_id", "embedding", "content_sha256", text)
        if not is_fusion:
            return rows
        images = real.where(F.col("representation") == IMAGE)
        images = images.select("item_id", F.col("embedding").alias("image"))
        return rows.join(images, on="item_id")

    def _item_item_scores(
        self,
        serving: ServingConfig,
        folder: Path,
    ) -> Path:
        """The folder of the item-item scores by the positions of the index in `folder`."""
        # What the pairs depend on; weights of events change no pair.
        settings = serving.item_item.model_dump_json(
            include={"distance_decay", "popularity_power", "max_neighbors"}
        )
        key = (settings, serving.profiles.last_n, *serving.profiles.event_weights)

        def count_pairs() -> pa.Table:
            histories = profiles.histories(self.split.train, self.tables.items, serving.profiles)
            return item_item.pairs(histories, serving.item_item).toArrow()

        def build() -> Path:
            pairs = self._cached(("pairs", key), count_pairs)
            searcher = Searcher.open(folder, verify=False)
            return build_item_item(pairs, searcher, self.folder / "item_item")

        return self._cached(("item_item", key, folder), build)

    def _als_lists(self, k: int) -> DataFrame:
        """user_id, items by ALS with the best of its settings."""
        weights = dict(self.serving.profiles.event_weights)
        best = self._tune_als(weights, k)
        self.tuned["als"] = {name: float(value) for name, value in best._asdict().items()}
        factors = als.fit(
            self.split.train,
            weights,
            self.item_ids,
            best,
            self.settings.seed,
        )
        histories = self.histories(self.serving.profiles)
        return factored_lists(histories, self.item_ids, factors, k)

    def _tune_als(
        self,
        weights: dict[str, float],
        k: int,
    ) -> als.AlsSetting:
        """The setting with the best recall at k on a validation split of the train events."""
        validation = splits.validation(self.split, self.settings.test_share)
        relevant = splits.relevant(validation.train, validation.test, self.candidates)
        order = F.xxhash64("user_id", F.lit(self.settings.seed))
        sample = relevant.orderBy(order, "user_id").limit(_ALS_SAMPLE).persist()
        events = validation.train.persist()
        seen = (
            events.join(sample.select("user_id"), on="user_id", how="left_semi")
            .groupBy("user_id")
            .agg(F.collect_set("item_id").alias("seen"))
        )
        recall = {}
        for setting in als.GRID:
            factors = als.fit(
                events,
                weights,
                self.item_ids,
                setting,
                self.settings.seed,
            )
            lists = factored_lists(seen, self.item_ids, factors, k)
            with_lists = sample.join(lists, on="user_id", how="left")
            recall[setting] = _mean_recall(with_lists)
        events.unpersist()
        sample.unpersist()
        return max(als.GRID, key=lambda setting: recall[setting])

    def _positions(
        self,
        rows: DataFrame,
        k: int,
    ) -> np.ndarray:
        """Lists of ids as positions (users, k) in the order of `users`, -1 past the end."""
        table = rows.select("user_id", "items").toArrow()
        positions = np.full((len(self.users), k), -1, np.int64)
        if not len(table):
            return positions
        user_ids = pd.Index(table["user_id"].to_pylist(), dtype=object)
        users = pd.Index(self.users["user_id"]).get_indexer(user_ids)
        lists = pa.concat_arrays(table["items"].chunks)
        lengths = np.asarray(lists.value_lengths().fill_null(0), np.int64)
        items = pd.Index(lists.flatten().to_pylist(), dtype=object)
        ranks = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions[np.repeat(users, lengths), ranks] = self.item_ids.get_indexer(items)
        return positions


def _mean_recall(lists: DataFrame) -> float:
    """lists: relevant, items; a user without items counts 0."""
    recall = F.size(F.array_intersect("items", "relevant")) / F.size("relevant")
    mean = F.avg(F.when(F.col("items").isNull(), 0.0).otherwise(recall))
    return lists.agg(mean).first()[0] or 0.0  # type: ignore[index]


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    flat = pa.concat_arrays(column.chunks).flatten()
    return np.asarray(flat, np.float32).reshape(len(column), -1)


def scored_lists(
    histories: DataFrame,
    item_ids: pd.Index,
    values: np.ndarray,
    k: int,
    seed: int | None = None,
) -> DataFrame:
    """user_id, items: the k best of `values` (by candidate) that the user hasn't seen.

    With a `seed` every user gets random scores, drawn from the seed and the user's id: the random
    arm.
    """

    def score(batch: pd.DataFrame) -> np.ndarray:
        if seed is None:
            return np.broadcast_to(values, (len(batch), len(values)))
        generators = [np.random.default_rng([seed, *user.encode()]) for user in batch["user_id"]]
        return np.stack([rng.random(len(values), np.float32) for rng in generators])

    return _ranked(histories.select("user_id", "seen"), item_ids, score, k)


def factored_lists(
    histories: DataFrame,
    item_ids: pd.Index,
    factors: als.Factors,
    k: int,
) -> DataFrame:
    """user_id, items: the k best by the product of factors; no row for a user that ALS doesn't
    know."""
    vectors = factors.items

    def score(batch: pd.DataFrame) -> np.ndarray:
        return np.stack(batch["factors"].tolist()).astype(np.float32) @ vectors.T

    rows = histories.select("user_id", "seen").join(factors.users, on="user_id")
    return _ranked(rows, item_ids, score, k)


def _ranked(
    rows: DataFrame,
    item_ids: pd.Index,
    score: Callable[[pd.DataFrame], np.ndarray],
    k: int,
) -> DataFrame:
    """user_id, items: the k unseen candidates with the best scores, for rows of user_id, seen and
    what `score` reads.

    score: scores of all candidates, (rows, items), for a batch of rows.
    """
    ids = item_ids.to_numpy(object)

    def rank(part: pd.DataFrame) -> pd.DataFrame:
        scores = score(part)
        positions = np.broadcast_to(np.arange(len(ids), dtype=np.int64), scores.shape)
        index = pd.Index(ids)
        seen = [index.get_indexer(pd.Index(items, dtype=object)) for items in part["seen"]]
        exclusions = flat_exclusions(seen, len(ids))
        top = top_k(
            positions,
            scores,
            exclusions,
            np.ones(len(ids), bool),
            k,
        ).positions
        items = [list(ids[row[row >= 0]]) for row in top]
        return pd.DataFrame({"user_id": part["user_id"].to_numpy(), "items": items})

    def rank_batches(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for start in range(0, len(batch), _BLOCK):
                yield rank(batch.iloc[start : start + _BLOCK])

    return rows.mapInPandas(rank_batches, "user_id STRING, items ARRAY<STRING>")
