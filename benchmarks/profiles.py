"""The profiles stage at 20,000 and 200,000 users x 20 events x 384 dimensions, from Delta table to Delta table.

    .venv/bin/python benchmarks/profiles.py [--users 200000]

Beside it a numpy script in a process of its own that reads and writes the same tables and makes the same rows, and
Spark SQL's own vector_sum over the same histories. Catalogue of 20,000 items; events over 120 days, items drawn by a
Zipf law. All sides in one run, in turn; ours and numpy's are timed warm, once at the large size and as a median of
three at the small one; vector_sum, which takes minutes, once.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake
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

ITEMS, EVENTS, DIMENSION, DAYS = 20_000, 20, 384, 120
SMALL = 20_000
WEIGHTS = {"view": 1.0, "cart": 3.0, "purchase": 5.0}
HALF_LIFE, LAST = 60.0, 50


def events(users: int) -> pd.DataFrame:
    rng, n = np.random.default_rng(0), users * EVENTS
    start = np.datetime64("2026-01-01T00:00:00", "us")
    at = start + rng.integers(0, DAYS * 86_400, n).astype("timedelta64[s]")
    items = rng.permutation(ITEMS)[np.minimum(rng.zipf(1.2, n) - 1, ITEMS - 1)]
    return pd.DataFrame(
        {
            "event_id": np.char.mod("e%09d", np.arange(n)),
            "user_id": np.char.mod("u%07d", np.repeat(np.arange(users), EVENTS)),
            "item_id": np.char.mod("i%06d", items),
            "event_type": rng.choice(list(WEIGHTS), n, p=[0.8, 0.15, 0.05]),
            "event_time": pd.Series(at).dt.tz_localize("UTC"),
            "event_date": pd.Series(at).dt.date,
        }
    )


def by_numpy(log: Path, items: Path, vectors: Path, out: Path) -> None:
    """The stage's rows by pandas and numpy in one process: what a script would do that knows no Spark."""
    known = (
        DeltaTable(items).to_pandas(columns=["item_id"])["item_id"].sort_values(ignore_index=True)
    )
    columns = ["user_id", "item_id", "event_type", "event_time", "event_date", "event_id"]
    rows = DeltaTable(log).to_pandas(columns=columns)
    daily = rows.groupby(["user_id", "event_date"]).size()
    bots = daily[daily > 500].index.get_level_values("user_id").unique()
    rows = rows[~rows["user_id"].isin(bots)]
    rows["item"] = pd.Index(known).get_indexer(rows["item_id"])
    rows = rows[rows["item"] >= 0]
    rows["user"], users = pd.factorize(rows["user_id"], sort=True)
    rows["weight"] = rows["event_type"].map(WEIGHTS)
    seen = rows[["user", "item"]].drop_duplicates().sort_values(["user", "item"])
    rows = rows[rows["weight"].notna()].sort_values(["user", "item", "event_time", "event_id"])
    last = rows.groupby("user")["event_time"].transform("max")
    age = (last - rows["event_time"]).dt.total_seconds() / 86_400
    rows["weight"] *= 2.0 ** (-age / HALF_LIFE)
    each = (
        rows.groupby(["user", "item"], sort=True)
        .agg(weight=("weight", "sum"), at=("event_time", "max"), events=("weight", "size"))
        .reset_index()
        .sort_values(["user", "at", "item"], ascending=[True, False, True])
    )
    kept = each[each.groupby("user").cumcount() < LAST]
    sizes = kept.groupby("user").size().to_numpy()
    starts = np.concatenate([[0], np.cumsum(sizes)])
    matrix = np.load(vectors, mmap_mode="r")
    weight, item = kept["weight"].to_numpy(), kept["item"].to_numpy()
    made = np.empty((len(sizes), DIMENSION), np.float32)
    for user in range(len(sizes)):
        part = slice(starts[user], starts[user + 1])
        total = weight[part] @ matrix[item[part]].astype(np.float64)
        made[user] = total / np.linalg.norm(total)
    ids, offsets = pa.array(known, pa.string()), pa.array(starts.astype(np.int32))
    history = pa.StructArray.from_arrays(
        [ids.take(pa.array(item)), pa.array(weight)], names=["item_id", "weight"]
    )
    met = seen.groupby("user").size().to_numpy()
    ends = pa.array(np.concatenate([[0], np.cumsum(met)]).astype(np.int32))
    there = pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "representation": pa.array(["title"] * len(users)),
            "history": pa.ListArray.from_arrays(offsets, history),
            "seen": pa.ListArray.from_arrays(ends, ids.take(pa.array(seen["item"].to_numpy()))),
            "embedding": pa.ListArray.from_arrays(
                pa.array(np.arange(len(made) + 1, dtype=np.int32) * DIMENSION),
                pa.array(made.ravel()),
            ),
            "events": pa.array(each.groupby("user")["events"].sum().to_numpy()),
            "last_event_at": pa.array(each.groupby("user")["at"].max()),
        }
    )
    write_deltalake(out, there, mode="overwrite")


