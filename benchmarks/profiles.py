"""The profiles stage at 20,000 and 200,000 users x 20 events x 384 dimensions, on Delta tables.

    .venv/bin/python benchmarks/profiles.py [--users 200000]

Compares it with two sides. A numpy script in its own process reads and writes the same tables and
makes the same rows. Spark SQL's own vector_sum sums the vectors of the same histories. There are
20,000 items, drawn by a Zipf law, and the events of 120 days. All sides run in turn. The stage and
numpy are timed warm: once at the large size, as a median of three at the small one. vector_sum
takes minutes and is timed once, at the small size.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import DataFrame, SparkSession
from rich.console import Console
from rich.table import Table

from vlm4rec_spark.cli import quiet
from vlm4rec_spark.config import load
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import Pipeline, Reporter
from vlm4rec_spark.spark.session import session
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import profiles
from vlm4rec_spark.storage import schemas

ITEMS = 20_000
EVENTS = 20
DIMENSION = 384
DAYS = 120
SMALL = 20_000
WEIGHTS = {"view": 1.0, "cart": 3.0, "purchase": 5.0}
HALF_LIFE = 60.0
LAST_N = 50
SETTINGS = profiles.ProfileSettings(event_weights=WEIGHTS, half_life_days=HALF_LIFE, last_n=LAST_N)
STAGE = "this stage"
NUMPY = "numpy"
VECTOR_SUM = "vector_sum"


def events(users: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = users * EVENTS
    start = np.datetime64("2026-01-01T00:00:00", "us")
    times = pd.Series(start + rng.integers(0, DAYS * 86_400, rows).astype("timedelta64[s]"))
    items = rng.permutation(ITEMS)[np.minimum(rng.zipf(1.2, rows) - 1, ITEMS - 1)]
    return pd.DataFrame(
        {
            "event_id": np.char.mod("e%09d", np.arange(rows)),
            "user_id": np.char.mod("u%07d", np.repeat(np.arange(users), EVENTS)),
            "item_id": np.char.mod("i%06d", items),
            "event_type": rng.choice(list(WEIGHTS), rows, p=[0.8, 0.15, 0.05]),
            "event_time": times.dt.tz_localize("UTC"),
            "event_date": times.dt.date,
        }
    )


def by_numpy(
    log: Path,
    items: Path,
    vectors: Path,
    out: Path,
) -> None:
    """The stage's rows by pandas and numpy in one process, as a script without Spark makes them."""
    item_ids = DeltaTable(items).to_pandas(columns=["item_id"])["item_id"].sort_values()
    rows = read_events(log, item_ids)
    rows["user"], users = pd.factorize(rows["user_id"], sort=True)
    pairs = weighted_pairs(rows)
    history = pairs[pairs.groupby("user").cumcount() < LAST_N]
    seen = rows[["user", "item"]].drop_duplicates().sort_values(["user", "item"])
    ids = pa.array(item_ids, pa.string())
    means = mean_vectors(history, np.load(vectors, mmap_mode="r"))
    by_user = pairs.groupby("user")
    table = pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "representation": pa.array(["title"] * len(users)),
            "history": history_array(history, ids),
            "seen": pa.ListArray.from_arrays(offsets(seen), ids.take(pa.array(seen["item"]))),
            "embedding": vector_array(means),
            "events": pa.array(by_user["events"].sum().to_numpy()),
            "last_event_at": pa.array(by_user["at"].max()),
        }
    )
    write_deltalake(out, table, mode="overwrite")


def read_events(log: Path, item_ids: pd.Series) -> pd.DataFrame:
    """The events of users who are no bots on items of the catalogue, with `item`, its position."""
    columns = ["user_id", "item_id", "event_type", "event_time", "event_date", "event_id"]
    rows = DeltaTable(log).to_pandas(columns=columns)
    daily = rows.groupby(["user_id", "event_date"]).size()
    bots = daily[daily > SETTINGS.bot_events_per_day].index.get_level_values("user_id")
    rows = rows[~rows["user_id"].isin(bots.unique())]
    rows["item"] = pd.Index(item_ids).get_indexer(rows["item_id"])
    return rows[rows["item"] >= 0]


def weighted_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """user, item, weight, at and events of each user and item, each user's latest item first."""
    rows = rows.assign(weight=rows["event_type"].map(WEIGHTS))
    rows = rows[rows["weight"].notna()].sort_values(["user", "item", "event_time", "event_id"])
    last = rows.groupby("user")["event_time"].transform("max")
    age = (last - rows["event_time"]).dt.total_seconds() / 86_400
    rows["weight"] *= 2.0 ** (-age / HALF_LIFE)
    pairs = rows.groupby(["user", "item"], sort=True).agg(
        weight=("weight", "sum"), at=("event_time", "max"), events=("weight", "size")
    )
    latest_first = [True, False, True]
    return pairs.reset_index().sort_values(["user", "at", "item"], ascending=latest_first)


