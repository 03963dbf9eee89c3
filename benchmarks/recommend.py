"""The recommend pass: top 10 of 200,000 users with 20 seen items each, out of 20,000, 200,000 and 1,000,000 items.

    .venv/bin/python benchmarks/recommend.py [--users 200000] [--items 20000 200000 1000000]

Profiles lie in a Delta table and lists are written to one. Vectors of 384 dimensions have three levels, as a shop's
captions do: 40 families, a kind for every 50 items (0.8 of its family and noise of its own), items around their kind
(noise of 0.9 of its length); a user has 20 items of up to three kinds, drawn by a Zipf law, and their mean. Of 200,000
items the nearest has a cosine of about .68 with a user's vector, the hundredth .40, the thousandth .28.

Beside this stage at the middle size, on the same vectors and cores, in the same run: one Python process that reads the
same Parquet files, searches by ScaNN with its own reordering and as much effort, excludes in numpy and writes Parquet
(raw); the same stage under a rule that leaves 1 % of the items, with variants and caps, and with diversity; numpy's
exact search; faiss, searching alone; Spark's ALS with given factors of rank 64, and crossJoin with
vector_inner_product. Slow sides are timed on a sample of users, which the table says. max_similarity merges the items'
neighbours; how long searching these took stands in a row of its own. faiss: pip install faiss-cpu.

Churn: one new item in 500 is added to the middle catalogue, and no user changes. `churn` is the share of users whose
list differs other than by new items that entered it. Its index rests on the earlier one, as the index stage builds it.
`churn_rebuilt` is the same with an index built anew. Items and scores are compared as the table holds them.
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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

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
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.calibration import Calibration
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.spark import neighbors_file
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import recommend
from vlm4rec_spark.stages.index import IndexSettings
from vlm4rec_spark.storage import schemas

DIMENSION, SEEN, K, PROMISE = 384, 20, 10, 0.95
FAMILIES, KIND = 40, 50
ROUNDS = 3
RANK = 64
NEW_SHARE = 1 / 500
"""Of the items, so many more come before churn is measured."""
REBUILD_SHARE = IndexSettings().rebuild_threshold
SAMPLE = {
    "numpy": 1_000,
    "faiss Flat": 1_000,
    "faiss": 20_000,
    "als": 2_000,
    "crossJoin": 10,
    "max_similarity": 20_000,
}
# Both compilers, unlike our local default, which starts quicker: Spark's ALS multiplies in the JVM.
JVM = "spark.conf={spark.driver.extraJavaOptions: -XX:ReservedCodeCacheSize=256m -Xss4m}"


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass(frozen=True)
class Catalogue:
    """Unit vectors, float32 (items, DIMENSION), the kind of each item, and the same of the items that come later."""

    vectors: np.ndarray
    kinds: np.ndarray
    new_vectors: np.ndarray
    new_kinds: np.ndarray


def catalogue(items: int) -> Catalogue:
    rng = np.random.default_rng(0)
    kinds = max(20, items // KIND)
    families = rng.normal(size=(FAMILIES, DIMENSION)).astype(np.float32)
    centres = 0.8 * families[rng.integers(FAMILIES, size=kinds)]
    centres = centres + rng.normal(size=(kinds, DIMENSION))
    item_kinds = rng.integers(kinds, size=items)
    vectors = around(centres, item_kinds, rng)
    new_kinds = rng.integers(kinds, size=max(1, round(items * NEW_SHARE)))
    return Catalogue(vectors, item_kinds, around(centres, new_kinds, rng), new_kinds)


def around(centres: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A unit vector near the centre of each of the kinds, float32 (items, DIMENSION)."""
    vectors = np.empty((len(kinds), DIMENSION), np.float32)
    for start in range(0, len(kinds), 50_000):
        part = kinds[start : start + 50_000]
        noise = 0.9 * rng.normal(size=(len(part), DIMENSION))
        vectors[start : start + len(part)] = unit(centres[part] + noise)
    return vectors


