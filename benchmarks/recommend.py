"""The recommend pass: top 10 of 200,000 users with 20 seen items each, in three catalogue sizes.

    .venv/bin/python benchmarks/recommend.py [--users 200000] [--items 20000 200000 1000000]

Profiles are in a Delta table and lists are written to one. Vectors of 384 dimensions have three
levels, as a shop's captions do: 40 families, a kind for every 50 items, and items around their
kind. A kind is 0.8 of its family and noise of its own. An item has noise of 0.9 of its length. A
user has 20 items of up to three kinds, drawn by a Zipf law, and their mean. Of 200,000 items the
nearest has a cosine of about .68 with a user's vector, the hundredth .40, the thousandth .28.

At the middle size other sides run on the same vectors and cores, in the same run:
- raw: one Python process without Spark reads the same Parquet files, searches by ScaNN with its own
  reordering and the same effort, excludes in numpy and writes Parquet;
- the same stage under a rule that leaves 1 % of the items, with variants and caps, and with
  diversity; and max_similarity, whose search of neighbors has a row of its own;
- numpy's exact search; faiss, searching alone (pip install faiss-cpu); Spark's ALS with given
  factors of rank 64; crossJoin with vector_inner_product.
Slow sides are timed on a sample of users, which the table names.

Churn: one new item in 500 is added to the middle catalogue, and no user changes. `churn` is the
share of users whose list differs other than by new items that entered it. Its index reuses the
codes of the earlier one, as the index stage builds it. `churn_rebuilt` is the same with an index
built anew. Items and scores are compared as the table has them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from memory import peaks
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.models.index import neighbors
from vlm4rec_spark.models.index.blocks import blocks
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.calibration import Calibration
from vlm4rec_spark.models.ranking.list_rules import Cap, ListRules
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.spark import neighbors_file
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import recommend
from vlm4rec_spark.stages.index import IndexSettings
from vlm4rec_spark.storage import schemas

DIMENSION = 384
SEEN = 20
K = 10
PROMISE = 0.95
FAMILIES = 40
ITEMS_PER_KIND = 50
ROUNDS = 3
RANK = 64
NEW_SHARE = 1 / 500
"""Share of new items before churn is measured."""
REBUILD_THRESHOLD = IndexSettings().rebuild_threshold
BLOCK = 50_000
SAMPLE = {
    "numpy": 1_000,
    "faiss Flat": 1_000,
    "faiss": 20_000,
    "als": 2_000,
    "crossJoin": 10,
    "max_similarity": 20_000,
}
RAW_LISTS = pa.list_(pa.struct({"item_id": pa.string(), "score": pa.float32()}))
# Both compilers, unlike our local default, which starts quicker: Spark's ALS multiplies in the JVM.
JVM = "spark.conf={spark.driver.extraJavaOptions: -XX:ReservedCodeCacheSize=256m -Xss4m}"


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass(frozen=True)
class Catalogue:
    """Unit vectors, float32 (items, DIMENSION), and each item's kind; and those of later items."""

    vectors: np.ndarray
    kinds: np.ndarray
    new_vectors: np.ndarray
    new_kinds: np.ndarray