class Shop:
    """Tables of so many users, and the three sides on them."""

    def __init__(self, folder: Path, users: int, matrix: np.ndarray, pipeline: Pipeline):
        self.folder, self.pipeline, self.spark = folder, pipeline, pipeline.spark
        tables, ids = pipeline.tables, np.char.mod("i%06d", np.arange(ITEMS))
        pq = folder / "events.parquet"
        events(users).to_parquet(pq, index=False, coerce_timestamps="us")
        columns = schemas.INTERACTIONS.schema.fieldNames()
        tables.append(schemas.INTERACTIONS, self.spark.read.parquet(str(pq)).select(*columns))
        pq.unlink()
        names = schemas.ITEMS.schema
        bare = {field.name: None for field in names}
        stamp = datetime(2026, 1, 1)
        catalogue = [
            tuple(
                (
                    bare | {"item_id": str(i), "title": "t", "available": True, "updated_at": stamp}
                ).values()
            )
            for i in ids
        ]
        tables.append(schemas.ITEMS, self.spark.createDataFrame(catalogue, names))
        self.index = folder / "index" / "only"
        Searcher.build(self.index, "only", ids.tolist(), matrix, [""] * ITEMS, 2**62)
        vectors = pa.table({"item_id": pa.array(ids), "embedding": pa.array(list(matrix))})
        write_deltalake(folder / "vectors", vectors)
        self.log, self.items = tables.name_of(schemas.INTERACTIONS), tables.name_of(schemas.ITEMS)

    def ours(self) -> None:
        tables = self.pipeline.tables
        rows = profiles.histories(
            tables.read(schemas.INTERACTIONS), tables.read(schemas.ITEMS), SETTINGS
        )
        opens = ship(self.spark, self.index, 1.0, Searcher.open)
        tables.replace(schemas.PROFILES, profiles.with_embedding(rows, "title", opens))

    def numpy(self) -> None:
        command = [
            sys.executable,
            __file__,
            "--numpy",
            self.log,
            self.items,
            str(self.index / "vectors.npy"),
            str(self.folder / "by_numpy"),
        ]
        subprocess.run(command, check=True)

    def vector_sum(self) -> None:
        tables = self.pipeline.tables
        rows = profiles.histories(
            tables.read(schemas.INTERACTIONS), tables.read(schemas.ITEMS), SETTINGS
        )
        rows.createOrReplaceTempView("h")
        self.spark.read.format("delta").load(str(self.folder / "vectors")).createOrReplaceTempView(
            "v"
        )
        self.spark.sql("""
            select h.user_id, h.history, h.seen, h.events, h.last_event_at, s.embedding from h join (
              select user_id,
                vector_normalize(vector_sum(transform(embedding, x -> cast(x * weight as float))), 2.0f) embedding
              from (select user_id, inline(history) from h) join v using (item_id) group by user_id) s using (user_id)
        """).write.format("delta").mode("overwrite").save(str(self.folder / "by_sql"))

    def agree(self) -> None:
        """Ours and numpy's rows are the same, vectors to the sixth digit."""
        ours = (
            DeltaTable(self.pipeline.tables.name_of(schemas.PROFILES))
            .to_pyarrow_table()
            .sort_by("user_id")
        )
        theirs = DeltaTable(str(self.folder / "by_numpy")).to_pyarrow_table().sort_by("user_id")
        assert ours["user_id"].to_pylist() == theirs["user_id"].to_pylist()
        assert pc.all(pc.equal(ours["events"], theirs["events"])).as_py()
        for name in ("history", "seen"):
            flat = [pc.list_flatten(table[name].combine_chunks()) for table in (ours, theirs)]
            flat = [each.field("item_id") if name == "history" else each for each in flat]
            assert flat[0].equals(flat[1]), name
        vectors = [
            np.asarray(pc.list_flatten(table["embedding"].combine_chunks()))
            for table in (ours, theirs)
        ]
        np.testing.assert_allclose(*vectors, atol=1e-6)