def texts(kinds: np.ndarray) -> list[str]:
    return [f"thing of kind{kind}" for kind in kinds]


def histories(kind: np.ndarray, users: int) -> np.ndarray:
    """Positions of SEEN items of each user, (users, SEEN); one may stand twice."""
    rng, kinds = np.random.default_rng(1), int(kind.max()) + 1
    order = np.argsort(kind, kind="stable")
    starts = np.searchsorted(kind[order], np.arange(kinds + 1))
    tastes = rng.permutation(kinds)[rng.zipf(1.3, size=(users, 3)) % kinds]
    which = tastes[np.arange(users)[:, None], rng.integers(3, size=(users, SEEN))]
    size = np.maximum(1, starts[which + 1] - starts[which])
    return order[
        np.minimum(starts[which] + rng.integers(2**31, size=which.shape) % size, len(kind) - 1)
    ]


def names(items: int) -> np.ndarray:
    return np.char.mod("i%07d", np.arange(items))


def write_profiles(folder: Path, vectors: np.ndarray, met: np.ndarray) -> None:
    """Parquet files of rows of `profiles`."""
    ids = pa.array(names(len(vectors)), pa.string())
    for start in range(0, len(met), 50_000):
        part = met[start : start + 50_000]
        seen = [np.unique(row) for row in part]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in seen])]).astype(np.int32)
        each = np.arange(len(part) + 1, dtype=np.int32)
        weighted = pa.StructArray.from_arrays(
            [ids.take(pa.array(part.ravel())), pa.array(np.ones(part.size))],
            names=["item_id", "weight"],
        )
        at = pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * len(part), pa.timestamp("us", "UTC"))
        rows = {
            "user_id": pa.array(np.char.mod("u%07d", np.arange(start, start + len(part)))),
            "representation": pa.array(["title"] * len(part)),
            "history": pa.ListArray.from_arrays(pa.array(each * SEEN), weighted),
            "seen": pa.ListArray.from_arrays(
                pa.array(offsets), ids.take(pa.array(np.concatenate(seen)))
            ),
            "embedding": pa.ListArray.from_arrays(
                pa.array(each * DIMENSION), pa.array(unit(vectors[part].mean(axis=1)).ravel())
            ),
            "events": pa.array(np.full(len(part), SEEN)),
            "last_event_at": at,
        }
        pq.write_table(pa.table(rows), folder / f"{start}.parquet")


