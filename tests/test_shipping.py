"""Shipping: each node gets an artifact once, by broadcast or copy, complete or not at all."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.spark import shipping

PROCESSES = multiprocessing.get_context("spawn")
SIZE = 10**6


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of a node's own copies, for this process and its children."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(shipping, "_open_artifacts", {})
    return tmp_path / "node" / f"vlm4rec-index-{os.getuid()}"


@pytest.fixture
def shared(tmp_path) -> Path:
    folder = tmp_path / "shared" / "v1"
    vectors = np.eye(2, dtype=np.float32)
    Searcher.build(
        folder,
        "v1",
        ["a", "b"],
        vectors,
        ["", ""],
        ann_min_items=16,
    )
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def set_tempdir(folder: str, barrier: Barrier) -> None:
    tempfile.tempdir = folder
    barrier.wait()


def copy_slowly(
    folder: Path,
    log: Path,
    into: Path,
) -> None:
    with log.open("a") as lines:
        lines.write("copied\n")
    time.sleep(0.3)
    shipping._copy(folder, into)


def copy_half_and_die(folder: Path, into: Path) -> None:
    (into / folder.name).mkdir()
    shutil.copy(folder / "vectors.npy", into / folder.name)
    os.kill(os.getpid(), signal.SIGKILL)


def die_copying(tempdir: str, folder: Path) -> None:
    tempfile.tempdir = tempdir
    shipping._open_on_node(
        folder.name,
        SIZE,
        partial(copy_half_and_die, folder),
        Path,
    )


@pytest.mark.parametrize(
    ("master", "broadcast_gb", "copied", "broadcasts"),
    [
        ("local[2]", 1e-9, False, 0),
        ("local[2]", 1.0, False, 0),
        ("spark://host:7077", 1e-9, True, 0),
        ("spark://host:7077", 1.0, True, 1),
    ],
)
def test_cluster_nodes_get_a_copy_and_a_local_session_opens_the_folder(
    cache: Path,
    shared: Path,
    master: str,
    broadcast_gb: float,
    copied: bool,
    broadcasts: int,
):
    archives = list[SimpleNamespace]()
    opened = list[Path]()

    def broadcast(value: bytes) -> SimpleNamespace:
        archives.append(SimpleNamespace(value=value))
        return archives[-1]

    def opens(folder: Path) -> Searcher:
        opened.append(folder)
        return Searcher.open(folder)

    context = SimpleNamespace(master=master, broadcast=broadcast)
    spark = SimpleNamespace(sparkContext=context)
    factory = shipping.ship(spark, shared, broadcast_gb, opens)
    assert factory().vectors.tolist() == [[1, 0], [0, 1]]
    assert factory() is factory()
    assert opened == [cache / "v1" if copied else shared]
    assert len(archives) == broadcasts
    assert files(opened[0]) == files(shared)


def test_only_one_of_several_processes_copies(
    cache: Path,
    shared: Path,
    tmp_path,
):
    fetch = partial(copy_slowly, shared, tmp_path / "log")
    start = (str(cache.parent), PROCESSES.Barrier(3))
    with ProcessPoolExecutor(3, PROCESSES, set_tempdir, start) as pool:
        futures = [pool.submit(shipping._open_on_node, "v1", SIZE, fetch, files) for _ in range(3)]
        assert [future.result() for future in futures] == [files(shared)] * 3
    assert (tmp_path / "log").read_text() == "copied\n"


def test_an_incomplete_copy_is_replaced(cache: Path, shared: Path):
    killed = PROCESSES.Process(target=die_copying, args=(str(cache.parent), shared))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert [file.name for file in cache.rglob("*.npy")] == ["vectors.npy"]
    fetch = partial(shipping._copy, shared)
    assert shipping._open_on_node("v1", SIZE, fetch, files) == files(shared)
    assert sorted(file.name for file in cache.iterdir()) == ["lock", "v1"]
    (cache / "v1" / "manifest.json").unlink()
    (cache / "v1" / "vectors.npy").write_bytes(b"half")
    shipping._open_on_node("v1", SIZE, fetch, Searcher.open)


def test_unused_copies_are_removed_and_a_full_disk_is_an_error(
    cache: Path, shared: Path, monkeypatch
):
    for name, days in (("old", 2.0), ("young", 0.5)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (0, time.time() - days * 86_400))

    def disk_usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=2_000_000 if (cache / "old").exists() else 3_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    fetch = partial(shipping._copy, shared)
    message = rf"needs 4 MB in {cache} on .*, where 3 MB are free\. .*TMPDIR"
    with pytest.raises(RunError, match=message):
        shipping._open_on_node("v1", 4_000_000, fetch, files)
    assert sorted(file.name for file in cache.iterdir()) == ["lock", "young"]
    assert shipping._open_on_node("v1", 3_000_000, fetch, files) == files(shared)


def test_the_age_of_a_copy_counts_from_its_last_use(cache: Path, shared: Path):
    second = shutil.copytree(shared, shared.parent / "v2")
    os.utime(shared, (0, 0))
    for folder in (shared, second):
        shipping._open_on_node(
            folder.name,
            SIZE,
            partial(shipping._copy, folder),
            files,
        )
    assert files(cache / "v1") == files(shared)


def test_a_folder_that_the_node_does_not_mount_is_an_error(cache: Path, tmp_path):
    fetch = partial(shipping._copy, tmp_path / "gone")
    with pytest.raises(RunError, match=r"no index folder .*/gone on .*index\.broadcast_gb"):
        shipping._open_on_node("gone", SIZE, fetch, files)
    assert [file.name for file in cache.iterdir()] == ["lock"]
