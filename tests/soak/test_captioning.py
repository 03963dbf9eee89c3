"""Kills of a captioning job: the driver's processes and the model's child, at seeded random moments.

The captions must be those of an undisturbed run, and the calls of the model, which a fake counts, are what is paid for:
at most a chunk more for each driver that is killed, and a batch for each child.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import deltalake
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm4rec_spark.storage.schemas import CAPTIONS

pytestmark = pytest.mark.soak
RUN = "import sys; from vlm4rec_spark.cli import main; raise SystemExit(main(sys.argv[1:]))"
PHOTOS, CHUNK, BATCH, SEED = 8_000, 400, 8, 5
CHILD = "vlm4rec_spark.models.captioning.child"


class Job:
    """A catalogue of small photos of many colours, and captioning jobs on it in sessions of their own."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, list[psutil.Popen]()
        png = (f"{n % 256:02x}{n // 256:02x}60" for n in range(PHOTOS))
        rows = {
            "item_id": [f"i{n:05}" for n in range(PHOTOS)],
            "photo": [picture(colour) for colour in png],
        }
        pq.write_table(pa.table(rows), folder / "shop.parquet")

    def start(self, place: str, command: str = "caption") -> psutil.Popen:
        out = self.folder / place
        # 120 ms a call of 8: some minutes of two models, so that twenty drivers can be killed before all is done.
        settings = (
            f"tables={out}",
            f"ingest.items.path=[{self.folder}/shop.parquet]",
            "ingest.items.format=parquet",
            "ingest.photos.bytes_column=photo",
            f"caption.model.model=ms=120+count={self.folder}/calls-{place}",
            f"caption.batch_size={BATCH}",
            f"caption.chunk_photos={CHUNK}",
            "spark.master=local[2]",
            f"spark.conf={json.dumps({'spark.sql.shuffle.partitions': '2'})}",
        )
        words = [sys.executable, "-c", RUN, command, "--config", "test.yaml"]
        words += [word for setting in settings for word in ("--set", setting)]
        with (self.folder / f"log-{place}").open("ab") as log:
            self.started.append(
                psutil.Popen(
                    words,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd=self.folder,
                )
            )
        return self.started[-1]

    def calls(self, place: str) -> int:
        file = self.folder / f"calls-{place}"
        return file.stat().st_size // 2 if file.exists() else 0

    def captions(self, place: str) -> dict[str, list[str]]:
        """captions and item_captions, without what differs from run to run: the fake's file is part of its name."""
        links = (
            deltalake.DeltaTable(str(self.folder / place / "item_captions"))
            .to_pyarrow_table()
            .to_pylist()
        )
        made = (
            deltalake.DeltaTable(str(self.folder / place / "captions"))
            .to_pyarrow_table()
            .to_pylist()
        )
        texts = {row["caption_key"]: row for row in made}
        assert len(texts) == len(made) == PHOTOS
        left_out = {"caption_key", "model", *CAPTIONS.volatile}
        return {
            "captions": sorted(
                str({k: v for k, v in row.items() if k not in left_out}) for row in made
            ),
            "item_captions": sorted(
                f"{row['item_id']} {texts[row['caption_key']]['caption']}" for row in links
            ),
        }

    def log(self, place: str) -> str:
        return (self.folder / f"log-{place}").read_text()


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (8, 8), f"#{colour}")
    image.putpixel((0, 0), (255, 255, 255))  # a photo of one colour all over shows nothing
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Iterator[Job]:
    made = Job(tmp_path_factory.mktemp("captioning"))
    yield made
    for process in made.started:
        kill_all(process)


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> dict[str, list[str]]:
    assert job.start("undisturbed", "ingest").wait(600) == 0, job.log("undisturbed")
    assert job.start("undisturbed").wait(600) == 0, job.log("undisturbed")
    assert job.calls("undisturbed") == PHOTOS
    return job.captions("undisturbed")


def kill_all(process: psutil.Popen) -> None:
    for member in members(process):
        member.kill()


def members(process: psutil.Popen) -> list[psutil.Process]:
    """The living processes of the session that `process` leads."""
    found = []
    for one in psutil.process_iter():
        try:
            if os.getsid(one.pid) == process.pid and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except (OSError, psutil.Error):  # it ended in the meantime
            continue
    return found


def called(process: psutil.Popen, word: str) -> list[psutil.Process]:
    """Those of them whose command line has this word or, as java's first has, ends in it."""
    found = []
    for one in members(process):
        try:
            if any(each == word or each.endswith(f"/{word}") for each in one.cmdline()):
                found.append(one)
        except psutil.Error:  # it ended in the meantime
            continue
    return found


def test_captions_are_the_same_after_twenty_killed_drivers(
    job: Job, undisturbed: dict[str, list[str]]
):
    expected, kills = undisturbed, 20
    assert job.start("drivers", "ingest").wait(600) == 0, job.log("drivers")
    rng, done = random.Random(SEED), 0
    while done < kills and job.calls("drivers") < PHOTOS + CHUNK * kills:
        process = job.start("drivers")
        before = job.calls("drivers")
        # From the first calls of this run on: a kill while Spark starts has nothing to lose. Ten seconds see a commit.
        while process.poll() is None and job.calls("drivers") == before:
            time.sleep(0.1)
        deadline = time.monotonic() + rng.uniform(0, 10)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        rng.choice([process, *called(process, "java")]).kill()
        process.wait(60)
        done += 1
        _, alive = psutil.wait_procs(members(process), timeout=60)
        assert alive == []
    assert done == kills, "all was captioned before"
    assert job.start("drivers").wait(600) == 0, job.log("drivers")
    assert job.captions("drivers") == expected
    assert job.calls("drivers") <= PHOTOS + CHUNK * done
    assert not list((job.folder / "drivers").glob("_*"))
    print(f"{done} driver kills, {job.calls('drivers') - PHOTOS} calls too many")


def test_captions_are_the_same_after_ten_killed_children(
    job: Job, undisturbed: dict[str, list[str]]
):
    expected, kills, done = undisturbed, 10, 0
    assert job.start("children", "ingest").wait(600) == 0, job.log("children")
    rng, process = random.Random(SEED), job.start("children")
    while done < kills and process.poll() is None:
        # By what is done and not by the clock, which says nothing on a machine with other work.
        due = PHOTOS * (done + rng.uniform(0.2, 0.8)) / (kills + 1)
        while process.poll() is None and job.calls("children") < due:
            time.sleep(0.05)
        if mine := called(process, CHILD):
            rng.choice(mine).send_signal(signal.SIGKILL)
            done += 1
    assert process.wait(600) == 0, job.log("children")
    assert done == kills
    assert job.captions("children") == expected
    assert job.calls("children") <= PHOTOS + BATCH * done
    print(f"{done} child kills, {job.calls('children') - PHOTOS} calls too many")