def by_raw(settings: Path) -> None:
    """One process, no Spark and no reasons; prints its seconds, its largest memory and nothing else."""
    import scann

    told = json.loads(settings.read_text())
    started = time.monotonic()
    searcher = scann.scann_ops_pybind.load_searcher(told["scann"])
    ids = pq.read_table(Path(told["index"]) / "ids.parquet")["item_id"].combine_chunks()
    place, out, items = {name: n for n, name in enumerate(ids.to_pylist())}, None, len(ids)
    for file in told["files"]:
        for batch in pq.ParquetFile(file).iter_batches(
            8_192, columns=["user_id", "embedding", "seen"]
        ):
            queries = np.asarray(batch.column("embedding").flatten()).reshape(len(batch), -1)
            seen = batch.column("seen")
            named = seen.flatten().dictionary_encode()
            known = np.array([place.get(name, -1) for name in named.dictionary.to_pylist()])[
                named.indices.to_numpy()
            ]
            owner = np.repeat(np.arange(len(batch)), np.asarray(seen.value_lengths()))
            found, scores = searcher.search_batched_parallel(
                queries,
                final_num_neighbors=K + SEEN,
                leaves_to_search=told["leaves"],
                pre_reorder_num_neighbors=told["candidates"] + SEEN,
            )
            out_of = np.isin(
                np.arange(len(batch))[:, None] * items + found.astype(np.int64),
                owner * items + known,
            )
            first = np.argsort(out_of, axis=1, kind="stable")[:, :K]
            top, best = (np.take_along_axis(each, first, 1) for each in (found, scores))
            made = pa.StructArray.from_arrays(
                [ids.take(pa.array(top.ravel())), pa.array(best.ravel())],
                names=["item_id", "score"],
            )
            lists = pa.ListArray.from_arrays(
                pa.array(np.arange(len(batch) + 1, dtype=np.int32) * K), made
            )
            rows = pa.table({"user_id": batch.column("user_id"), "items": lists})
            out = out or pq.ParquetWriter(told["out"], rows.schema)
            out.write_table(rows)
    assert out is not None
    out.close()
    print(
        json.dumps(
            {
                "seconds": time.monotonic() - started,
                "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }
        )
    )


class Shop:
    """One catalogue with its index, profiles and exact lists of a sample."""

    def __init__(
        self, folder: Path, items: int, users: int, pipeline: Pipeline, say: Callable[[str], None]
    ):
        self.folder, self.items, self.users, self.pipeline = folder, items, users, pipeline
        self.catalogue = catalogue(items)
        self.vectors = self.catalogue.vectors
        self.met = histories(self.catalogue.kinds, users)
        self.append_profiles()
        self.table = pipeline.tables.name_of(schemas.PROFILES)
        started = time.monotonic()
        self.index = folder / "index" / f"of-{items}"
        Searcher.build(
            self.index,
            self.index.name,
            names(items).tolist(),
            self.vectors,
            texts(self.catalogue.kinds),
            1,
        )
        say(f"{items:,} items: index built in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        sample = self.profiles().orderBy(F.xxhash64("user_id")).limit(1_000)
        searcher = Searcher.open(self.index, verify=False)
        self.sample = sample.select("embedding", "history", "seen").toArrow()
        self.measured = self.calibrate(searcher)
        words = self.measured.words(searcher.manifest["leaves"])
        seconds = time.monotonic() - started
        say(
            f"{items:,} items: calibrated in {seconds:.0f} s: {words}, recall {self.measured.recall:.4f}"
        )

    def append_profiles(self) -> None:
        parquet = self.folder / "rows"
        parquet.mkdir()
        write_profiles(parquet, self.vectors, self.met)
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
        """By every item's neighbours, and the seconds that searching them takes."""
        started, effort = time.monotonic(), self.measured.effort or Effort(1, K)
        spark, most = self.pipeline.spark, self.pipeline.config.index.broadcast_gb
        opens = ship(spark, self.index, most, Searcher.open)
        deep = Effort(
            effort.leaves, neighbors.needed_depth(effort.candidates, self.sample, self.items)
        )
        made = neighbors_file.build(spark, opens(), opens, deep, self.folder / "neighbours")
        seconds = time.monotonic() - started
        return recommend.ProfileScoring(
            "max_similarity", open_neighbors=ship(spark, made, most, Neighbors.open)
        ), seconds

    def time_pass(
        self,
        explain: bool,
        matching: recommend.ProfileScoring = recommend.CONTENT,
        users: int | None = None,
        offer: ListRules | None = None,
    ) -> float:
        """Seconds of the pass, from one Delta table to the other."""
        started = time.monotonic()
        offer = offer or self.offer()
        opens = self.ship(self.index)
        lists = recommend.recommend(
            self.profiles(users), opens, offer, K, self.measured.effort, matching, explain
        )
        stamped = lists.select(
            "*",
            F.lit(schemas.DEFAULT_LIST).alias("list"),
            F.lit("run").alias("run_id"),
            F.current_timestamp().alias("generated_at"),
        )
        self.pipeline.tables.replace(schemas.RECOMMENDATIONS, stamped)
        return time.monotonic() - started

    def offer(self, **settings: object) -> ListRules:
        return ListRules(np.ones(self.items, np.int64), **settings)

    def ship(self, folder: Path) -> Callable[[], Searcher]:
        broadcast_gb = self.pipeline.config.index.broadcast_gb
        return ship(self.pipeline.spark, folder, broadcast_gb, Searcher.open)

    def churn(self, rebuild_threshold: float) -> float:
        """Share of the lists in the table that change when the new items come, other than by these.

        The new index rests on the old one if `rebuild_share` allows it. The search is calibrated again, as in a run.
        """
        folder = self.index_with_new_items(rebuild_threshold)
        searcher = Searcher.open(folder, verify=False)
        lists = recommend.recommend(
            self.profiles(),
            self.ship(folder),
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
        """Of the lists in the table, on a thousand users that the calibration hasn't seen but by chance."""
        users = np.random.default_rng(2).choice(self.users, 1_000, replace=False)
        wanted = [f"u{user:07d}" for user in users]
        rows = self.pipeline.tables.read(schemas.RECOMMENDATIONS).where(
            F.col("user_id").isin(wanted)
        )
        found = {
            row["user_id"]: [int(item["item_id"][1:]) for item in row["items"]]
            for row in rows.collect()
        }
        assert {len(items) for items in found.values()} == {K}
        truth = self.exact(users)
        return float(
            np.mean(
                [
                    len({*found[name]} & {*best}) / K
                    for name, best in zip(wanted, truth, strict=True)
                ]
            )
        )

    def exact(self, users: np.ndarray) -> np.ndarray:
        """Plain numpy: all products, -inf where seen, the K best; 64 users at a time."""
        tops = []
        for start in range(0, len(users), 64):
            some = self.met[users[start : start + 64]]
            scores = unit(self.vectors[some].mean(axis=1)) @ self.vectors.T
            np.put_along_axis(scores, some, -np.inf, axis=1)
            best = np.argpartition(-scores, K, axis=1)[:, :K]
            tops.append(
                np.take_along_axis(
                    best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1
                )
            )
        return np.concatenate(tops)

    def raw(self) -> Callable[[], tuple[float, float]]:
        """Builds an index that reorders; what it returns runs the process without Spark: seconds and GB."""
        import scann

        effort = self.measured.effort or Effort(1, K)
        leaves = Searcher.open(self.index, verify=False).manifest["leaves"]
        own = self.folder / "raw-scann"
        own.mkdir()
        scann.scann_ops_pybind.builder(self.vectors, K, "dot_product").tree(
            num_leaves=leaves,
            num_leaves_to_search=leaves,
            training_sample_size=min(self.items, 250_000),
        ).score_ah(2, anisotropic_quantization_threshold=0.2).reorder(K + SEEN).build().serialize(
            str(own), relative_path=True
        )
        told = self.folder / "raw.json"
        told.write_text(
            json.dumps(
                {
                    "scann": str(own),
                    "index": str(self.index),
                    "files": DeltaTable(self.table).file_uris(),
                    "leaves": effort.leaves,
                    "candidates": effort.candidates,
                    "out": str(self.folder / "raw.parquet"),
                }
            )
        )
        command = [sys.executable, __file__, "--raw", str(told)]

        def run() -> tuple[float, float]:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            said = json.loads(done.stdout.splitlines()[-1])
            return said["seconds"], said["gb"]

        return run

    def faiss(self) -> dict[str, tuple[float, int, float]]:
        """Of each kind of index users/s of the search alone, users, and recall with nothing excluded."""
        import faiss

        users = np.arange(SAMPLE["faiss"])
        queries = np.ascontiguousarray(unit(self.vectors[self.met[users]].mean(axis=1)))
        flat, found = faiss.IndexFlatIP(DIMENSION), {}
        flat.add(self.vectors)
        few = SAMPLE["faiss Flat"]
        started = time.monotonic()
        _, truth = flat.search(queries[:few], K + SEEN)
        found["faiss Flat"] = few / (time.monotonic() - started), few, 1.0
        lists = max(64, round(self.items**0.5) * 2)
        name = f"IVF{lists},PQ{DIMENSION // 2}x4fs,RFlat"
        quick = faiss.index_factory(DIMENSION, name, faiss.METRIC_INNER_PRODUCT)
        quick.train(
            self.vectors[
                np.random.default_rng(3).choice(self.items, min(self.items, 40 * lists), False)
            ]
        )
        quick.add(self.vectors)
        for probes in (4, 8, 16, 32, 64):
            options = faiss.IndexRefineSearchParameters(
                k_factor=3, base_index_params=faiss.IVFSearchParameters(nprobe=probes)
            )
            _, some = quick.search(queries[:few], K + SEEN, params=options)
            recall = float(
                np.mean([len({*a[:K]} & {*b[:K]}) / K for a, b in zip(some, truth, strict=True)])
            )
            if recall >= PROMISE:
                break
        started = time.monotonic()
        quick.search(queries, K + SEEN, params=options)
        found[f"faiss {name}, {probes} probed"] = (
            len(queries) / (time.monotonic() - started),
            len(queries),
            recall,
        )
        return found

    def als(self) -> float:
        """Users/s of recommendForAllUsers with given factors."""
        spark, rng, users = self.pipeline.spark, np.random.default_rng(4), SAMPLE["als"]
        frames = [
            spark.createDataFrame(
                pa.table(
                    {
                        "id": pa.array(np.arange(count, dtype=np.int32)),
                        "features": pa.array(
                            list(rng.normal(size=(count, RANK)).astype(np.float32))
                        ),
                    }
                )
            )
            for count in (users, self.items)
        ]
        factors = [frame.persist() for frame in frames]
        for frame in factors:
            frame.count()
        from pyspark.ml.recommendation import ALSModel

        made = spark._jvm.org.apache.spark.ml.recommendation.ALSModel(
            "given", RANK, *(each._jdf for each in factors)
        )
        model = ALSModel(made.setUserCol("user").setItemCol("item"))
        started = time.monotonic()
        model.recommendForAllUsers(K + SEEN).write.format("noop").mode("overwrite").save()
        rate = users / (time.monotonic() - started)
        for frame in factors:
            frame.unpersist()
        return rate

    def cross_join(self) -> float:
        """Users/s of Spark SQL's own products."""
        spark, users = self.pipeline.spark, SAMPLE["crossJoin"]
        items = spark.createDataFrame(
            pa.table({"item_id": names(self.items), "vector": list(self.vectors)})
        ).persist()
        items.count()
        score = F.expr("vector_inner_product(embedding, vector)")
        pairs = (
            self.profiles(users).crossJoin(items).where(~F.array_contains("seen", F.col("item_id")))
        )
        rank = F.row_number().over(Window.partitionBy("user_id").orderBy(F.desc("score")))
        scored = pairs.select("user_id", "item_id", score.alias("score"))
        top = scored.withColumn("rank", rank).where(F.col("rank") <= K)
        started = time.monotonic()
        top.write.format("noop").mode("overwrite").save()
        rate = users / (time.monotonic() - started)
        items.unpersist()
        return rate


def list_differs(before: Column, after: Column, first_new: str) -> Column:
    """Whether a list differs from the one before, other than by items from the id `first_new` on that entered it.

    What is left of the list without new items must be the beginning of the one before, with the same scores. A list
    that is missing or became shorter differs.
    """

    def places(items: Column) -> Column:
        return F.transform(items, lambda item: F.struct(item["item_id"], item["score"]))

    old = F.filter(after, lambda item: item["item_id"] < first_new)
    same = places(F.slice(before, F.lit(1), F.size(old))).eqNullSafe(places(old))
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

    def add_share(self, side: str, items: int, users: int, share: float) -> None:
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
    """The pass without and with reasons, against one process without Spark: the median of several rounds of each."""
    run_raw = shop.raw()
    rounds = []
    memory = []
    for _ in range(ROUNDS):  # in turn, so that a busy minute of the machine slows all of them
        raw_s, raw_gb = run_raw()
        rounds.append((raw_s, shop.time_pass(explain=False), shop.time_pass(explain=True)))
        memory.append(raw_gb)
        results.say(
            f"raw {raw_s:.1f} s, this stage {rounds[-1][1]:.1f} s, with why {rounds[-1][2]:.1f} s"
        )
    raw_s, plain_s, why_s = (median(seconds) for seconds in zip(*rounds, strict=True))
    raw_gb = max(memory)
    rate = shop.users / plain_s
    results.add(f"the same, median of {ROUNDS}", shop.items, shop.users, rate)
    results.add("this stage, with why", shop.items, shop.users, shop.users / why_s)
    raw_rate = shop.users / raw_s
    results.add(
        "raw: one process, no Spark", shop.items, shop.users, raw_rate, None, f"{raw_gb:.1f} GB"
    )
    return {
        "users_per_s": rate,
        "vs_raw": round(rate / raw_rate, 2),
        "why_share": round(1 - plain_s / why_s, 3),
        "raw_gb": round(raw_gb, 2),
    }


def measure_rules(shop: Shop, plain_s: float, results: Results) -> dict[str, float]:
    """What rules, shared places and diversity cost: times `plain_s`, the seconds of the pass without any."""
    one_percent = np.random.default_rng(6).random(shop.items) < 0.01
    pairs = np.arange(shop.items) // 2
    brands = np.random.default_rng(7).integers(shop.items // 100, size=shop.items)
    offers = {
        "rule_cost": ("a rule that leaves 1 %", ListRules(one_percent.astype(np.int64))),
        "variants_caps_cost": (
            "pairs of variants, 2 of a brand",
            shop.offer(variants=pairs, caps=[(brands, 2)]),
        ),
        "diversity_cost": ("diversity .3", shop.offer(diversity=0.3)),
    }
    costs = {}
    for key, (side, offer) in offers.items():
        seconds = shop.time_pass(False, offer=offer)
        results.add(f"this stage, {side}", shop.items, shop.users, shop.users / seconds)
        costs[key] = round(seconds / plain_s, 2)
    return costs


def measure_churn(shop: Shop, results: Results) -> dict[str, float]:
    """Lists that change though nothing about their users did; see `Shop.churn`."""
    shop.time_pass(explain=False)
    figures = {}
    for key, side, rebuild_threshold in (
        ("churn", "changed lists, index on the earlier one", REBUILD_SHARE),
        ("churn_rebuilt", "changed lists, index built anew", 0.0),
    ):
        share = shop.churn(rebuild_threshold)
        results.add_share(side, shop.items, shop.users, share)
        figures[key] = round(share, 5)
    return figures


def measure_max_similarity(shop: Shop, results: Results) -> dict[str, float]:
    """The neighbours that max_similarity needs, and its pass against that of the mean, both of a few users."""
    users = min(shop.users, SAMPLE["max_similarity"])
    matching, neighbours_s = shop.max_similarity()
    items_per_s = shop.items / neighbours_s
    results.add(
        "each item's neighbours, searched once: items/s", shop.items, shop.items, items_per_s
    )
    mean_s = shop.time_pass(False, users=users)
    max_similarity_s = shop.time_pass(False, matching, users)
    results.add("this stage, max_similarity", shop.items, users, users / max_similarity_s)
    return {
        "maxsim_cost": round(max_similarity_s / mean_s, 1),
        "neighbours_s": round(neighbours_s),
    }


def compare_others(shop: Shop, rate: float, results: Results) -> dict[str, float]:
    """numpy, faiss, ALS and crossJoin on a few users each, against the `rate` of the pass in users/s."""
    users = np.arange(SAMPLE["numpy"])
    started = time.monotonic()
    shop.exact(users)
    exact_rate = len(users) / (time.monotonic() - started)
    results.add("numpy, exact", shop.items, len(users), exact_rate, 1.0)
    for name, (faiss_rate, queries, recall) in shop.faiss().items():
        results.add(f"{name}, search alone", shop.items, queries, faiss_rate, recall)
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
    """The figures of the last line: those of the middle size, and how costs grow from the first to the last size."""
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
        by_raw(options.raw)
        return
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
