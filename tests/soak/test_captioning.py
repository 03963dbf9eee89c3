"""Kills of a captioning job's driver and of the model's child, at seeded random moments.

The captions must be those of an undisturbed run. A fake counts the calls of the model, which are
what is paid for: at most a chunk more for every killed driver, and a batch for every killed child.
"""

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import deltalake
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_photos import one_color
from sessions import called, kill_all, members, start

from vlm4rec_spark.storage.schemas import CAPTIONS

pytestmark = pytest.mark.soak
PHOTOS = 8_000
CHUNK = 400
BATCH = 8
SEED = 5
CHILD = "vlm4rec_spark.models.captioning.child"


class Job:
    """A catalogue of small photos, and captioning jobs on it, each in a session of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        rows = {
            "item_id": [f"i{n:05}" for n in range(PHOTOS)],
            "photo": [one_color(f"#{n % 256:02x}{n // 256:02x}60") for n in range(PHOTOS)],
        }
        pq.write_table(pa.table(rows), folder / "shop.parquet")

    def start(
        self,
        name: str,
        command: str = "caption",
    ) -> subprocess.Popen:
        out = self.folder / name
        # 120 ms a call of 8 photos: some minutes of two models, enough to kill twenty drivers.
        settings = (
            f"tables={out}",
            f"ingest.items.path=[{self.folder}/shop.parquet]",
            "ingest.items.format=parquet",
            "ingest.photos.bytes_column=photo",
            f"caption.model.model=ms=120+count={self.folder}/calls-{name}",
            f"caption.batch_size={BATCH}",
            f"caption.chunk_photos={CHUNK}",
            "spark.master=local[2]",
            f"spark.conf={json.dumps({'spark.sql.shuffle.partitions': '2'})}",
        )
        process = start(command, settings, self.folder, self.folder / f"log-{name}")
        self.processes.append(process)
        return process

    def calls(self, name: str) -> int:
        file = self.folder / f"calls-{name}"
        return file.stat().st_size // 2 if file.exists() else 0

    def table(
        self,
        name: str,
        table: str,
    ) -> list[dict]:
        return deltalake.DeltaTable(str(self.folder / name / table)).to_pyarrow_table().to_pylist()

    def captions(self, name: str) -> dict[str, list[str]]:
        """captions and item_captions, without what differs from run to run.

        The model's name does: the fake's file is a part of it.
        """
        captions = self.table(name, "captions")
        by_key = {row["caption_key"]: row for row in captions}
        assert len(by_key) == len(captions) == PHOTOS
        volatile = {"caption_key", "model", *CAPTIONS.volatile}
        links = self.table(name, "item_captions")
        return {
            "captions": sorted(
                str({column: value for column, value in row.items() if column not in volatile})
                for row in captions
            ),
            "item_captions": sorted(
                f"{row['item_id']} {by_key[row['caption_key']]['caption']}" for row in links
            ),
        }

    def log(self, name: str) -> str:
        return (self.folder / f"log-{name}").read_text()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Iterator[Job]:
    started = Job(tmp_path_factory.mktemp("captioning"))
    yield started
    for process in started.processes:
        kill_all(process)


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> dict[str, list[str]]:
    assert job.start("undisturbed", "ingest").wait(600) == 0, job.log("undisturbed")
    assert job.start("undisturbed").wait(600) == 0, job.log("undisturbed")
    assert job.calls("undisturbed") == PHOTOS
    return job.captions("undisturbed")


def test_captions_are_the_same_after_twenty_killed_drivers(job, undisturbed):
    planned = 20
    assert job.start("drivers", "ingest").wait(600) == 0, job.log("drivers")
    rng = random.Random(SEED)
    kills = 0
    while kills < planned and job.calls("drivers") < PHOTOS + CHUNK * planned:
        process = job.start("drivers")
        before = job.calls("drivers")
        # From this run's first calls on: before, nothing can be lost. Ten seconds have a commit.
        while process.poll() is None and job.calls("drivers") == before:
            time.sleep(0.1)
        deadline = time.monotonic() + rng.uniform(0, 10)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        rng.choice([process, *called(process, "java")]).kill()
        process.wait(60)
        kills += 1
        _, alive = psutil.wait_procs(members(process), timeout=60)
        assert alive == []
    assert kills == planned, "all was captioned before"
    assert job.start("drivers").wait(600) == 0, job.log("drivers")
    assert job.captions("drivers") == undisturbed
    assert job.calls("drivers") <= PHOTOS + CHUNK * kills
    assert not list((job.folder / "drivers").glob("_*"))
    print(f"{kills} driver kills, {job.calls('drivers') - PHOTOS} calls too many")


def test_captions_are_the_same_after_ten_killed_children(job, undisturbed):
    planned = 10
    kills = 0
    assert job.start("children", "ingest").wait(600) == 0, job.log("children")
    rng = random.Random(SEED)
    process = job.start("children")
    while kills < planned and process.poll() is None:
        # By calls and not by the clock, which tells little on a machine with other work.
        due = PHOTOS * (kills + rng.uniform(0.2, 0.8)) / (planned + 1)
        while process.poll() is None and job.calls("children") < due:
            time.sleep(0.05)
        if children := called(process, CHILD):
            rng.choice(children).send_signal(signal.SIGKILL)
            kills += 1
    assert process.wait(600) == 0, job.log("children")
    assert kills == planned
    assert job.captions("children") == undisturbed
    assert job.calls("children") <= PHOTOS + BATCH * kills
    print(f"{kills} child kills, {job.calls('children') - PHOTOS} calls too many")