SETTINGS = profiles.ProfileSettings(event_weights=WEIGHTS, half_life_days=HALF_LIFE, last_n=LAST)


def timed(work: Callable[[], None], times: int = 1) -> float:
    seconds = []
    for _ in range(times):
        started = time.monotonic()
        work()
        seconds.append(time.monotonic() - started)
    return median(seconds)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--users", type=int, default=200_000)
    options.add_argument("--numpy", nargs=4, metavar="PATH", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.numpy:
        by_numpy(*map(Path, given.numpy))
        return
    console, small = Console(width=100), min(SMALL, given.users)
    quiet()
    matrix = np.random.default_rng(1).normal(size=(ITEMS, DIMENSION)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    found: dict[str, dict[int, float]] = {"this stage": {}, "numpy": {}, "vector_sum": {}}
    with tempfile.TemporaryDirectory() as temporary:
        spark = session(load([], []).spark)
        spark.sparkContext.setLogLevel("FATAL")
        reporter = Reporter(
            stage=lambda *_: None, info=console.print, progress=lambda *_: nullcontext()
        )
        for users in (small, given.users):
            folder = Path(temporary) / str(users)
            folder.mkdir()
            shop = Shop(
                folder,
                users,
                matrix,
                Pipeline(spark, load([], [f"tables={folder / 'tables'}"]), reporter),
            )
            times = 3 if users == small else 1
            if users == small:
                shop.ours()
                shop.numpy()
            sides = {"this stage": shop.ours, "numpy": shop.numpy}
            for name, side in (
                sides | ({"vector_sum": shop.vector_sum} if users == small else {})
            ).items():
                found[name][users] = timed(side, 1 if name == "vector_sum" else times)
                console.print(f"{name}, {users:,} users: {found[name][users]:.1f} s", style="dim")
            shop.agree()
        spark.stop()
    table = Table(
        title=f"Profiles of {EVENTS} events each, {DIMENSION} dimensions", title_justify="left"
    )
    for name in ("side", *(f"{users:,} users" for users in (small, given.users)), "users/s"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for name, seconds in found.items():
        largest = max(seconds)
        cells = (
            f"{seconds[users]:.1f} s" if users in seconds else "-" for users in (small, given.users)
        )
        table.add_row(name, *cells, f"{largest / seconds[largest]:,.0f}")
    console.print(table)
    ours = found["this stage"]
    slope = (
        math.log(ours[given.users] / ours[small]) / math.log(given.users / small)
        if given.users > small
        else None
    )
    print(
        json.dumps(
            {
                "vs_numpy": round(ours[given.users] / found["numpy"][given.users], 2),
                "vs_vector_sum": round(found["vector_sum"][small] / ours[small], 2),
                "slope": slope and round(slope, 2),
                "users_per_s": round(given.users / ours[given.users]),
            }
        )
    )


if __name__ == "__main__":
    main()
