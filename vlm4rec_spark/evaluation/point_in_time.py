"""Lists of arms as of a cut, by the stages' own functions; what several arms need is made once.

Knows how the stages fit together and what is known at the cut; knows no metric and nothing of what comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation import als, splits
from vlm4rec_spark.evaluation.arms import FUSIONS, IMAGE, Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.models.index.build import build_index, build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k import flat_exclusions, top_k
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import item_item, profiles, recommend
from vlm4rec_spark.stages.profiles import ProfileSettings

ALONE = ""
"""The representation of an arm in which content has no share: every item has the same vector."""


@dataclass(frozen=True)
class EvaluationTables:
    """What an evaluation reads; embeddings hold one encoder per representation."""

    interactions: DataFrame
    items: DataFrame
    embeddings: DataFrame
    users: DataFrame | None = None
    """user_id, segment, where the company has them."""


@dataclass
class PointInTime:
    """What is known at a cut. known: its events; judged: user_id, relevant; candidates: item_id, the same of `items`.

    Artefacts are built under `folder`, which must outlive the lists.
    """

    spark: SparkSession
    tables: EvaluationTables
    candidates: DataFrame
    items: pd.Index
    train: DataFrame
    test_users: DataFrame
    settings: EvaluateSettings
    in_use: ServingConfig
    folder: Path
    cut: str | None = None
    chosen: dict[str, object] = field(default_factory=dict)
    """What arms have settled on validation, by arm."""
    _made: dict[Any, Any] = field(default_factory=dict)

    def lists(self, arm: Arm, k: int) -> np.ndarray:
        """Positions in `items` of the k best of every judged user: (users, k), users as in `users`; -1 past the end."""
        if arm.ranks == "matched":
            rows = self._matched(arm, k)
        elif arm.ranks == "als":
            rows = self._by_factors(k)
        else:
            seed = self.settings.seed if arm.ranks == "random" else None
            rows = scored_lists(
                self.histories(self.in_use.profiles), self.items, self._popularity, k, seed
            )
        return self._placed(rows, k)

    @property
    def users(self) -> pd.DataFrame:
        """user_id, relevant and seen (arrays of ids; seen of items ever met), last_event_at and segment of the judged
        users, by user_id."""
        if "users" not in self._made:
            seen = self.histories(self.in_use.profiles).select("user_id", "seen", "last_event_at")
            rows = self.test_users.join(seen, on="user_id", how="left").withColumn(
                "segment", F.lit(None).cast("string")
            )
            if self.tables.users is not None:
                segments = self.tables.users.select("user_id", "segment")
                rows = rows.drop("segment").join(segments, on="user_id", how="left")
            found = cast(pd.DataFrame, rows.toPandas())
            self._made["users"] = found.sort_values("user_id", ignore_index=True)
        return self._made["users"]

    def histories(self, settings: ProfileSettings) -> DataFrame:
        """Of the judged users, as `profiles.histories` makes them."""
        key = ("histories", settings.model_dump_json(exclude={"shape", "tastes"}))
        if key not in self._made:
            theirs = self.train.join(
                self.test_users.select("user_id"), on="user_id", how="left_semi"
            )
            self._made[key] = profiles.histories(theirs, self.tables.items, settings).persist()
        return self._made[key]

    def searcher(self, representation: str) -> Searcher:
        """The index of a representation: all items that have a vector, candidates and others."""
        return Searcher.open(self._index(representation), verify=False)

    def known_by(self) -> tuple[np.ndarray, int]:
        """How many users know each candidate, int64 (items,), and how many there are."""
        if "known by" not in self._made:
            counts = self.train.groupBy("item_id").agg(F.countDistinct("user_id").alias("users"))
            found = self._of_items(counts, "users")
            self._made["known by"] = found, self.train.select("user_id").distinct().count()
        return self._made["known by"]

    def close(self) -> None:
        """Let go of what Spark has kept."""
        for made in self._made.values():
            if isinstance(made, DataFrame):
                made.unpersist()
        self._made.clear()

    @property
    def _popularity(self) -> np.ndarray:
        """Events of each candidate, float32 (items,), in the last days before the cut where the settings say so."""
        if "popularity" not in self._made:
            events = self.train
            if days := self.settings.popularity_days:
                until = F.to_timestamp(F.lit(self.cut)) if self.cut else F.lit(self._last_event())
                events = events.where(
                    F.col("event_time") >= until - F.make_interval(days=F.lit(days))
                )
            counts = events.groupBy("item_id").agg(F.count(F.lit(1)).alias("events"))
            self._made["popularity"] = self._of_items(counts, "events").astype(np.float32)
        return self._made["popularity"]

    def _last_event(self) -> object:
        return self.train.agg(F.max("event_time")).first()[0]  # type: ignore[index]

    def _of_items(self, counts: DataFrame, column: str) -> np.ndarray:
        rows = self.candidates.join(counts, on="item_id", how="left").select(
            "item_id", F.coalesce(column, F.lit(0))
        )
        found = cast(pd.DataFrame, rows.toDF("item_id", column).toPandas())
        return found.set_index("item_id")[column].reindex(self.items).to_numpy()

    def _matched(self, arm: Arm, k: int) -> DataFrame:
        """user_id, items of an arm that matches profiles with items, as recommend does."""
        share, by = arm.by.item_item.share, arm.by
        built = self._index(ALONE if share == 1 else by.representation)
        open_searcher = self._shipped(built, Searcher.open)
        matching = recommend.Matching(by.profiles.shape, tastes_per_user=by.profiles.tastes)
        if share:
            counted = self._together(by, built)
            opens = self._shipped(counted, ItemItemScores.open)
            matching = replace(
                matching, share=share, position_decay=by.item_item.position_decay, opens=opens
            )
        vectors = profiles.with_embedding(
            self.histories(by.profiles), by.representation, open_searcher
        )
        lists = recommend.recommend(
            vectors, open_searcher, self._offer(built), k, None, matching, why=False
        )
        return lists.select("user_id", F.col("items.item_id").alias("items"))

    def _shipped(self, built: Path, opens: Callable[[Path], Any]) -> Callable[[], Any]:
        key = ("shipped", built)
        if key not in self._made:
            self._made[key] = ship(self.spark, built, float("inf"), opens)
        return self._made[key]

    def _offer(self, built: Path) -> ListRules:
        """The items of the index that are candidates."""
        searcher = Searcher.open(built, verify=False)
        return recommend.without(
            searcher, list(searcher.ids[self.items.get_indexer(pd.Index(searcher.ids)) < 0])
        )

    def _index(self, representation: str) -> Path:
        key = ("index", representation)
        if key not in self._made:
            rows = self._vectors(representation).toArrow().sort_by("item_id")
            if representation in FUSIONS:
                fused = FUSIONS[representation](
                    *(_matrix(rows[name]) for name in ("embedding", "image"))
                )
                fused = (fused / np.linalg.norm(fused, axis=1, keepdims=True)).astype(np.float32)
                rows = rows.drop_columns(["embedding", "image"]).append_column(
                    "embedding", pa.array(list(fused))
                )
            # Exact search: an arm is judged by its vectors, not by what an approximate index loses.
            self._made[key] = build_index(
                rows, representation or "alone", "evaluate", self.folder, ann_min_items=2**62
            )
        return self._made[key]

    def _vectors(self, representation: str) -> DataFrame:
        text = F.lit("").alias("text")
        if representation == ALONE:
            vector = F.array(F.lit(1.0).cast("float")).alias("embedding")
            return self.candidates.select(
                "item_id", vector, F.lit("").alias("content_sha256"), text
            )
        real = self.tables.embeddings.where(~F.col("fallback"))
        own = self.in_use.representation if representation in FUSIONS else representation
        rows = real.where(F.col("representation") == own).select(
            "item_id", "embedding", "content_sha256", text
        )
        if representation in FUSIONS:
            image = real.where(F.col("representation") == IMAGE)
            rows = rows.join(
                image.select("item_id", F.col("embedding").alias("image")), on="item_id"
            )
        return rows

    def _together(self, by: ServingConfig, built: Path) -> Path:
        """What everybody's histories hold together, by the positions of an index."""
        counting = (
            by.item_item.model_dump_json(include={"distance_decay", "popularity_power", "kept"}),
            by.profiles.last_n,
            *by.profiles.event_weights,
        )
        key = ("together", counting, built)
        if key not in self._made:
            if ("pairs", counting) not in self._made:
                everybody = profiles.histories(self.train, self.tables.items, by.profiles)
                self._made["pairs", counting] = item_item.pairs(everybody, by.item_item).persist()
            searcher = Searcher.open(built, verify=False)
            self._made[key] = build_item_item(
                self._made["pairs", counting].toArrow(), searcher, self.folder / "together"
            )
        return self._made[key]

    def _by_factors(self, k: int) -> DataFrame:
        """user_id, items by ALS with the setting that does best where this log is cut once more."""
        weights = dict(self.in_use.profiles.event_weights)
        before = splits.validation(
            splits.Split("", self.cut, self.train, self.train), self.settings.test_share
        )
        hidden = splits.relevant(before.train, before.test, self.candidates)
        order = F.xxhash64("user_id", F.lit(self.settings.seed))
        sample = hidden.orderBy(order, "user_id").limit(_SETTLED_ON).persist()
        seen = (
            before.train.join(sample.select("user_id"), on="user_id", how="left_semi")
            .groupBy("user_id")
            .agg(F.collect_set("item_id").alias("seen"))
        )
        events = before.train.persist()
        tried = {}
        for setting in als.GRID:
            factors = als.fit(events, weights, self.items, setting, self.settings.seed)
            lists = factored_lists(seen, self.items, factors, k)
            joined = sample.join(lists, on="user_id", how="left")
            found = F.size(F.array_intersect("items", "relevant")) / F.size("relevant")
            tried[setting] = (
                joined.agg(F.avg(F.when(F.col("items").isNull(), 0.0).otherwise(found))).first()[0]
                or 0.0
            )  # type: ignore[index]
        events.unpersist()
        sample.unpersist()
        best = max(als.GRID, key=lambda setting: tried[setting])
        self.chosen["als"] = dict(zip(("rank", "regularisation", "alpha"), best, strict=True))
        factors = als.fit(self.train, weights, self.items, best, self.settings.seed)
        return factored_lists(self.histories(self.in_use.profiles), self.items, factors, k)

    def _placed(self, rows: DataFrame, k: int) -> np.ndarray:
        table = rows.select("user_id", "items").toArrow()
        users = pd.Index(self.users["user_id"]).get_indexer(
            pd.Index(table["user_id"].to_pylist(), dtype=object)
        )
        lists = (
            pa.concat_arrays(table["items"].chunks)
            if len(table)
            else pa.array([], pa.list_(pa.string()))
        )
        lengths = np.asarray(lists.value_lengths().fill_null(0), np.int64)
        flat = self.items.get_indexer(pd.Index(lists.flatten().to_pylist(), dtype=object))
        top = np.full((len(self.users), k), -1, np.int64)
        rank = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        top[np.repeat(users, lengths), rank] = flat
        return top


