"""The recommend pass: top 10 of 200,000 users with 20 seen items each, out of 20,000, 200,000 and 1,000,000 items.

    .venv/bin/python benchmarks/recommend.py [--users 200000] [--items 20000 200000 1000000]

Profiles lie in a Delta table and lists are written to one. Vectors of 384 dimensions have three levels, as a shop's
captions do: 40 families, a kind for every 50 items (0.8 of its family and noise of its own), items around their kind
(noise of 0.9 of its length); a user has 20 items of up to three kinds, drawn by a Zipf law, and their mean. Of 200,000
items the nearest has a cosine of about .68 with a user's vector, the hundredth .40, the thousandth .28.

Beside this stage at the middle size, on the same vectors and cores, in the same run: one Python process that reads the
same Parquet files, searches by ScaNN with its own reordering and as much effort, excludes in numpy and writes Parquet
(raw); the same stage under a rule that leaves 1 % of the items, with variants and caps, with diversity, and in a night
after which a fiftieth of the users and one in 500 items are others; numpy's exact search; faiss, searching alone;
Spark's ALS with given factors of rank 64, and crossJoin with vector_inner_product. Slow sides are timed on a sample of
users, which the table says. max_similarity merges the items' neighbours; how long searching these took stands in a row
of its own. faiss: pip install faiss-cpu.
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
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from memory import peaks
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from rich.console import Console
from rich.table import Table

from vlm4rec_spark import schemas
from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.models.neighbours import Neighbours
from vlm4rec_spark.models.offer import Offer
from vlm4rec_spark.models.searcher import Effort, Searcher
from vlm4rec_spark.pipeline import Pipeline, Voice
from vlm4rec_spark.session import session
from vlm4rec_spark.stages import index, neighbours, recommend

DIMENSION, SEEN, K, PROMISE = 384, 20, 10, 0.95
FAMILIES, KIND = 40, 50
ROUNDS = 3
RANK = 64
SAMPLE = {"numpy": 1_000, "faiss Flat": 1_000, "faiss": 20_000, "als": 2_000, "crossJoin": 10, "max_similarity": 20_000}
# Both compilers, unlike our local default, which starts quicker: Spark's ALS multiplies in the JVM.
JVM = "spark.conf={spark.driver.extraJavaOptions: -XX:ReservedCodeCacheSize=256m -Xss4m}"


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def catalogue(items: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors, float32 (items, DIMENSION), and the kind of each item."""
    rng, kinds = np.random.default_rng(0), max(20, items // KIND)
    families = rng.normal(size=(FAMILIES, DIMENSION)).astype(np.float32)
    centres = 0.8 * families[rng.integers(FAMILIES, size=kinds)] + rng.normal(size=(kinds, DIMENSION))
    kind = rng.integers(kinds, size=items)
    vectors = np.empty((items, DIMENSION), np.float32)
    for start in range(0, items, 50_000):
        part = kind[start : start + 50_000]
        vectors[start : start + len(part)] = unit(centres[part] + 0.9 * rng.normal(size=(len(part), DIMENSION)))
    return vectors, kind


def histories(kind: np.ndarray, users: int) -> np.ndarray:
    """Positions of SEEN items of each user, (users, SEEN); one may stand twice."""
    rng, kinds = np.random.default_rng(1), int(kind.max()) + 1
    order = np.argsort(kind, kind="stable")
    starts = np.searchsorted(kind[order], np.arange(kinds + 1))
    tastes = rng.permutation(kinds)[rng.zipf(1.3, size=(users, 3)) % kinds]
    which = tastes[np.arange(users)[:, None], rng.integers(3, size=(users, SEEN))]
    size = np.maximum(1, starts[which + 1] - starts[which])
    return order[np.minimum(starts[which] + rng.integers(2**31, size=which.shape) % size, len(kind) - 1)]


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
            [ids.take(pa.array(part.ravel())), pa.array(np.ones(part.size))], names=["item_id", "weight"]
        )
        at = pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * len(part), pa.timestamp("us", "UTC"))
        rows = {
            "user_id": pa.array(np.char.mod("u%07d", np.arange(start, start + len(part)))),
            "representation": pa.array(["title"] * len(part)),
            "history": pa.ListArray.from_arrays(pa.array(each * SEEN), weighted),
            "seen": pa.ListArray.from_arrays(pa.array(offsets), ids.take(pa.array(np.concatenate(seen)))),
            "embedding": pa.ListArray.from_arrays(
                pa.array(each * DIMENSION), pa.array(unit(vectors[part].mean(axis=1)).ravel())
            ),
            "events": pa.array(np.full(len(part), SEEN)), "last_event_at": at,
        }  # fmt: skip
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
        for batch in pq.ParquetFile(file).iter_batches(8_192, columns=["user_id", "embedding", "seen"]):
            queries = np.asarray(batch.column("embedding").flatten()).reshape(len(batch), -1)
            seen = batch.column("seen")
            named = seen.flatten().dictionary_encode()
            known = np.array([place.get(name, -1) for name in named.dictionary.to_pylist()])[named.indices.to_numpy()]
            owner = np.repeat(np.arange(len(batch)), np.asarray(seen.value_lengths()))
            found, scores = searcher.search_batched_parallel(
                queries, final_num_neighbors=K + SEEN, leaves_to_search=told["leaves"],
                pre_reorder_num_neighbors=told["candidates"] + SEEN,
            )  # fmt: skip
            out_of = np.isin(np.arange(len(batch))[:, None] * items + found.astype(np.int64), owner * items + known)
            first = np.argsort(out_of, axis=1, kind="stable")[:, :K]
            top, best = (np.take_along_axis(each, first, 1) for each in (found, scores))
            made = pa.StructArray.from_arrays(
                [ids.take(pa.array(top.ravel())), pa.array(best.ravel())], names=["item_id", "score"]
            )
            lists = pa.ListArray.from_arrays(pa.array(np.arange(len(batch) + 1, dtype=np.int32) * K), made)
            rows = pa.table({"user_id": batch.column("user_id"), "items": lists})
            out = out or pq.ParquetWriter(told["out"], rows.schema)
            out.write_table(rows)
    assert out is not None
    out.close()
    print(json.dumps({"seconds": time.monotonic() - started,
                      "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))  # fmt: skip


class Shop:
    """One catalogue with its index, profiles and exact lists of a sample."""

    def __init__(self, folder: Path, items: int, users: int, pipeline: Pipeline, say: Callable[[str], None]):
        self.folder, self.items, self.users, self.pipeline = folder, items, users, pipeline
        self.vectors, kind = catalogue(items)
        self.met = histories(kind, users)
        tables = pipeline.tables
        aside = folder / "rows"
        aside.mkdir()
        write_profiles(aside, self.vectors, self.met)
        tables.append(schemas.PROFILES, pipeline.spark.read.parquet(str(aside)).select(*schemas.PROFILES.columns))
        shutil.rmtree(aside)
        self.table = tables.place(schemas.PROFILES)
        started = time.monotonic()
        texts = [f"thing of kind{k}" for k in kind]
        self.index = folder / "index" / f"of-{items}"
        Searcher.build(self.index, self.index.name, names(items).tolist(), self.vectors, texts, 1)
        say(f"{items:,} items: index built in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        sample = tables.read(schemas.PROFILES).orderBy(F.xxhash64("user_id")).limit(1_000)
        searcher = Searcher.open(self.index, verify=False)
        self.sample = sample.select("embedding", "history", "seen").toArrow()
        self.measured = recommend.calibrate(searcher, self.sample, Offer(np.ones(items, np.int64)), K, PROMISE)
        say(f"{items:,} items: calibrated in {time.monotonic() - started:.0f} s: "
            f"{self.measured.words(searcher.manifest['leaves'])}, recall {self.measured.recall:.4f}")  # fmt: skip

    def profiles(self, users: int | None = None) -> DataFrame:
        rows = self.pipeline.tables.read(schemas.PROFILES)
        return rows if users is None else rows.where(F.col("user_id") < f"u{users:07d}")

    def max_similarity(self) -> tuple[recommend.Matching, float]:
        """By every item's neighbours, and the seconds that searching them takes."""
        started, effort = time.monotonic(), self.measured.effort or Effort(1, K)
        spark, most = self.pipeline.spark, self.pipeline.config.index.broadcast_gb
        opens = index.ship(spark, self.index, most, Searcher.open)
        deep = Effort(effort.leaves, neighbours.depth(effort.candidates, self.sample, self.items))
        made = neighbours.build(spark, opens(), opens, deep, self.folder / "neighbours")
        seconds = time.monotonic() - started
        return recommend.Matching("max_similarity", neighbours=index.ship(spark, made, most, Neighbours.open)), seconds

    def ours(
        self, why: bool, matching: recommend.Matching = recommend.CONTENT, users: int | None = None,
        offer: Offer | None = None,
    ) -> float:  # fmt: skip
        """Seconds of the pass, from one Delta table to the other."""
        started = time.monotonic()
        lists = self._lists(recommend.made_of(self.profiles(users)), offer or self.offer(), matching, why)
        self.pipeline.tables.replace(schemas.RECOMMENDATIONS, lists)
        return time.monotonic() - started

    def night(self) -> tuple[float, int]:
        """Seconds of a run after which a fiftieth of the users and one in 500 items are others, and its lists."""
        started, tables = time.monotonic(), self.pipeline.tables
        news = np.random.default_rng(5).random(self.items) < 0.002
        profiles = recommend.made_of(self.profiles())
        other = F.when(F.xxhash64("user_id") % 50 == 0, 1).otherwise(0)
        profiles = profiles.withColumn("made_of", F.col("made_of").bitwiseXOR(other.cast("bigint")))
        profiles = profiles.join(recommend.standing(tables.read(schemas.RECOMMENDATIONS)), on="user_id", how="left")
        made = tables.staged(
            schemas.RECOMMENDATIONS, self._lists(profiles, self.offer(), recommend.CONTENT, False, news)
        )
        tables.revise(schemas.RECOMMENDATIONS, made.select("user_id"), made)
        seconds, lists = time.monotonic() - started, made.count()
        tables.unstage(schemas.RECOMMENDATIONS)
        return seconds, lists

    def offer(self, **settings: object) -> Offer:
        return Offer(np.ones(self.items, np.int64), **settings)

    def _lists(
        self, profiles: DataFrame, offer: Offer, matching: recommend.Matching, why: bool,
        news: np.ndarray | None = None,
    ) -> DataFrame:  # fmt: skip
        opens = index.ship(self.pipeline.spark, self.index, self.pipeline.config.index.broadcast_gb, Searcher.open)
        lists = recommend.recommend(profiles, opens, offer, K, self.measured.effort, matching, why, news)
        return lists.select("*", F.lit("run").alias("run_id"), F.current_timestamp().alias("generated_at"))

    def recall(self) -> float:
        """Of the lists in the table, on a thousand users that the calibration hasn't seen but by chance."""
        users = np.random.default_rng(2).choice(self.users, 1_000, replace=False)
        wanted = [f"u{user:07d}" for user in users]
        rows = self.pipeline.tables.read(schemas.RECOMMENDATIONS).where(F.col("user_id").isin(wanted))
        found = {row["user_id"]: [int(item["item_id"][1:]) for item in row["items"]] for row in rows.collect()}
        assert {len(items) for items in found.values()} == {K}
        truth = self.exact(users)
        return float(np.mean([len({*found[name]} & {*best}) / K for name, best in zip(wanted, truth, strict=True)]))

    def exact(self, users: np.ndarray) -> np.ndarray:
        """Plain numpy: all products, -inf where seen, the K best; 64 users at a time."""
        tops = []
        for start in range(0, len(users), 64):
            some = self.met[users[start : start + 64]]
            scores = unit(self.vectors[some].mean(axis=1)) @ self.vectors.T
            np.put_along_axis(scores, some, -np.inf, axis=1)
            best = np.argpartition(-scores, K, axis=1)[:, :K]
            tops.append(np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1))
        return np.concatenate(tops)

    def raw(self) -> Callable[[], tuple[float, float]]:
        """Builds an index that reorders; what it returns runs the process without Spark: seconds and GB."""
        import scann

        effort = self.measured.effort or Effort(1, K)
        leaves = Searcher.open(self.index, verify=False).manifest["leaves"]
        own = self.folder / "raw-scann"
        own.mkdir()
        scann.scann_ops_pybind.builder(self.vectors, K, "dot_product").tree(
            num_leaves=leaves, num_leaves_to_search=leaves, training_sample_size=min(self.items, 250_000)
        ).score_ah(2, anisotropic_quantization_threshold=0.2).reorder(K + SEEN).build().serialize(
            str(own), relative_path=True
        )
        told = self.folder / "raw.json"
        told.write_text(json.dumps({
            "scann": str(own), "index": str(self.index), "files": DeltaTable(self.table).file_uris(),
            "leaves": effort.leaves, "candidates": effort.candidates, "out": str(self.folder / "raw.parquet"),
        }))  # fmt: skip
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
        quick.train(self.vectors[np.random.default_rng(3).choice(self.items, min(self.items, 40 * lists), False)])
        quick.add(self.vectors)
        for probes in (4, 8, 16, 32, 64):
            options = faiss.IndexRefineSearchParameters(
                k_factor=3, base_index_params=faiss.IVFSearchParameters(nprobe=probes)
            )
            _, some = quick.search(queries[:few], K + SEEN, params=options)
            recall = float(np.mean([len({*a[:K]} & {*b[:K]}) / K for a, b in zip(some, truth, strict=True)]))
            if recall >= PROMISE:
                break
        started = time.monotonic()
        quick.search(queries, K + SEEN, params=options)
        found[f"faiss {name}, {probes} probed"] = len(queries) / (time.monotonic() - started), len(queries), recall
        return found

    def als(self) -> float:
        """Users/s of recommendForAllUsers with given factors."""
        spark, rng, users = self.pipeline.spark, np.random.default_rng(4), SAMPLE["als"]
        frames = [
            spark.createDataFrame(pa.table({
                "id": pa.array(np.arange(count, dtype=np.int32)),
                "features": pa.array(list(rng.normal(size=(count, RANK)).astype(np.float32))),
            }))
            for count in (users, self.items)
        ]  # fmt: skip
        factors = [frame.persist() for frame in frames]
        for frame in factors:
            frame.count()
        from pyspark.ml.recommendation import ALSModel

        made = spark._jvm.org.apache.spark.ml.recommendation.ALSModel("given", RANK, *(each._jdf for each in factors))
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
        items = spark.createDataFrame(pa.table({"item_id": names(self.items), "vector": list(self.vectors)})).persist()
        items.count()
        score = F.expr("vector_inner_product(embedding, vector)")
        pairs = self.profiles(users).crossJoin(items).where(~F.array_contains("seen", F.col("item_id")))
        rank = F.row_number().over(Window.partitionBy("user_id").orderBy(F.desc("score")))
        scored = pairs.select("user_id", "item_id", score.alias("score"))
        top = scored.withColumn("rank", rank).where(F.col("rank") <= K)
        started = time.monotonic()
        top.write.format("noop").mode("overwrite").save()
        rate = users / (time.monotonic() - started)
        items.unpersist()
        return rate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--users", type=int, default=200_000)
    options.add_argument("--items", type=int, nargs=3, default=[20_000, 200_000, 1_000_000])
    options.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.raw:
        by_raw(given.raw)
        return
    console = Console(width=110)

    def say(line: str) -> None:
        console.print(line, style="dim")

    quiet()
    table = Table(title=f"Top {K} out of so many items, {SEEN} seen items each", title_justify="left")
    for name in ("side", "items", "users", "users/s", "recall", "memory"):
        table.add_column(name, justify="left" if name in ("side", "memory") else "right")

    def told(side: str, items: int, users: int, rate: float, recall: float | None = None, memory: str = "") -> None:
        cells = f"{items:,}", f"{users:,}", f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        table.add_row(side, *cells, "-" if recall is None else f"{recall:.4f}", memory)
        say(f"{side}, {items:,} items: {cells[2]}/s")

    rates, line = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        spark = session(load([], [JVM]).spark)
        spark.sparkContext.setLogLevel("FATAL")
        voice = Voice(enter=lambda *_: None, say=console.print, watch=lambda *_: nullcontext())
        middle = given.items[1]
        for items in given.items:
            folder = Path(temporary) / str(items)
            folder.mkdir()
            pipeline = Pipeline(spark, load([], [f"tables={folder / 'tables'}"]), voice)
            shop = Shop(folder, items, given.users, pipeline, say)
            if items == given.items[0]:
                shop.ours(why=True)  # Spark's first query takes seconds more
            with peaks() as peak:
                rates[items] = given.users / shop.ours(why=False)
            held = f"driver and JVM {peak['driver_gb']:.1f} GB, worker {peak['worker_gb']:.1f} GB"
            recall = shop.recall()
            told("this stage", items, given.users, rates[items], recall, held)
            if items != middle:
                continue
            line |= {"recall": round(recall, 4), "driver_gb": round(peak["driver_gb"], 2),
                     "worker_gb": round(peak["worker_gb"], 2)}  # fmt: skip
            raw, rounds = shop.raw(), []
            for _ in range(ROUNDS):  # in turn, so that a busy minute of the machine is everybody's
                seconds, gb = raw()
                rounds.append((seconds, shop.ours(why=False), shop.ours(why=True)))
                say(f"raw {seconds:.1f} s, this stage {rounds[-1][1]:.1f} s, with why {rounds[-1][2]:.1f} s")
            seconds, bare, reasoned = (median(column) for column in zip(*rounds, strict=True))
            rates[items], with_why = given.users / bare, given.users / reasoned
            told(f"the same, median of {ROUNDS}", items, given.users, rates[items])
            told("this stage, with why", items, given.users, with_why)
            one = np.random.default_rng(6).random(items) < 0.01
            pairs, brands = np.arange(items) // 2, np.random.default_rng(7).integers(items // 100, size=items)
            told_of = {
                "a rule that leaves 1 %": Offer(one.astype(np.int64)),
                "pairs of variants, 2 of a brand": shop.offer(variants=pairs, caps=[(brands, 2)]),
                "diversity .3": shop.offer(diversity=0.3),
            }  # fmt: skip
            costs = {name: shop.ours(False, offer=offer) for name, offer in told_of.items()}
            for name, took in costs.items():
                told(f"this stage, {name}", items, given.users, given.users / took)
            shop.ours(why=False)
            night, again = shop.night()
            told(f"a night after which {again:,} lists are others", items, given.users, given.users / night)
            rule, shared, diverse = (round(took / bare, 2) for took in costs.values())
            line |= {"rule_cost": rule, "variants_caps_cost": shared, "diversity_cost": diverse,
                     "night_cost": round(night / bare, 2), "night_lists": again}  # fmt: skip
            told("raw: one process, no Spark", items, given.users, given.users / seconds, None, f"{gb:.1f} GB")
            few = min(given.users, SAMPLE["max_similarity"])
            matching, neighbours_s = shop.max_similarity()
            told("each item's neighbours, searched once: items/s", items, items, items / neighbours_s)
            plain, several = shop.ours(False, users=few), shop.ours(False, matching, few)
            told("this stage, max_similarity", items, few, few / several)
            started, some = time.monotonic(), np.arange(SAMPLE["numpy"])
            shop.exact(some)
            exact = len(some) / (time.monotonic() - started)
            told("numpy, exact", items, len(some), exact, 1.0)
            for name, (rate, users, found) in shop.faiss().items():
                told(f"{name}, search alone", items, users, rate, found)
            als = shop.als()
            told(f"Spark ALS, rank {RANK}", items, SAMPLE["als"], als)
            told("crossJoin, vector_inner_product", items, SAMPLE["crossJoin"], shop.cross_join())
            line |= {
                "vs_raw": round(rates[items] * seconds / given.users, 2),
                "vs_exact_200k": round(rates[items] / exact, 1), "vs_als": round(rates[items] / als, 1),
                "why_share": round(1 - with_why / rates[items], 3), "maxsim_cost": round(several / plain, 1),
                "neighbours_s": round(neighbours_s), "raw_gb": round(gb, 2),
            }  # fmt: skip
        spark.stop()
    console.print(table)
    smallest, _, largest = given.items
    print(json.dumps({"users_per_s": round(rates[middle]), **line,
                      "cost_growth": round(rates[smallest] / rates[largest], 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
