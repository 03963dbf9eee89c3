"""The jobs on a standalone master with two workers, by spark-submit: same tables as on one machine.

Workers share only the raw files and the tables. Each has its own work folder and temporary files.
Their Python lacks this package, which is sent with --archives. One Python process dies during the
run, and one stalls. `make test-cluster` submits the pipeline, `make soak` every other job too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import deltalake
import pyspark
import pytest
from hostile_photos import one_color
from shop import MakePipeline, demo_settings, paths, photo_row, upsert

from vlm4rec_spark.pipeline import STAGES, Pipeline
from vlm4rec_spark.spark import jars, java
from vlm4rec_spark.storage.schemas import CAPTIONS, ITEMS, PHOTOS, RUNS, STATE, TABLES, Table

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[1]
SPARK = Path(pyspark.__file__).parent
SECRET_VARIABLES = {
    "HF_TOKEN": "hf_PlantedInTheEnvironment",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
    "AWS_SECRET_ACCESS_KEY": "PlantedNextToIt",
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
    # Each executor gets its worker's GPU, which is a fake. Only tasks that caption claim it.
    "spark.executor.resource.gpu.amount": "1",
    # There are few rows: more tasks, or new plans between the stages, only take time. Code is
    # generated, as by default and unlike in conftest.py's session.
    "spark.ui.enabled": "false",
    "spark.sql.shuffle.partitions": "1",
    "spark.default.parallelism": "1",
    "spark.sql.adaptive.enabled": "false",
    "spark.databricks.delta.snapshotPartitions": "1",
}
_WATCHED = 'exec 3<&0; (cat <&3; kill -9 0) & exec "$@" 3<&- </dev/null'
"""Runs a command in sh. The process group ends when its input does, so when pytest is killed."""


@contextmanager
def started(
    command: Sequence[str | Path], log: Path, **options: object
) -> Iterator[subprocess.Popen]:
    """A process that writes to `log`. It and its children end when `with` ends."""
    watched = ["sh", "-c", _WATCHED, "sh", *map(str, command)]
    with log.open("wb") as out:
        process = subprocess.Popen(  # type: ignore[call-overload]
            watched,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
            **options,
        )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(30)


def wait_for(pattern: str, process: subprocess.Popen, log: Path) -> str:
    """The first match of the pattern in the log."""
    deadline = time.monotonic() + 120
    while not (match := re.search(pattern, log.read_text())):
        assert process.poll() is None, log.read_text()[-3_000:]
        assert time.monotonic() < deadline, log.read_text()[-3_000:]
        time.sleep(0.1)
    return match[0]


@dataclass(frozen=True)
class Cluster:
    """A master and how to submit to it. It and its jobs write only to `folder`."""

    folder: Path
    master: str
    environment: dict[str, str]

    def submit(self, job: str, *assignments: str) -> None:
        """Run jobs/`job`.py by spark-submit in client mode, with a log and events of its name."""
        events = self.folder / "events" / job
        events.mkdir(parents=True, exist_ok=True)
        delta = jars.find((), Path.home() / ".ivy2.5.2")
        submit = [SPARK / "bin" / "spark-submit", "--master", self.master]
        submit += ["--deploy-mode", "client", "--jars", ",".join(map(str, delta))]
        submit += ["--archives", f"{self.folder}/vlm4rec.tar.gz#vlm4rec"]
        conf = CONF | SECRET_CONF | {"spark.executorEnv.PYTHONPATH": "vlm4rec"}
        conf["spark.eventLog.dir"] = events.as_uri()
        for key, value in conf.items():
            submit += ["--conf", f"{key}={value}"]
        command = [*submit, ROOT / "jobs" / f"{job}.py"]
        for config in ("cluster.yaml", "test.yaml", self.folder / "secret.yaml"):
            command += ["--config", config]
        for assignment in assignments:
            command += ["--set", assignment]
        driver = self.folder / "driver"
        driver.mkdir(exist_ok=True)
        environment = self.environment | temporary(driver) | SECRET_VARIABLES
        environment["PYTHONPATH"] = f"{self.folder}/vlm4rec"
        log = self.folder / f"{job}.log"
        with started(command, log, env=environment, cwd=driver) as process:
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
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        home = stack.enter_context(java.home(java.find()))
        environment = cluster_environment(home, bare_python(folder / "python"))

        def start(name: str, kind: str, host: str, *options: str | Path) -> Daemon:
            log = folder / f"{name}.log"
            variables = environment | temporary(folder / name)
            if kind == "worker.Worker":
                variables |= gpu(folder / name)
            command = [SPARK / "bin" / "spark-class", f"org.apache.spark.deploy.{kind}"]
            command += ["--host", host, "--port", "0", "--webui-port", "0", *options]
            process = started(command, log, env=variables, cwd=folder / name)
            return Daemon(stack.enter_context(process), log)

        master = wait_for(
            r"spark://127\.0\.0\.1:\d+", *start("master", "master.Master", "127.0.0.1")
        )
        # Two names of one machine: Spark makes a second copy of a task only on another host.
        workers = []
        for name, host in (("worker-1", "127.0.0.1"), ("worker-2", "localhost")):
            options = ("--cores", "1", "--memory", "1g", "--work-dir", folder / name / "work")
            workers.append(start(name, "worker.Worker", host, *options, master))
        pack(folder)
        for worker in workers:
            wait_for("Successfully registered with master", *worker)
        yield Cluster(folder, master, environment)


class Daemon(NamedTuple):
    process: subprocess.Popen
    log: Path


def cluster_environment(java_home: Path, python: Path) -> dict[str, str]:
    """This environment without Spark's and Python's settings of whoever runs the tests."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if "SPARK" not in name and "PYTHON" not in name
    }
    return inherited | {
        "JAVA_HOME": str(java_home),
        "SPARK_HOME": str(SPARK),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_MASTER_OPTS": "-Dspark.master.rest.enabled=false",
        "PYSPARK_PYTHON": str(python),
    }


