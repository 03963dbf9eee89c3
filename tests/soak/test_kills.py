"""Kills: a run is killed at random moments and started again. In the end the tables are the same.

SIGKILL goes to real processes: the driver's Python, its JVM, its Python workers. `make soak` does
thirty and starts two drivers in the same second. test_pipeline.py has two for `make test-cluster`.
"""

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import deltalake
import psutil
import pytest
from sessions import called, kill_all, members, start
from shop import demo_settings, paths

from vlm4rec_spark.storage.schemas import TABLES

pytestmark = pytest.mark.soak
FAST = {
    "spark.sql.shuffle.partitions": "1",
    "spark.default.parallelism": "1",
    "spark.sql.adaptive.enabled": "false",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}
SEED = 4


class KilledShop:
    """Raw files, and runs of the command line on them, each in a process session of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        self.settings = demo_settings(folder / "raw")

    def start(self, name: str) -> subprocess.Popen:
        """Start a run whose tables, index and report go to the folder `name`."""
        out = self.folder / name
        settings = (
            *paths(out),
            *self.settings,
            "evaluate.arms=[popularity,caption]",
            # A local master tries a failed task again only if it says so.
            "spark.master=local[2,4]",
            f"spark.conf={json.dumps(FAST)}",
        )
        process = start("run", settings, self.folder, self.folder / f"log-{name}")
        self.started.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"log-{name}").read_text()


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Iterator[KilledShop]:
    shop = KilledShop(tmp_path_factory.mktemp("kills"))
    yield shop
    for process in shop.started:
        kill_all(process)


class Expected(NamedTuple):
    """The tables of a run that isn't disturbed, and the seconds it takes."""

    tables: dict[str, list[str]]
    seconds: float


@pytest.fixture(scope="module")
def expected(shop: KilledShop) -> Expected:
    start = time.monotonic()
    assert shop.start("undisturbed").wait(600) == 0, shop.log("undisturbed")
    return Expected(contents(shop.folder / "undisturbed"), time.monotonic() - start)


def contents(out: Path) -> dict[str, list[str]]:
    """Every table's rows as text, without volatile columns. Without tables of runs and files."""
    tables = {}
    for table in TABLES.values():
        if table.name in ("runs", "state", "ingested_files"):
            continue
        rows = deltalake.DeltaTable(str(out / "tables" / table.name)).to_pyarrow_table()
        columns = [name for name in rows.column_names if name not in {"run_id", *table.volatile}]
        tables[table.name] = sorted(map(str, rows.select(columns).to_pylist()))
    # A run killed between its metrics and its record evaluates again, with another run_id.
    tables["metrics"] = sorted(set(tables["metrics"]))
    return tables


def kill_driver(process: subprocess.Popen, rng: random.Random) -> None:
    """SIGKILL to the driver's Python or to its JVM; all its processes have to end."""
    rng.choice([process, *called(process, "java")]).kill()
    process.wait(60)
    psutil.wait_procs(members(process), timeout=60)
    assert members(process) == []


def kill_workers(process: subprocess.Popen) -> int:
    """SIGKILL to every Python worker; their daemon, which forked them, lives on."""
    daemons = called(process, "pyspark.daemon")
    workers = []
    for daemon in daemons:
        # Its task may have ended in the meantime.
        with suppress(psutil.Error):
            if daemon.parent() in daemons:
                daemon.kill()
                workers.append(daemon)
    return len(workers)


def temporary_files() -> set[Path]:
    """Temporary files of Spark and this package, also of other runs."""
    folder = Path(tempfile.gettempdir())
    patterns = ("vlm4rec-*-*", "spark-*", "blockmgr-*", "snappy-*")
    return {path for pattern in patterns for path in folder.glob(pattern)}


def test_a_run_whose_driver_is_killed_again_and_again_ends_with_the_same_tables(shop, expected):
    rng = random.Random(SEED)
    files_before = temporary_files()
    kills = 0
    finished = 0
    while kills < 20:
        process = shop.start("killed")
        try:
            code = process.wait(rng.uniform(0.15, 0.95) * expected.seconds)
        except subprocess.TimeoutExpired:
            kill_driver(process, rng)
            kills += 1
        else:
            assert code == 0, shop.log("killed")
            assert contents(shop.folder / "killed") == expected.tables
            # From the beginning, so that kills hit every stage.
            finished += 1
            (shop.folder / "killed").rename(shop.folder / f"finished-{finished}")
    assert shop.start("killed").wait(600) == 0, shop.log("killed")
    assert contents(shop.folder / "killed") == expected.tables
    assert not list((shop.folder / "killed" / "tables").glob("_*"))
    assert temporary_files() <= files_before


def test_a_run_whose_workers_are_killed_ends_with_the_same_tables(shop, expected):
    rng = random.Random(SEED)
    kills = 0
    runs = 0
    while kills < 10:
        runs += 1
        name = f"workers-{runs}"
        process = shop.start(name)
        while kills < 10 and process.poll() is None:
            time.sleep(rng.uniform(0.5, 4))
            kills += min(1, kill_workers(process))
        code = process.wait(600)
        # A task that is killed four times fails its run, which is started again like any other.
        assert code == 0 or shop.start(name).wait(600) == 0, shop.log(name)
        assert contents(shop.folder / name) == expected.tables
    assert runs <= kills


def test_of_two_drivers_that_start_in_the_same_second_one_works(shop, expected):
    processes = [shop.start("both"), shop.start("both")]
    assert [process.wait(600) for process in processes] == [0, 0], shop.log("both")
    assert "Another run is at work on these tables" in shop.log("both")
    assert contents(shop.folder / "both") == expected.tables
    runs = deltalake.DeltaTable(str(shop.folder / "both" / "tables" / "runs")).to_pyarrow_table()
    assert len(set(runs["run_id"].to_pylist())) == 1
