"""The jobs on a standalone master with two workers, by spark-submit: the tables are those of a run on one machine.

Workers share the raw files and the tables and nothing else: each has its own work folder and its own temporary files.
Their Python hasn't got this package, which travels by --archives. On the way one Python process dies, and one stalls.
`make test` submits the pipeline, `make soak` every other job too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import deltalake
import pyspark
import pytest
from PIL import Image

from vlm4rec_spark.demo import catalogue
from vlm4rec_spark.pipeline import STAGES
from vlm4rec_spark.spark import jars, java
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
SPARK = Path(pyspark.__file__).parent
SECRET_VARIABLES = {
    "HF_TOKEN": "hf_PlantedInTheEnvironment",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
    "AWS_SECRET_ACCESS_KEY": "PlantedBesideIt",
}
SECRET_CONF = {
    "spark.hadoop.fs.s3a.secret.key": "PlantedAsASetting",
    "spark.executorEnv.HF_TOKEN": "hf_PlantedForTheWorkers",
}
SECRET_SETTING = {"spark.hadoop.fs.s3a.session.token": "PlantedInAConfigFile"}
CONF = {
    "spark.eventLog.enabled": "true",
    "spark.eventLog.compress": "false",  # to be searched below
    "spark.task.maxFailures": "4",
    "spark.speculation": "true",
    # One of each worker's GPUs, such as they are, for its executor: who captions asks for it, other tasks don't.
    "spark.executor.resource.gpu.amount": "1",
    # Rows are few: more tasks, or plans made anew between the stages, only cost time. Code is made for each query, as
    # by default and unlike in the session of these tests.
    "spark.ui.enabled": "false",
    "spark.sql.shuffle.partitions": "1",
    "spark.default.parallelism": "1",
    "spark.sql.adaptive.enabled": "false",
    "spark.databricks.delta.snapshotPartitions": "1",
}
_WATCHED = 'exec 3<&0; (cat <&3; kill -9 0) & exec "$@" 3<&- </dev/null'
"""Runs a command in sh; the whole process group ends when its input does, at the latest when pytest is killed."""


@contextmanager
def started(
    command: Sequence[str | Path], log: Path, **place: object
) -> Iterator[subprocess.Popen]:
    """A process that writes to `log`, and of which nothing runs afterwards, whatever happens."""
    watched = ["sh", "-c", _WATCHED, "sh", *map(str, command)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            watched, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True, **place
        )  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(30)


def said(process: subprocess.Popen, log: Path, pattern: str) -> str:
    """What the log says by this pattern, waited for."""
    deadline = time.monotonic() + 120
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3_000:]
        time.sleep(0.1)
    return found[0]


@dataclass(frozen=True)
class Cluster:
    """A master and how to submit to it; all that it and its jobs write lies in `folder`."""

    folder: Path
    master: str
    environment: dict[str, str]

    def submit(self, job: str, *assignments: str) -> None:
        """Run jobs/`job`.py by spark-submit in client mode; its output and its event log bear its name."""
        log, events = self.folder / f"{job}.log", self.folder / "events" / job
        events.mkdir(parents=True, exist_ok=True)
        conf = (
            CONF
            | SECRET_CONF
            | {"spark.eventLog.dir": events.as_uri(), "spark.executorEnv.PYTHONPATH": "vlm4rec"}
        )
        delta = jars.find((), Path.home() / ".ivy2.5.2")
        command = [
            SPARK / "bin" / "spark-submit",
            "--master",
            self.master,
            "--deploy-mode",
            "client",
            "--jars",
            ",".join(map(str, delta)),
            "--archives",
            f"{self.folder}/vlm4rec.tar.gz#vlm4rec",
            *[part for pair in conf.items() for part in ("--conf", "=".join(pair))],
            ROOT / "jobs" / f"{job}.py",
            "--config",
            "cluster.yaml",
            "--config",
            "test.yaml",
            "--config",
            self.folder / "secret.yaml",
            *[part for each in assignments for part in ("--set", each)],
        ]
        driver = self.folder / "driver"
        driver.mkdir(exist_ok=True)
        own = {"PYTHONPATH": f"{self.folder}/vlm4rec"} | SECRET_VARIABLES
        with started(
            command, log, env=self.environment | temporary(driver) | own, cwd=driver
        ) as process:
            assert process.wait(1_800) == 0, log.read_text()[-3_000:]

    def events(self, job: str, kind: str) -> list[dict]:
        logs = (self.folder / "events" / job).rglob("events_*")
        events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        return [event for event in events if event["Event"] == kind]


def temporary(folder: Path) -> dict[str, str]:
    """An environment in which Python, Spark and Java keep their temporary files in `folder`."""
    for name in ("tmp", "local"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = (
        f"-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -Djava.io.tmpdir={folder}/tmp"
    )
    return {
        "TMPDIR": f"{folder}/tmp",
        "SPARK_LOCAL_DIRS": f"{folder}/local",
        "JAVA_TOOL_OPTIONS": options,
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    # Neither Spark's nor Python's settings of whoever runs the tests.
    inherited = {
        name: value
        for name, value in os.environ.items()
        if "SPARK" not in name and "PYTHON" not in name
    }
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        home = stack.enter_context(java.home(java.find()))
        environment = inherited | {
            "JAVA_HOME": str(home),
            "SPARK_HOME": str(SPARK),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_DAEMON_MEMORY": "256m",
            "SPARK_MASTER_OPTS": "-Dspark.master.rest.enabled=false",
            "PYSPARK_PYTHON": str(bare_python(folder / "python")),
        }

        def start(
            name: str, kind: str, host: str, *options: str | Path
        ) -> tuple[subprocess.Popen, Path]:
            log, own = folder / f"{name}.log", environment | temporary(folder / name)
            own |= gpu(folder / name) if kind == "worker.Worker" else {}
            command = [
                SPARK / "bin" / "spark-class",
                f"org.apache.spark.deploy.{kind}",
                "--host",
                host,
                "--port",
                "0",
                "--webui-port",
                "0",
                *options,
            ]
            return stack.enter_context(started(command, log, env=own, cwd=folder / name)), log

        master = said(*start("master", "master.Master", "127.0.0.1"), r"spark://127\.0\.0\.1:\d+")
        # Two names of one machine: Spark makes a second copy of a task only on another host.
        workers = [
            start(
                name,
                "worker.Worker",
                host,
                "--cores",
                "1",
                "--memory",
                "1g",
                "--work-dir",
                folder / name / "work",
                master,
            )
            for name, host in (("worker-1", "127.0.0.1"), ("worker-2", "localhost"))
        ]
        pack(folder)
        (folder / "secret.yaml").write_text(json.dumps({"spark": {"conf": SECRET_SETTING}}))
        for worker in workers:
            said(*worker, "Successfully registered with master")
        yield Cluster(folder, master, environment)


def gpu(folder: Path) -> dict[str, str]:
    """A worker that says that it has one GPU, of which the address is its number and a 4."""
    script = folder / "gpus.sh"
    script.write_text(
        f"#!/bin/sh\necho '{json.dumps({'name': 'gpu', 'addresses': [f'{folder.name[-1]}4']})}'\n"
    )
    script.chmod(0o755)
    options = {"amount": "1", "discoveryScript": script}
    return {
        "SPARK_WORKER_OPTS": " ".join(
            f"-Dspark.worker.resource.gpu.{key}={it}" for key, it in options.items()
        )
    }


def bare_python(folder: Path) -> Path:
    """An interpreter with every package of this one but ours: a .pth file inside a .pth's folder isn't read."""
    venv.create(folder, symlinks=True)
    here = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    Path(here, "there.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def pack(folder: Path) -> None:
    """The package as a folder `vlm4rec`, and in vlm4rec.tar.gz. From a copy: building leaves files beside setup.py."""
    source = folder / "source"
    for name in ("vlm4rec_spark", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Not compiled: a compiled file then tells where Python imported its source.
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-compile",
    ]
    subprocess.run([*install, "--quiet", "--target", folder / "vlm4rec", source], check=True)
    shutil.make_archive(str(folder / "vlm4rec"), "gztar", folder / "vlm4rec")


@dataclass(frozen=True)
class Shop:
    """A run of the pipeline on the cluster, and one here on the same raw files."""

    cluster: Cluster
    settings: tuple[str, ...]
    there: Pipeline
    here: Pipeline


@pytest.fixture(scope="module")
def shop(cluster: Cluster, pipeline: Callable[..., Pipeline]) -> Shop:
    raw = cluster.folder / "raw"
    catalogue.write(raw, items=60, users=60)
    settings = (
        f"ingest.items.path=[{raw}/catalogue.csv]",
        f"ingest.interactions.path=['{raw}/events-*.csv.gz']",
        f"ingest.photos.folder={raw}/photos",
        f"ingest.users.path=[{raw}/users.csv]",
        f"ingest.identities.path=[{raw}/identities.csv]",
        "recommend.k=5",
        f"evaluate.cut={catalogue.CUT}",
        "evaluate.splits=[time]",
        "evaluate.arms=[popularity,caption]",
        "report.photos=4",
        "report.users=2",
        f"caption.model.model=die_once={cluster.folder}/died+stall_once={cluster.folder}/stalled"
        f"+gpus={cluster.folder}/gpus",
        "caption.photos_per_task=16",
        "caption.model.max_new_tokens=64",  # conf/cluster.yaml has others
    )
    there, here = cluster.folder / "there", pipeline(cluster.folder / "here", *settings)
    cluster.submit("run_pipeline", *places(there), *settings)
    here.run(STAGES, lambda outcome: None)
    return Shop(cluster, (*places(there), *settings), pipeline(there, *settings), here)


def places(out: Path) -> tuple[str, ...]:
    return f"tables={out}/tables", f"index.folder={out}/index", f"report.path={out}/report.html"


def rows(run: Pipeline, table: schemas.Table) -> list[dict]:
    """By a reader that needs no Spark, and no time."""
    return deltalake.DeltaTable(run.tables.name_of(table)).to_pyarrow_table().to_pylist()


def content(run: Pipeline, table: schemas.Table) -> list[str]:
    """Every row as text, without the columns that say when or by which run it was made."""
    left_out = {"run_id", *table.volatile}
    if table is schemas.RUNS:
        left_out |= {"config", "started_at", "seconds", "device_seconds", "details", "state"}
    kept = [name for name in table.columns if name not in left_out]
    return sorted(str([row[name] for name in kept]) for row in rows(run, table))


def test_the_cluster_makes_the_tables_of_one_machine(shop: Shop) -> None:
    for table in schemas.TABLES.values():
        made = content(shop.there, table)
        assert made == content(shop.here, table), table.name
        assert made
    assert (shop.cluster.folder / "there" / "report.html").stat().st_size > 10_000


def test_a_task_had_failed_and_one_was_overtaken_by_its_copy(shop: Shop) -> None:
    ends = shop.cluster.events("run_pipeline", "SparkListenerTaskEnd")
    (failed,) = [end for end in ends if end["Task Info"]["Failed"]]
    assert "Python worker exited unexpectedly" in json.dumps(failed["Task End Reason"])
    reasons = [end["Task End Reason"]["Reason"] for end in ends if end["Task Info"]["Speculative"]]
    assert "Success" in reasons


def test_each_model_sees_the_gpu_of_its_task_and_no_other(shop: Shop) -> None:
    # Here, on one machine, Spark gives none away.
    assert set((shop.cluster.folder / "gpus").read_text().split()) == {"14", "24", "all"}


def test_driver_and_workers_import_what_was_shipped(shop: Shop, tmp_path: Path) -> None:
    folder, environment = shop.cluster.folder, shop.cluster.environment
    bare = [environment["PYSPARK_PYTHON"], "-c", "import pyspark, vlm4rec_spark"]
    refused = subprocess.run(bare, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'vlm4rec_spark'" in refused.stderr
    # The package was shipped without compiled files, and Python writes one beside the source that it imports.
    for module, places in (
        ("pipeline/__pycache__/run", {"vlm4rec"}),
        ("models/captioning/backends/__pycache__/fake", {"worker-1/work", "worker-2/work"}),
    ):
        torch_compile = [
            file.relative_to(folder) for file in folder.rglob(f"vlm4rec_spark/{module}.*.pyc")
        ]
        assert {
            "/".join(file.parts[: file.parts.index("vlm4rec_spark")][:2]) for file in torch_compile
        } == places


@pytest.fixture(scope="module")
def new_captions(shop: Shop) -> list[dict]:
    """An item without a photo gets one, and the caption job runs: the captions that are new."""
    tables, before = shop.there.tables, rows(shop.there, schemas.CAPTIONS)
    photos = tables.read(schemas.PHOTOS)
    (item, *_) = (
        tables.read(schemas.ITEMS)
        .join(photos, on="item_id", how="left_anti")
        .select("item_id")
        .head()
    )
    green, picture = io.BytesIO(), Image.new("RGB", (16, 16), "green")
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(green, "PNG")
    image = green.getvalue()
    row = (item, 0, None, image, hashlib.sha256(image).hexdigest(), len(image), None)
    tables.insert(schemas.PHOTOS, shop.there.spark.createDataFrame([row], schemas.PHOTOS.schema))
    shop.cluster.submit("run_caption", *shop.settings)
    return [row for row in rows(shop.there, schemas.CAPTIONS) if row not in before]


@pytest.mark.soak
def test_the_caption_job_alone_describes_the_one_new_photo(new_captions: list[dict]) -> None:
    assert [row["caption"] for row in new_captions] == ["A thing of red 0, green 4 and blue 0."]


def test_no_secret_is_left_anywhere(shop: Shop) -> None:
    folder = shop.cluster.folder
    assert len(list(folder.glob("worker-*/work/app-*/*/stderr"))) >= 2
    # Parquet is compressed, so rows are searched too.
    places = {
        table.name: str(rows(shop.there, table)).encode() for table in schemas.TABLES.values()
    }
    files = (
        file for file in folder.rglob("*") if file.is_file() and file != folder / "secret.yaml"
    )
    places |= {str(file): file.read_bytes() for file in files}
    for name, secret in (SECRET_VARIABLES | SECRET_CONF | SECRET_SETTING).items():
        assert [place for place, written in places.items() if secret.encode() in written] == [], (
            name
        )


@pytest.mark.soak
def test_the_stages_own_jobs_make_the_same_tables(
    shop: Shop, pipeline: Callable[..., Pipeline]
) -> None:
    alone = shop.cluster.folder / "alone"
    for job in (*STAGES, "maintain"):
        shop.cluster.submit(f"run_{job}", *shop.settings, *places(alone))
    made = pipeline(alone)
    for table in schemas.TABLES.values():
        if table is not schemas.RUNS:
            assert content(made, table) == content(shop.here, table), table.name
    assert sorted(row["stage"] for row in rows(made, schemas.RUNS)) == sorted((*STAGES, "maintain"))