def gpu(folder: Path) -> dict[str, str]:
    """A worker with one GPU, a fake: its address is the worker's number and a 4."""
    script = folder / "gpus.sh"
    script.write_text(
        f"#!/bin/sh\necho '{json.dumps({'name': 'gpu', 'addresses': [f'{folder.name[-1]}4']})}'\n"
    )
    script.chmod(0o755)
    prefix = "-Dspark.worker.resource.gpu"
    return {"SPARK_WORKER_OPTS": f"{prefix}.amount=1 {prefix}.discoveryScript={script}"}


def bare_python(folder: Path) -> Path:
    """An interpreter with every package of this one but vlm4rec_spark.

    Its .pth file adds this one's packages. The .pth files among those aren't read, and one of them
    is the editable install of vlm4rec_spark.
    """
    venv.create(folder, symlinks=True)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    Path(packages, "packages.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def pack(folder: Path) -> None:
    """The package as a folder `vlm4rec` and as vlm4rec.tar.gz, and a config file with a secret.

    From a copy, because a build leaves files next to setup.py.
    """
    (folder / "secret.yaml").write_text(json.dumps({"spark": {"conf": SECRET_SETTING}}))
    source = folder / "source"
    for name in ("vlm4rec_spark", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Not compiled: so a compiled file shows later where Python imported its source.
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    options = ["--no-compile", "--quiet", "--target", folder / "vlm4rec"]
    subprocess.run([*install, *options, source], check=True)
    shutil.make_archive(str(folder / "vlm4rec"), "gztar", folder / "vlm4rec")


@dataclass(frozen=True)
class TwoRuns:
    """A run of the pipeline on the cluster, and a local one on the same raw files."""

    cluster: Cluster
    settings: tuple[str, ...]
    remote: Pipeline
    local: Pipeline


@pytest.fixture(scope="module")
def shop(cluster: Cluster, pipeline: MakePipeline) -> TwoRuns:
    raw = cluster.folder / "raw"
    settings = (
        *demo_settings(raw),
        "evaluate.arms=[popularity,caption]",
        f"caption.model.model=die_once={cluster.folder}/died+stall_once={cluster.folder}/stalled"
        f"+gpus={cluster.folder}/gpus",
        "caption.photos_per_task=16",
        "caption.model.max_new_tokens=64",  # conf/cluster.yaml has others
    )
    remote = cluster.folder / "remote"
    remote_settings = (*paths(remote), *settings)
    cluster.submit("run_pipeline", *remote_settings)
    local = pipeline(cluster.folder / "local", *settings)
    local.run(STAGES)
    return TwoRuns(cluster, remote_settings, pipeline(remote, *settings), local)


def rows(run: Pipeline, table: Table) -> list[dict]:
    """Read without Spark, which is faster."""
    return deltalake.DeltaTable(run.tables.name_of(table)).to_pyarrow_table().to_pylist()


def content(run: Pipeline, table: Table) -> list[str]:
    """Every row as text, without volatile columns."""
    volatile = {"run_id", *table.volatile}
    if table is RUNS:
        volatile |= {"config", "started_at", "seconds", "device_seconds", "details"}
    if table is STATE:
        volatile |= {"fingerprint", "calibration", "versions"}
    columns = [name for name in table.columns if name not in volatile]
    return sorted(str([row[name] for name in columns]) for row in rows(run, table))


def test_the_cluster_makes_the_tables_of_one_machine(shop: TwoRuns):
    for table in TABLES.values():
        remote = content(shop.remote, table)
        assert remote == content(shop.local, table), table.name
        assert remote
    assert (shop.cluster.folder / "remote" / "report.html").stat().st_size > 10_000


def test_one_task_failed_and_a_copy_of_one_was_faster(shop: TwoRuns):
    ends = shop.cluster.events("run_pipeline", "SparkListenerTaskEnd")
    (failed,) = [end for end in ends if end["Task Info"]["Failed"]]
    assert "Python worker exited unexpectedly" in json.dumps(failed["Task End Reason"])
    reasons = [end["Task End Reason"]["Reason"] for end in ends if end["Task Info"]["Speculative"]]
    assert "Success" in reasons


def test_each_model_sees_the_gpu_of_its_task_and_no_other(shop: TwoRuns):
    # `all` is the local run: there Spark assigns none.
    assert set((shop.cluster.folder / "gpus").read_text().split()) == {"14", "24", "all"}


def test_driver_and_workers_import_the_package_that_was_sent(shop: TwoRuns, tmp_path):
    environment = shop.cluster.environment
    command = [environment["PYSPARK_PYTHON"], "-c", "import pyspark, vlm4rec_spark"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'vlm4rec_spark'" in process.stderr
    # It was sent without compiled files. Python writes one next to the source that it imports.
    assert importers(shop, "pipeline/__pycache__/context") == {"vlm4rec"}
    fake = "models/captioning/backends/__pycache__/fake"
    assert importers(shop, fake) == {"worker-1/work", "worker-2/work"}


def importers(shop: TwoRuns, module: str) -> set[str]:
    """Folders of the cluster, by their first two names, from which a module was imported."""
    folder = shop.cluster.folder
    parents = set()
    for file in folder.rglob(f"vlm4rec_spark/{module}.*.pyc"):
        parts = file.relative_to(folder).parts
        parents.add("/".join(parts[: parts.index("vlm4rec_spark")][:2]))
    return parents


@pytest.fixture(scope="module")
def new_captions(shop: TwoRuns) -> list[dict]:
    """An item without a photo gets one, and the caption job runs: the captions that are new."""
    tables = shop.remote.tables
    before = rows(shop.remote, CAPTIONS)
    photos = tables.read(PHOTOS)
    bare = tables.read(ITEMS).join(photos, on="item_id", how="left_anti").first()
    upsert(shop.remote, PHOTOS, [photo_row(bare["item_id"], one_color("green", 16))])
    shop.cluster.submit("run_caption", *shop.settings)
    return [row for row in rows(shop.remote, CAPTIONS) if row not in before]


@pytest.mark.soak
def test_the_caption_job_alone_captions_the_new_photo(new_captions: list[dict]):
    assert [row["caption"] for row in new_captions] == ["A thing of red 0, green 4 and blue 0."]


def test_no_secret_is_written_anywhere(shop: TwoRuns):
    folder = shop.cluster.folder
    assert len(list(folder.glob("worker-*/work/app-*/*/stderr"))) >= 2
    # Parquet is compressed, so rows are searched too.
    written = {table.name: str(rows(shop.remote, table)).encode() for table in TABLES.values()}
    for file in folder.rglob("*"):
        if file.is_file() and file != folder / "secret.yaml":
            written[str(file)] = file.read_bytes()
    for name, secret in (SECRET_VARIABLES | SECRET_CONF | SECRET_SETTING).items():
        with_secret = [source for source, data in written.items() if secret.encode() in data]
        assert with_secret == [], name


@pytest.mark.soak
def test_the_stages_own_jobs_make_the_same_tables(shop: TwoRuns, pipeline: MakePipeline):
    stage_by_stage = shop.cluster.folder / "stage-by-stage"
    jobs = (*STAGES, "maintain")
    for job in jobs:
        shop.cluster.submit(f"run_{job}", *shop.settings, *paths(stage_by_stage))
    run = pipeline(stage_by_stage)
    for table in TABLES.values():
        if table is not RUNS:
            assert content(run, table) == content(shop.local, table), table.name
    assert sorted(row["stage"] for row in rows(run, RUNS)) == sorted(jobs)
