"""Kills: a run is killed at random moments and started again. In the end the tables are the same.

SIGKILL goes to real processes: the driver's Python, its JVM, its Python workers. `make soak` does
thirty and starts two drivers in the same second. test_pipeline.py has two for `make test-cluster`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import deltalake
import pytest
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
RUN = "import sys; from vlm4rec_spark.cli import main; raise SystemExit(main(sys.argv[1:]))"
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
        command = [sys.executable, "-c", RUN, "run", "--config", "test.yaml"]
        command += [word for setting in settings for word in ("--set", setting)]
        with (self.folder / f"log-{name}").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self.folder,
            )
        self.started.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"log-{name}").read_text()


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Iterator[KilledShop]:
    shop = KilledShop(tmp_path_factory.mktemp("kills"))
    yield shop
    for process in shop.started:
        for pid in living(process):
            os.kill(pid, signal.SIGKILL)


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


def living(process: subprocess.Popen) -> list[int]:
    """The living processes of the session that this process leads."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended in the meantime
            continue
        if int(session) == process.pid and state != "Z":
            members.append(int(stat.parent.name))
    return members


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill_driver(process: subprocess.Popen, rng: random.Random) -> None:
    """SIGKILL to the driver's Python or to its JVM; all its processes have to end."""
    jvm = [pid for pid in living(process) if command_line(pid).split(" ")[0].endswith("java")]
    os.kill(rng.choice([process.pid, *jvm]), signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 60
    while living(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [command_line(pid) for pid in living(process)] == []


def kill_workers(process: subprocess.Popen) -> int:
    """SIGKILL to every Python worker; their daemon, which forked them, lives on."""
    daemons = [pid for pid in living(process) if "pyspark.daemon" in command_line(pid)]
    workers = [pid for pid in daemons if parent(pid) in daemons]
    for pid in workers:
        with suppress(ProcessLookupError):  # its task has ended
            os.kill(pid, signal.SIGKILL)
    return len(workers)


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended in the meantime
        return 0


def temporary_files() -> set[Path]:
    """Temporary files of Spark and this package, also of other runs."""
    folder = Path(tempfile.gettempdir())
    patterns = ("vlm4rec-*-*", "spark-*", "blockmgr-*", "snappy-*")
    return {path for pattern in patterns for path in folder.glob(pattern)}


def test_a_run_whose_driver_is_killed_again_and_again_ends_with_the_same_tables(
    shop: KilledShop, expected: Expected
):
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


def test_a_run_whose_workers_are_killed_ends_with_the_same_tables(
    shop: KilledShop, expected: Expected
):
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


def test_of_two_drivers_that_start_in_the_same_second_one_works(
    shop: KilledShop, expected: Expected
):
    processes = [shop.start("both"), shop.start("both")]
    assert [process.wait(600) for process in processes] == [0, 0], shop.log("both")
    assert "Another run is at work on these tables" in shop.log("both")
    assert contents(shop.folder / "both") == expected.tables
    runs = deltalake.DeltaTable(str(shop.folder / "both" / "tables" / "runs")).to_pyarrow_table()
    assert len(set(runs["run_id"].to_pylist())) == 1
