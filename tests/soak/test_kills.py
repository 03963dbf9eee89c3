"""Kills: a whole run is killed at random moments and started again until it ends; then the tables are as ever.

Real SIGKILLs to operating system processes: the driver's Python, its JVM, its Python workers. `make soak` does thirty
and starts two drivers in the same second; `make test` has two kills of its own, in test_pipeline.py.
"""

from __future__ import annotations

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

import deltalake
import pytest

from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.storage import schemas

pytestmark = pytest.mark.soak
QUICK = {
    "spark.sql.shuffle.partitions": "1",
    "spark.default.parallelism": "1",
    "spark.sql.adaptive.enabled": "false",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}
RUN = "import sys; from vlm4rec_spark.cli import main; raise SystemExit(main(sys.argv[1:]))"
SEED = 4


class Shop:
    """Raw files, and runs of the command line on them, each in a session of processes of its own."""

    def __init__(self, folder: Path):
        self.folder, self.raw, self.started = folder, folder / "raw", list[subprocess.Popen]()
        catalogue.write(self.raw, items=60, users=60)

    def start(self, place: str, *more: str) -> subprocess.Popen:
        out = self.folder / place
        settings = (
            f"tables={out}/tables",
            f"index.folder={out}/index",
            f"report.path={out}/report.html",
            f"ingest.items.path=[{self.raw}/catalogue.csv]",
            f"ingest.interactions.path=['{self.raw}/events-*.csv.gz']",
            f"ingest.photos.folder={self.raw}/photos",
            f"ingest.users.path=[{self.raw}/users.csv]",
            f"ingest.identities.path=[{self.raw}/identities.csv]",
            f"evaluate.cut={catalogue.CUT}",
            "evaluate.splits=[time]",
            "evaluate.arms=[popularity,caption]",
            "report.photos=4",
            "report.users=2",
            "recommend.k=5",
            # A task that fails is tried again only where the master says so.
            "spark.master=local[2,4]",
            f"spark.conf={json.dumps(QUICK)}",
            *more,
        )
        command = [sys.executable, "-c", RUN, "run", "--config", "test.yaml"]
        command += [word for setting in settings for word in ("--set", setting)]
        with (self.folder / f"log-{place}").open("ab") as log:
            self.started.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd=self.folder,
                )
            )
        return self.started[-1]

    def log(self, place: str) -> str:
        return (self.folder / f"log-{place}").read_text()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    made = Shop(tmp_path_factory.mktemp("kills"))
    yield made
    for process in made.started:
        for pid in family(process):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(shop: Shop) -> tuple[dict[str, list[str]], float]:
    """The tables of a run that nobody disturbs, and the seconds it takes."""
    began = time.monotonic()
    assert shop.start("undisturbed").wait(600) == 0, shop.log("undisturbed")
    return contents(shop.folder / "undisturbed"), time.monotonic() - began


def contents(out: Path) -> dict[str, list[str]]:
    """Every table's rows as text, without what says when or by whom a row was made, and without what runs cost."""
    found = {}
    for table in schemas.TABLES.values():
        if table.name in ("runs", "files"):
            continue
        rows = deltalake.DeltaTable(str(out / "tables" / table.name)).to_pyarrow_table()
        kept = [name for name in rows.column_names if name not in {"run_id", *table.volatile}]
        found[table.name] = sorted(map(str, rows.select(kept).to_pylist()))
    # A run that was killed between its metrics and its record judges again, under another run_id.
    found["metrics"] = sorted(set(found["metrics"]))
    return found


def family(process: subprocess.Popen) -> list[int]:
    """The living processes of the session that the process leads."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended in the meantime
            continue
        if int(session) == process.pid and state != "Z":
            members.append(int(stat.parent.name))
    return members


def called(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill_driver(process: subprocess.Popen, rng: random.Random) -> None:
    """SIGKILL to the driver's Python or to its JVM; nothing of it may live on."""
    jvm = [pid for pid in family(process) if called(pid).split(" ")[0].endswith("java")]
    os.kill(rng.choice([process.pid, *jvm]), signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 60
    while family(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [called(pid) for pid in family(process)] == []


def kill_workers(process: subprocess.Popen) -> int:
    """SIGKILL to every Python worker; their daemon, which forked them, lives on."""
    daemons = [pid for pid in family(process) if "pyspark.daemon" in called(pid)]
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


def left_behind() -> set[Path]:
    """What Spark and this package have in the folder for temporary files, other runs' included."""
    place = Path(tempfile.gettempdir())
    return {
        path
        for name in ("vlm4rec-*-*", "spark-*", "blockmgr-*", "snappy-*")
        for path in place.glob(name)
    }


def test_a_run_whose_driver_is_killed_again_and_again_ends_with_the_same_tables(
    shop: Shop, undisturbed: tuple[dict[str, list[str]], float]
) -> None:
    (expected, seconds), kills = undisturbed, 20
    rng, before, done, finished = random.Random(SEED), left_behind(), 0, 0
    while done < kills:
        process = shop.start("killed")
        try:
            code = process.wait(rng.uniform(0.15, 0.95) * seconds)
        except subprocess.TimeoutExpired:
            kill_driver(process, rng)
            done += 1
        else:
            assert code == 0, shop.log("killed")
            assert contents(shop.folder / "killed") == expected
            # From the beginning, so that every stage has its turn.
            finished += 1
            (shop.folder / "killed").rename(shop.folder / f"finished-{finished}")
    assert shop.start("killed").wait(600) == 0, shop.log("killed")
    assert contents(shop.folder / "killed") == expected
    assert not list((shop.folder / "killed" / "tables").glob("_*"))
    assert left_behind() <= before


def test_a_run_whose_workers_are_killed_ends_with_the_same_tables(
    shop: Shop, undisturbed: tuple[dict[str, list[str]], float]
) -> None:
    (expected, _), kills = undisturbed, 10
    rng, place, done, tries = random.Random(SEED), "workers", 0, 0
    while done < kills:
        tries += 1
        process = shop.start(f"{place}-{tries}")
        while done < kills and process.poll() is None:
            time.sleep(rng.uniform(0.5, 4))
            done += min(1, kill_workers(process))
        code = process.wait(600)
        # Killed four times, a task fails its run: it is started again, like any other.
        assert code == 0 or shop.start(f"{place}-{tries}").wait(600) == 0, shop.log(
            f"{place}-{tries}"
        )
        assert contents(shop.folder / f"{place}-{tries}") == expected
    assert tries <= kills


def test_of_two_drivers_that_start_in_the_same_second_one_works(
    shop: Shop, undisturbed: tuple[dict[str, list[str]], float]
) -> None:
    expected, _ = undisturbed
    both = [shop.start("both"), shop.start("both")]
    assert [process.wait(600) for process in both] == [0, 0], shop.log("both")
    assert "Another run is at work on these tables" in shop.log("both")
    assert contents(shop.folder / "both") == expected
    runs = deltalake.DeltaTable(str(shop.folder / "both" / "tables" / "runs")).to_pyarrow_table()
    assert len(set(runs["run_id"].to_pylist())) == 1