def mean_vectors(history: pd.DataFrame, vectors: np.ndarray) -> np.ndarray:
    """float32 (users, dimension), unit vectors."""
    starts = offsets(history).to_numpy()
    weights = history["weight"].to_numpy()
    items = history["item"].to_numpy()
    means = np.empty((len(starts) - 1, DIMENSION), np.float32)
    for user, (start, end) in enumerate(pairwise(starts)):
        total = weights[start:end] @ vectors[items[start:end]].astype(np.float64)
        means[user] = total / np.linalg.norm(total)
    return means


def history_array(history: pd.DataFrame, ids: pa.Array) -> pa.ListArray:
    columns = [ids.take(pa.array(history["item"])), pa.array(history["weight"])]
    weighted = pa.StructArray.from_arrays(columns, names=["item_id", "weight"])
    return pa.ListArray.from_arrays(offsets(history), weighted)


def vector_array(vectors: np.ndarray) -> pa.ListArray:
    starts = np.arange(len(vectors) + 1, dtype=np.int32) * DIMENSION
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(vectors.ravel()))


def offsets(rows: pd.DataFrame) -> pa.Array:
    """Where each user's rows start, and the end."""
    ends = np.cumsum(rows.groupby("user").size().to_numpy())
    return pa.array(np.concatenate([[0], ends]).astype(np.int32))


class Shop:
    """Tables of so many users, and the three sides that make profiles of them."""

    def __init__(
        self,
        folder: Path,
        users: int,
        vectors: np.ndarray,
        pipeline: Pipeline,
    ):
        self.folder = folder
        self.spark = pipeline.spark
        self.tables = pipeline.tables
        self.log = self.tables.name_of(schemas.INTERACTIONS)
        self.items = self.tables.name_of(schemas.ITEMS)
        ids = np.char.mod("i%06d", np.arange(ITEMS))
        self._write_log(users)
        self._write_items(ids)
        self.index = folder / "index" / "only"
        Searcher.build(
            self.index,
            "only",
            ids.tolist(),
            vectors,
            [""] * ITEMS,
            2**62,
        )
        embeddings = pa.table({"item_id": pa.array(ids), "embedding": pa.array(list(vectors))})
        write_deltalake(folder / "vectors", embeddings)

    def _write_log(self, users: int) -> None:
        parquet = self.folder / "events.parquet"
        events(users).to_parquet(parquet, index=False, coerce_timestamps="us")
        columns = schemas.INTERACTIONS.schema.fieldNames()
        rows = self.spark.read.parquet(str(parquet)).select(*columns)
        self.tables.append(schemas.INTERACTIONS, rows)
        parquet.unlink()

    def _write_items(self, ids: np.ndarray) -> None:
        schema = schemas.ITEMS.schema
        row = dict.fromkeys(schema.fieldNames())
        row |= {"title": "t", "available": True, "updated_at": datetime(2026, 1, 1)}
        rows = [tuple((row | {"item_id": item}).values()) for item in ids.tolist()]
        self.tables.append(schemas.ITEMS, self.spark.createDataFrame(rows, schema))

    def histories(self) -> DataFrame:
        log = self.tables.read(schemas.INTERACTIONS)
        return profiles.histories(log, self.tables.read(schemas.ITEMS), SETTINGS)

    def run_stage(self) -> None:
        opens = ship(
            self.spark,
            self.index,
            1.0,
            Searcher.open,
        )
        rows = profiles.with_embedding(self.histories(), "title", opens)
        self.tables.replace(schemas.PROFILES, rows)

    def run_numpy(self) -> None:
        vectors = self.index / "vectors.npy"
        paths = (self.log, self.items, str(vectors), str(self.folder / "by_numpy"))
        subprocess.run([sys.executable, __file__, "--numpy", *paths], check=True)

    def run_vector_sum(self) -> None:
        self.histories().createOrReplaceTempView("h")
        vectors = self.spark.read.format("delta").load(str(self.folder / "vectors"))
        vectors.createOrReplaceTempView("v")
        rows = self.spark.sql("""
            select h.user_id, h.history, h.seen, h.events, h.last_event_at, s.embedding
            from h join (
              select
                user_id,
                vector_normalize(
                  vector_sum(transform(embedding, x -> cast(x * weight as float))), 2.0f
                ) embedding
              from (select user_id, inline(history) from h) join v using (item_id)
              group by user_id
            ) s using (user_id)
        """)
        rows.write.format("delta").mode("overwrite").save(str(self.folder / "by_sql"))

    def check_equal(self) -> None:
        """The stage's and numpy's rows are the same, vectors to the sixth digit."""
        paths = (self.tables.name_of(schemas.PROFILES), str(self.folder / "by_numpy"))
        by_stage, by_numpy = (
            DeltaTable(path).to_pyarrow_table().sort_by("user_id") for path in paths
        )
        for name in ("user_id", "events"):
            assert by_stage[name].to_pylist() == by_numpy[name].to_pylist(), name
        assert flat(by_stage, "seen").equals(flat(by_numpy, "seen"))
        stage_history = flat(by_stage, "history").field("item_id")
        assert stage_history.equals(flat(by_numpy, "history").field("item_id"))
        embeddings = np.asarray(flat(by_stage, "embedding"))
        np.testing.assert_allclose(embeddings, np.asarray(flat(by_numpy, "embedding")), atol=1e-6)