def catalogue(items: int) -> Catalogue:
    rng = np.random.default_rng(0)
    kinds = max(20, items // ITEMS_PER_KIND)
    families = rng.normal(size=(FAMILIES, DIMENSION)).astype(np.float32)
    centers = 0.8 * families[rng.integers(FAMILIES, size=kinds)]
    centers = centers + rng.normal(size=(kinds, DIMENSION))
    item_kinds = rng.integers(kinds, size=items)
    vectors = around(centers, item_kinds, rng)
    new_kinds = rng.integers(kinds, size=max(1, round(items * NEW_SHARE)))
    return Catalogue(vectors, item_kinds, around(centers, new_kinds, rng), new_kinds)


def around(
    centers: np.ndarray,
    kinds: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """A unit vector near the center of each kind, float32 (items, DIMENSION)."""
    vectors = np.empty((len(kinds), DIMENSION), np.float32)
    for block in blocks(len(kinds), BLOCK):
        block_centers = centers[kinds[block]]
        noise = 0.9 * rng.normal(size=block_centers.shape)
        vectors[block] = unit(block_centers + noise)
    return vectors


def texts(kinds: np.ndarray) -> list[str]:
    return [f"thing of kind{kind}" for kind in kinds]


def histories(item_kinds: np.ndarray, users: int) -> np.ndarray:
    """Positions of SEEN items of each user, (users, SEEN), with repetitions."""
    rng = np.random.default_rng(1)
    kinds = int(item_kinds.max()) + 1
    by_kind = np.argsort(item_kinds, kind="stable")
    starts = np.searchsorted(item_kinds[by_kind], np.arange(kinds + 1))
    tastes = rng.permutation(kinds)[rng.zipf(1.3, size=(users, 3)) % kinds]
    chosen = np.take_along_axis(tastes, rng.integers(3, size=(users, SEEN)), 1)
    sizes = np.maximum(1, starts[chosen + 1] - starts[chosen])
    offsets = rng.integers(2**31, size=chosen.shape) % sizes
    return by_kind[np.minimum(starts[chosen] + offsets, len(item_kinds) - 1)]


def names(items: int) -> np.ndarray:
    return np.char.mod("i%07d", np.arange(items))


def list_array(values: pa.Array, sizes: np.ndarray) -> pa.ListArray:
    """Lists of these sizes."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def write_profiles(
    folder: Path,
    vectors: np.ndarray,
    item_positions: np.ndarray,
) -> None:
    """Parquet files of rows of `profiles`."""
    ids = pa.array(names(len(vectors)), pa.string())
    for block in blocks(len(item_positions), BLOCK):
        rows = profile_rows(ids, vectors, item_positions[block], block.start)
        pq.write_table(rows, folder / f"{block.start}.parquet")


def profile_rows(
    ids: pa.Array, vectors: np.ndarray, item_positions: np.ndarray, first_user: int
) -> pa.Table:
    users = len(item_positions)
    weighted_items = pa.StructArray.from_arrays(
        [ids.take(pa.array(item_positions.ravel())), pa.array(np.ones(item_positions.size))],
        names=["item_id", "weight"],
    )
    seen = [np.unique(row) for row in item_positions]
    seen_ids = ids.take(pa.array(np.concatenate(seen)))
    means = unit(vectors[item_positions].mean(axis=1))
    last_event_at = [datetime(2026, 1, 1, tzinfo=UTC)] * users
    columns = {
        "user_id": np.char.mod("u%07d", np.arange(first_user, first_user + users)),
        "representation": ["title"] * users,
        "history": list_array(weighted_items, np.full(users, SEEN)),
        "seen": list_array(seen_ids, np.array([len(positions) for positions in seen])),
        "embedding": list_array(pa.array(means.ravel()), np.full(users, DIMENSION)),
        "events": np.full(users, SEEN),
        "last_event_at": pa.array(last_event_at, pa.timestamp("us", "UTC")),
    }
    return pa.table(columns)


@dataclass(frozen=True)
class RawSettings:
    """What the process without Spark reads, writes and searches with."""

    scann: str
    index: str
    profiles: list[str]
    lists: str
    leaves: int
    candidates: int


@dataclass(frozen=True)
class RawResult:
    seconds: float
    gb: float


def run_raw(settings: RawSettings) -> RawResult:
    """One process, no Spark and no reasons; its seconds and its largest memory."""
    import scann

    started = time.monotonic()
    searcher = scann.scann_ops_pybind.load_searcher(settings.scann)
    ids = pq.read_table(Path(settings.index) / "ids.parquet")["item_id"].combine_chunks()
    positions = {item_id: position for position, item_id in enumerate(ids.to_pylist())}
    schema = pa.schema({"user_id": pa.string(), "items": RAW_LISTS})
    columns = ["user_id", "embedding", "seen"]
    with pq.ParquetWriter(settings.lists, schema) as writer:
        for file in settings.profiles:
            for batch in pq.ParquetFile(file).iter_batches(8_192, columns=columns):
                lists = raw_lists(batch, searcher, ids, positions, settings)
                user_ids = batch.column("user_id").cast(pa.string())
                writer.write_table(pa.table([user_ids, lists], schema=schema))
    max_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return RawResult(time.monotonic() - started, max_kb / 1e6)


def raw_lists(
    batch: pa.RecordBatch,
    searcher: Any,
    ids: pa.Array,
    positions: dict[str, int],
    settings: RawSettings,
) -> pa.ListArray:
    """The best K items that the users haven't seen."""
    users = len(batch)
    found, scores = searcher.search_batched_parallel(
        np.asarray(batch.column("embedding").flatten()).reshape(users, -1),
        final_num_neighbors=K + SEEN,
        leaves_to_search=settings.leaves,
        pre_reorder_num_neighbors=settings.candidates + SEEN,
    )
    codes = np.arange(users)[:, None] * len(ids) + found.astype(np.int64)
    is_seen = np.isin(codes, seen_codes(batch.column("seen"), positions))
    columns = np.argsort(is_seen, axis=1, kind="stable")[:, :K]
    top = np.take_along_axis(found, columns, axis=1).ravel()
    top_scores = np.take_along_axis(scores, columns, axis=1).ravel()
    items = pa.StructArray.from_arrays(
        [ids.take(pa.array(top)), pa.array(top_scores)], fields=list(RAW_LISTS.value_type)
    )
    return list_array(items, np.full(users, K))


def seen_codes(seen: pa.ListArray, positions: dict[str, int]) -> np.ndarray:
    """user * items + position of all seen items."""
    encoded = seen.flatten().dictionary_encode()
    distinct = np.array([positions.get(item_id, -1) for item_id in encoded.dictionary.to_pylist()])
    users = np.repeat(np.arange(len(seen)), np.asarray(seen.value_lengths()))
    return users * len(positions) + distinct[encoded.indices.to_numpy()]


class FaissResult(NamedTuple):
    """Queries/s of the search alone, and its recall with nothing excluded."""

    name: str
    rate: float
    queries: int
    recall: float


class Shop:
    """One catalogue with its index, profiles and exact lists of a sample."""

    def __init__(
        self, folder: Path, items: int, users: int, pipeline: Pipeline, say: Callable[[str], None]
    ):
        self.folder = folder
        self.items = items
        self.users = users
        self.pipeline = pipeline
        self.catalogue = catalogue(items)
        self.vectors = self.catalogue.vectors
        self.histories = histories(self.catalogue.kinds, users)
        self.append_profiles()
        started = time.monotonic()
        self.index = folder / "index" / f"of-{items}"
        ids = names(items).tolist()
        item_texts = texts(self.catalogue.kinds)
        Searcher.build(self.index, self.index.name, ids, self.vectors, item_texts, 1)
        say(f"{items:,} items: index built in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        sample = self.profiles().orderBy(F.xxhash64("user_id")).limit(1_000)
        self.sample = sample.select("embedding", "history", "seen").toArrow()
        searcher = Searcher.open(self.index, verify=False)
        self.calibration = self.calibrate(searcher)
        self.effort = self.calibration.effort or Effort(1, K)
        say(
            f"{items:,} items: calibrated in {time.monotonic() - started:.0f} s: "
            f"{self.calibration.describe(searcher.leaf_count)}, "
            f"recall {self.calibration.recall:.4f}"
        )

    def append_profiles(self) -> None:
        parquet = self.folder / "rows"
        parquet.mkdir()
        write_profiles(parquet, self.vectors, self.histories)
        rows = self.pipeline.spark.read.parquet(str(parquet)).select(*schemas.PROFILES.columns)
        self.pipeline.tables.append(schemas.PROFILES, rows)
        shutil.rmtree(parquet)

    def calibrate(self, searcher: Searcher) -> Calibration:
        return recommend.calibrate(
            searcher, self.sample, recommend.all_items_except(searcher, []), K, PROMISE
        )

    def profiles(self, users: int | None = None) -> DataFrame:
        rows = self.pipeline.tables.read(schemas.PROFILES)
        return rows if users is None else rows.where(F.col("user_id") < f"u{users:07d}")

    def max_similarity(self) -> tuple[recommend.ProfileScoring, float]:
        """Scoring by stored neighbors, and the seconds of their search."""
        started = time.monotonic()
        spark = self.pipeline.spark
        open_searcher = self.ship(self.index, Searcher.open)
        depth = neighbors.needed_depth(self.effort.candidates, self.sample, self.items)
        folder = neighbors_file.build(
            spark,
            open_searcher(),
            open_searcher,
            Effort(self.effort.leaves, depth),
            self.folder / "neighbors",
        )
        seconds = time.monotonic() - started
        open_neighbors = self.ship(folder, Neighbors.open)
        scoring = recommend.ProfileScoring("max_similarity", open_neighbors=open_neighbors)
        return scoring, seconds

    def time_pass(
        self,
        explain: bool,
        scoring: recommend.ProfileScoring = recommend.CONTENT,
        users: int | None = None,
        list_rules: ListRules | None = None,
    ) -> float:
        """Seconds of the pass, from one Delta table to the other."""
        started = time.monotonic()
        lists = recommend.recommend(
            self.profiles(users),
            self.ship(self.index, Searcher.open),
            list_rules or self.list_rules(),
            K,
            self.calibration.effort,
            scoring,
            explain,
        )
        rows = lists.select(
            "*",
            F.lit(schemas.DEFAULT_LIST).alias("list"),
            F.lit("run").alias("run_id"),
            F.current_timestamp().alias("generated_at"),
        )
        self.pipeline.tables.replace(schemas.RECOMMENDATIONS, rows)
        return time.monotonic() - started

    def list_rules(self, **settings: Any) -> ListRules:
        return ListRules(np.ones(self.items, np.int64), **settings)

    def ship(
        self,
        folder: Path,
        open_folder: Callable[[Path], Any],
    ) -> Callable[[], Any]:
        broadcast_gb = self.pipeline.config.index.broadcast_gb
        return ship(self.pipeline.spark, folder, broadcast_gb, open_folder)

    def churn(self, rebuild_threshold: float) -> float:
        """Share of the lists in the table that change with the new items, other than by these.

        The new index reuses the old one's codes if `rebuild_threshold` allows it. The search is
        calibrated anew, as in a run.
        """
        folder = self.index_with_new_items(rebuild_threshold)
        searcher = Searcher.open(folder, verify=False)
        lists = recommend.recommend(
            self.profiles(),
            self.ship(folder, Searcher.open),
            recommend.all_items_except(searcher, []),
            K,
            self.calibrate(searcher).effort,
            explain=False,
        )
        before = self.pipeline.tables.read(schemas.RECOMMENDATIONS)
        before = before.select("user_id", F.col("items").alias("before"))
        joined = before.join(lists, on="user_id", how="left")
        differs = list_differs(F.col("before"), F.col("items"), f"i{self.items:07d}")
        return joined.agg(F.avg(differs.cast("double"))).collect()[0][0]

    def index_with_new_items(self, rebuild_threshold: float) -> Path:
        """Build the index of the old and the new items, as the index stage does."""
        vectors = np.concatenate([self.vectors, self.catalogue.new_vectors])
        item_texts = texts(np.concatenate([self.catalogue.kinds, self.catalogue.new_kinds]))
        rows = pa.table(
            {
                "item_id": names(len(vectors)),
                "embedding": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.ravel()), DIMENSION
                ),
                "content_sha256": item_texts,
                "text": item_texts,
            }
        )
        base = Searcher.open(self.index, verify=False)
        return build_index(rows, "title", "none", self.folder / "index", 1, base, rebuild_threshold)

    def recall(self) -> float:
        """Recall of the lists in the table, on a thousand users. The calibration's are others."""
        users = np.random.default_rng(2).choice(self.users, 1_000, replace=False)
        user_ids = [f"u{user:07d}" for user in users]
        recommendations = self.pipeline.tables.read(schemas.RECOMMENDATIONS)
        lists = {}
        for row in recommendations.where(F.col("user_id").isin(user_ids)).collect():
            lists[row["user_id"]] = [int(item["item_id"][1:]) for item in row["items"]]
        assert {len(items) for items in lists.values()} == {K}
        return mean_recall([lists[user_id] for user_id in user_ids], self.exact(users))

    def exact(self, users: np.ndarray) -> np.ndarray:
        """Plain numpy: all products, -inf where seen, the K best; 64 users at a time."""
        tops = []
        for block in blocks(len(users), 64):
            seen = self.histories[users[block]]
            scores = unit(self.vectors[seen].mean(axis=1)) @ self.vectors.T
            np.put_along_axis(scores, seen, -np.inf, axis=1)
            best = np.argpartition(-scores, K, axis=1)[:, :K]
            order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
            tops.append(np.take_along_axis(best, order, 1))
        return np.concatenate(tops)

    def prepare_raw(self) -> Callable[[], RawResult]:
        """Build an index that reorders; the returned function runs the process without Spark."""
        scann_folder = self.folder / "raw-scann"
        scann_folder.mkdir()
        leaves = Searcher.open(self.index, verify=False).leaf_count
        build_reordering_scann(self.vectors, leaves, scann_folder)
        table = self.pipeline.tables.name_of(schemas.PROFILES)
        settings = RawSettings(
            scann=str(scann_folder),
            index=str(self.index),
            profiles=DeltaTable(table).file_uris(),
            lists=str(self.folder / "raw.parquet"),
            leaves=self.effort.leaves,
            candidates=self.effort.candidates,
        )
        settings_file = self.folder / "raw.json"
        settings_file.write_text(json.dumps(asdict(settings)))
        command = [sys.executable, __file__, "--raw", str(settings_file)]

        def run() -> RawResult:
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            return RawResult(**json.loads(process.stdout.splitlines()[-1]))

        return run

    def faiss(self) -> list[FaissResult]:
        """A flat index, and a quick one with the fewest probes that keep the promise."""
        import faiss

        users = np.arange(SAMPLE["faiss"])
        queries = np.ascontiguousarray(unit(self.vectors[self.histories[users]].mean(axis=1)))
        few_queries = queries[: SAMPLE["faiss Flat"]]
        flat = faiss.IndexFlatIP(DIMENSION)
        flat.add(self.vectors)
        started = time.monotonic()
        _, exact = flat.search(few_queries, K + SEEN)
        flat_rate = len(few_queries) / (time.monotonic() - started)
        inverted_lists = max(64, round(self.items**0.5) * 2)
        name = f"IVF{inverted_lists},PQ{DIMENSION // 2}x4fs,RFlat"
        quick = build_quick_faiss(self.vectors, name, 40 * inverted_lists)
        for probes in (4, 8, 16, 32, 64):
            options = faiss.IndexRefineSearchParameters(
                k_factor=3, base_index_params=faiss.IVFSearchParameters(nprobe=probes)
            )
            _, found = quick.search(few_queries, K + SEEN, params=options)
            recall = mean_recall(found[:, :K].tolist(), exact[:, :K])
            if recall >= PROMISE:
                break
        started = time.monotonic()
        quick.search(queries, K + SEEN, params=options)
        rate = len(queries) / (time.monotonic() - started)
        return [
            FaissResult("faiss Flat", flat_rate, len(few_queries), 1.0),
            FaissResult(f"faiss {name}, {probes} probed", rate, len(queries), recall),
        ]

    def als(self) -> float:
        """Users/s of recommendForAllUsers with given factors."""
        from pyspark.ml.recommendation import ALSModel

        spark = self.pipeline.spark
        rng = np.random.default_rng(4)
        users = SAMPLE["als"]
        factors = [self.random_factors(count, rng).persist() for count in (users, self.items)]
        for frame in factors:
            frame.count()
        java_model = spark._jvm.org.apache.spark.ml.recommendation.ALSModel(
            "given", RANK, *(frame._jdf for frame in factors)
        )
        model = ALSModel(java_model.setUserCol("user").setItemCol("item"))
        started = time.monotonic()
        model.recommendForAllUsers(K + SEEN).write.format("noop").mode("overwrite").save()
        rate = users / (time.monotonic() - started)
        for frame in factors:
            frame.unpersist()
        return rate

    def random_factors(
        self,
        count: int,
        rng: np.random.Generator,
    ) -> DataFrame:
        features = rng.normal(size=(count, RANK)).astype(np.float32)
        ids = np.arange(count, dtype=np.int32)
        return self.pipeline.spark.createDataFrame(
            pa.table({"id": ids, "features": list(features)})
        )

    def cross_join(self) -> float:
        """Users/s of Spark SQL's own products."""
        spark = self.pipeline.spark
        users = SAMPLE["crossJoin"]
        rows = pa.table({"item_id": names(self.items), "vector": list(self.vectors)})
        items = spark.createDataFrame(rows).persist()
        items.count()
        unseen = ~F.array_contains("seen", F.col("item_id"))
        pairs = self.profiles(users).crossJoin(items).where(unseen)
        score = F.expr("vector_inner_product(embedding, vector)")
        scored = pairs.select("user_id", "item_id", score.alias("score"))
        by_score = Window.partitionBy("user_id").orderBy(F.desc("score"))
        ranked = scored.withColumn("rank", F.row_number().over(by_score))
        top = ranked.where(F.col("rank") <= K)
        started = time.monotonic()
        top.write.format("noop").mode("overwrite").save()
        rate = users / (time.monotonic() - started)
        items.unpersist()
        return rate


def build_quick_faiss(
    vectors: np.ndarray,
    name: str,
    max_sample: int,
) -> Any:
    import faiss

    index = faiss.index_factory(DIMENSION, name, faiss.METRIC_INNER_PRODUCT)
    size = min(len(vectors), max_sample)
    index.train(vectors[np.random.default_rng(3).choice(len(vectors), size, False)])
    index.add(vectors)
    return index


def build_reordering_scann(
    vectors: np.ndarray,
    leaves: int,
    folder: Path,
) -> None:
    import scann

    builder = scann.scann_ops_pybind.builder(vectors, K, "dot_product")
    builder = builder.tree(
        num_leaves=leaves,
        num_leaves_to_search=leaves,
        training_sample_size=min(len(vectors), 250_000),
    )
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(K + SEEN)
    builder.build().serialize(str(folder), relative_path=True)


def mean_recall(lists: Iterable[Sequence[int]], exact_lists: np.ndarray) -> float:
    pairs = zip(lists, exact_lists.tolist(), strict=True)
    return float(np.mean([len({*items} & {*exact}) / K for items, exact in pairs]))


def list_differs(
    before: Column,
    after: Column,
    first_new: str,
) -> Column:
    """Whether a list differs from the one before, other than by new items that entered it.

    New items have ids from `first_new` on. Without them the list must be the beginning of the one
    before, with the same scores. A list that is missing or became shorter differs.
    """

    def ids_and_scores(items: Column) -> Column:
        return F.transform(items, lambda item: F.struct(item["item_id"], item["score"]))

    old_items = F.filter(after, lambda item: item["item_id"] < first_new)
    beginning = F.slice(before, F.lit(1), F.size(old_items))
    same = ids_and_scores(beginning).eqNullSafe(ids_and_scores(old_items))
    shorter = F.size(after) < F.size(before)
    return after.isNull() | shorter | ~same


class Results:
    """The table for people, whose rows are also printed as they come."""

    def __init__(self) -> None:
        self.console = Console(width=110)
        title = f"Top {K} out of so many items, {SEEN} seen items each"
        self.table = Table(title=title, title_justify="left")
        for name in ("side", "items", "users", "users/s", "recall", "memory"):
            self.table.add_column(name, justify="left" if name in ("side", "memory") else "right")

    def say(self, line: str) -> None:
        self.console.print(line, style="dim")

    def add(
        self,
        side: str,
        items: int,
        users: int,
        rate: float,
        recall: float | None = None,
        memory: str = "",
    ) -> None:
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        recall_text = "-" if recall is None else f"{recall:.4f}"
        self.table.add_row(side, f"{items:,}", f"{users:,}", speed, recall_text, memory)
        self.say(f"{side}, {items:,} items: {speed}/s")

    def add_share(
        self,
        side: str,
        items: int,
        users: int,
        share: float,
    ) -> None:
        """A row whose value is a share of the users and no speed."""
        self.table.add_row(side, f"{items:,}", f"{users:,}", f"{share:.2%}", "-", "")
        self.say(f"{side}, {items:,} items: {share:.2%}")


def measure_pass(shop: Shop, results: Results) -> dict[str, float]:
    """Speed, memory and recall of the pass."""
    with peaks() as peak:
        rate = shop.users / shop.time_pass(explain=False)
    memory = f"driver and JVM {peak['driver_gb']:.1f} GB, worker {peak['worker_gb']:.1f} GB"
    recall = shop.recall()
    results.add("this stage", shop.items, shop.users, rate, recall, memory)
    return {
        "users_per_s": rate,
        "recall": round(recall, 4),
        "driver_gb": round(peak["driver_gb"], 2),
        "worker_gb": round(peak["worker_gb"], 2),
    }


def compare_raw(shop: Shop, results: Results) -> dict[str, float]:
    """The pass without and with reasons, against one process without Spark: medians of rounds."""
    run_process = shop.prepare_raw()
    raw_seconds = []
    plain_seconds = []
    explained_seconds = []
    raw_gb = 0.0
    for _ in range(ROUNDS):  # in turn, so that a busy minute of the machine slows all of them
        raw = run_process()
        raw_gb = max(raw_gb, raw.gb)
        raw_seconds.append(raw.seconds)
        plain_seconds.append(shop.time_pass(explain=False))
        explained_seconds.append(shop.time_pass(explain=True))
        results.say(
            f"raw {raw.seconds:.1f} s, this stage {plain_seconds[-1]:.1f} s, "
            f"with reasons {explained_seconds[-1]:.1f} s"
        )
    plain_s = median(plain_seconds)
    explained_s = median(explained_seconds)
    rate = shop.users / plain_s
    raw_rate = shop.users / median(raw_seconds)
    explained_rate = shop.users / explained_s
    memory = f"{raw_gb:.1f} GB"
    results.add(f"the same, median of {ROUNDS}", shop.items, shop.users, rate)
    results.add("this stage, with reasons", shop.items, shop.users, explained_rate)
    results.add("raw: one process, no Spark", shop.items, shop.users, raw_rate, None, memory)
    return {
        "users_per_s": rate,
        "vs_raw": round(rate / raw_rate, 2),
        "why_share": round(1 - plain_s / explained_s, 3),
        "raw_gb": round(raw_gb, 2),
    }


def measure_rules(
    shop: Shop,
    plain_s: float,
    results: Results,
) -> dict[str, float]:
    """What rules, variants, caps and diversity cost: times `plain_s`, the seconds without any."""
    one_percent = np.random.default_rng(6).random(shop.items) < 0.01
    pairs = np.arange(shop.items) // 2
    brands = np.random.default_rng(7).integers(shop.items // 100, size=shop.items)
    variants_and_caps = shop.list_rules(variants=pairs, caps=[Cap(brands, 2)])
    rules = {
        "rule_cost": ("a rule that leaves 1 %", ListRules(one_percent.astype(np.int64))),
        "variants_caps_cost": ("pairs of variants, 2 of a brand", variants_and_caps),
        "diversity_cost": ("diversity .3", shop.list_rules(diversity=0.3)),
    }
    costs = {}
    for key, (side, list_rules) in rules.items():
        seconds = shop.time_pass(False, list_rules=list_rules)
        results.add(f"this stage, {side}", shop.items, shop.users, shop.users / seconds)
        costs[key] = round(seconds / plain_s, 2)
    return costs


def measure_churn(shop: Shop, results: Results) -> dict[str, float]:
    """Lists that change though their users didn't; see `Shop.churn`."""
    shop.time_pass(explain=False)
    figures = {}
    for key, side, rebuild_threshold in (
        ("churn", "changed lists, index with the earlier codes", REBUILD_THRESHOLD),
        ("churn_rebuilt", "changed lists, index built anew", 0.0),
    ):
        share = shop.churn(rebuild_threshold)
        results.add_share(side, shop.items, shop.users, share)
        figures[key] = round(share, 5)
    return figures


def measure_max_similarity(shop: Shop, results: Results) -> dict[str, float]:
    """The search of neighbors, and the pass with them against that of the mean, of a few users."""
    users = min(shop.users, SAMPLE["max_similarity"])
    scoring, neighbors_s = shop.max_similarity()
    items_per_s = shop.items / neighbors_s
    side = "each item's neighbors, searched once: items/s"
    results.add(side, shop.items, shop.items, items_per_s)
    mean_s = shop.time_pass(False, users=users)
    max_similarity_s = shop.time_pass(False, scoring, users)
    results.add("this stage, max_similarity", shop.items, users, users / max_similarity_s)
    return {
        "maxsim_cost": round(max_similarity_s / mean_s, 1),
        "neighbours_s": round(neighbors_s),
    }


def compare_others(
    shop: Shop,
    rate: float,
    results: Results,
) -> dict[str, float]:
    """numpy, faiss, ALS and crossJoin on a few users each, against the pass's `rate` in users/s."""
    users = np.arange(SAMPLE["numpy"])
    started = time.monotonic()
    shop.exact(users)
    exact_rate = len(users) / (time.monotonic() - started)
    results.add("numpy, exact", shop.items, len(users), exact_rate, 1.0)
    for faiss in shop.faiss():
        side = f"{faiss.name}, search alone"
        results.add(side, shop.items, faiss.queries, faiss.rate, faiss.recall)
    als_rate = shop.als()
    results.add(f"Spark ALS, rank {RANK}", shop.items, SAMPLE["als"], als_rate)
    cross_join_rate = shop.cross_join()
    side = "crossJoin, vector_inner_product"
    results.add(side, shop.items, SAMPLE["crossJoin"], cross_join_rate)
    return {"vs_exact_200k": round(rate / exact_rate, 1), "vs_als": round(rate / als_rate, 1)}


def compare_all(shop: Shop, results: Results) -> dict[str, float]:
    """All that is measured at the middle size only."""
    figures = compare_raw(shop, results)
    rate = figures["users_per_s"]
    figures |= measure_rules(shop, shop.users / rate, results)
    figures |= measure_churn(shop, results)
    figures |= measure_max_similarity(shop, results)
    return figures | compare_others(shop, rate, results)


def measure(
    spark: SparkSession, folder: Path, sizes: list[int], users: int, results: Results
) -> dict[str, float]:
    """The figures of the last line: those of the middle size, and how costs grow with the size."""
    figures: dict[str, float] = {}
    rates = {}
    reporter = Reporter(
        stage=lambda *_: None, info=results.console.print, progress=lambda *_: nullcontext()
    )
    for items in sizes:
        shop_folder = folder / str(items)
        shop_folder.mkdir()
        pipeline = Pipeline(spark, load([], [f"tables={shop_folder / 'tables'}"]), reporter)
        shop = Shop(shop_folder, items, users, pipeline, results.say)
        if items == sizes[0]:
            shop.time_pass(explain=True)  # Spark's first query takes seconds more
        measured = measure_pass(shop, results)
        rates[items] = measured["users_per_s"]
        if items == sizes[1]:
            figures = measured | compare_all(shop, results)
    figures["users_per_s"] = round(figures["users_per_s"])
    figures["cost_growth"] = round(rates[sizes[0]] / rates[sizes[2]], 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, nargs=3, default=[20_000, 200_000, 1_000_000])
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.raw:
        settings = RawSettings(**json.loads(options.raw.read_text()))
        print(json.dumps(asdict(run_raw(settings))))
        return
    if find_spec("faiss") is None:
        sys.exit("faiss isn't installed here. Get it with: make bench NAMES=recommend")
    quiet()
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        spark = session(load([], [JVM]).spark)
        spark.sparkContext.setLogLevel("FATAL")
        figures = measure(spark, Path(folder), options.items, options.users, results)
        spark.stop()
    results.console.print(results.table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