_SETTLED_ON = 2_000
"""Users, a seeded sample, whose lists decide on ALS's setting."""


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    flat = pa.concat_arrays(column.chunks).flatten()
    return np.asarray(flat, np.float32).reshape(len(column), -1)


def scored_lists(
    histories: DataFrame, items: pd.Index, values: np.ndarray, k: int, seed: int | None = None
) -> DataFrame:
    """user_id, items: the k best of `values` (by candidate) that the user hasn't seen.

    With a `seed` every user gets scores of their own, drawn from the seed and the user's id: the random arm.
    """

    def score(batch: pd.DataFrame) -> np.ndarray:
        if seed is None:
            return np.broadcast_to(values, (len(batch), len(values)))
        return np.stack([_draw(user, seed, len(values)) for user in batch["user_id"]])

    return _ranked(histories.select("user_id", "seen"), items, score, k)


def factored_lists(
    histories: DataFrame, items: pd.Index, factors: als.Factors, k: int
) -> DataFrame:
    """user_id, items: the k best by the products of factors; none for a user that ALS doesn't know."""
    vectors = factors.items

    def score(batch: pd.DataFrame) -> np.ndarray:
        return np.stack(batch["factors"].tolist()).astype(np.float32) @ vectors.T

    return _ranked(
        histories.select("user_id", "seen").join(factors.users, on="user_id"), items, score, k
    )


def _ranked(
    rows: DataFrame, items: pd.Index, score: Callable[[pd.DataFrame], np.ndarray], k: int
) -> DataFrame:
    ids = items.to_numpy(object)

    def rank(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        positions, everything = pd.Index(ids), np.arange(len(ids), dtype=np.int64)
        for batch in batches:
            for start in range(0, len(batch), 256):
                part = batch.iloc[start : start + 256]
                scores = score(part)
                seen = [
                    positions.get_indexer(pd.Index(items, dtype=object)) for items in part["seen"]
                ]
                top, _ = top_k(
                    np.broadcast_to(everything, scores.shape),
                    scores,
                    flat_exclusions(seen, len(ids)),
                    np.ones(len(ids), bool),
                    k,
                )
                yield pd.DataFrame(
                    {
                        "user_id": part["user_id"].to_numpy(),
                        "items": [list(ids[row[row >= 0]]) for row in top],
                    }
                )

    return rows.mapInPandas(rank, "user_id STRING, items ARRAY<STRING>")


def _draw(user_id: str, seed: int, items: int) -> np.ndarray:
    return np.random.default_rng([seed, *user_id.encode()]).random(items, np.float32)