def flat(table: pa.Table, name: str) -> pa.Array:
    return pc.list_flatten(table[name].combine_chunks())


def timed(work: Callable[[], None], times: int = 1) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(times):
        started = time.monotonic()
        work()
        seconds.append(time.monotonic() - started)
    return median(seconds)


def measure(shop: Shop, small: bool) -> dict[str, float]:
    """Seconds of each side; vector_sum only in the small shop."""
    times = 3 if small else 1
    if small:
        shop.run_stage()
        shop.run_numpy()
    seconds = {STAGE: timed(shop.run_stage, times), NUMPY: timed(shop.run_numpy, times)}
    if small:
        seconds[VECTOR_SUM] = timed(shop.run_vector_sum)
    shop.check_equal()
    return seconds


@contextmanager
def spark_session() -> Iterator[SparkSession]:
    spark = session(load([], []).spark)
    spark.sparkContext.setLogLevel("FATAL")
    yield spark
    spark.stop()


def measure_sizes(sizes: list[int], console: Console) -> dict[int, dict[str, float]]:
    """Seconds by number of users and side."""
    vectors = np.random.default_rng(1).normal(size=(ITEMS, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    reporter = Reporter(
        stage=lambda *_: None, info=console.print, progress=lambda *_: nullcontext()
    )
    measured = {}
    with tempfile.TemporaryDirectory() as temporary, spark_session() as spark:
        for users in sizes:
            folder = Path(temporary) / str(users)
            folder.mkdir()
            config = load([], [f"tables={folder / 'tables'}"])
            shop = Shop(
                folder,
                users,
                vectors,
                Pipeline(spark, config, reporter),
            )
            measured[users] = measure(shop, small=users == sizes[0])
            for side, seconds in measured[users].items():
                console.print(f"{side}, {users:,} users: {seconds:.1f} s", style="dim")
    return measured


def print_table(measured: dict[int, dict[str, float]], console: Console) -> None:
    title = f"Profiles of {EVENTS} events each, {DIMENSION} dimensions"
    table = Table(title=title, title_justify="left")
    table.add_column("side")
    for users in measured:
        table.add_column(f"{users:,} users", justify="right")
    table.add_column("users/s", justify="right")
    for side in (STAGE, NUMPY, VECTOR_SUM):
        seconds = {users: sides[side] for users, sides in measured.items() if side in sides}
        cells = [f"{seconds[users]:.1f} s" if users in seconds else "-" for users in measured]
        largest = max(seconds)
        table.add_row(side, *cells, f"{largest / seconds[largest]:,.0f}")
    console.print(table)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--users", type=int, default=200_000)
    options.add_argument(
        "--numpy",
        nargs=4,
        metavar="PATH",
        help=argparse.SUPPRESS,
    )
    arguments = options.parse_args()
    if arguments.numpy:
        by_numpy(*map(Path, arguments.numpy))
        return
    quiet()
    console = Console(width=100)
    large = arguments.users
    small = min(SMALL, large)
    measured = measure_sizes(sorted({small, large}), console)
    print_table(measured, console)
    stage_seconds = measured[large][STAGE]
    slope = None
    if large > small:
        growth = math.log(stage_seconds / measured[small][STAGE])
        slope = round(growth / math.log(large / small), 2)
    figures = {
        "vs_numpy": round(stage_seconds / measured[large][NUMPY], 2),
        "vs_vector_sum": round(measured[small][VECTOR_SUM] / measured[small][STAGE], 2),
        "slope": slope,
        "users_per_s": round(large / stage_seconds),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
