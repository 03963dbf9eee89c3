"""How the index artefact comes to a node: out of a broadcast or as a copy, once, whole or not at all."""

from __future__ import annotations

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
ENOUGH = 10**6


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a node's own copies, as this process and `arrive` see it."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(shipping, "_open_artifacts", {})
    return tmp_path / "node" / f"vlm4rec-index-{os.getuid()}"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared" / "v1"
    Searcher.build(folder, "v1", ["a", "b"], np.eye(2, dtype=np.float32), ["", ""], 16)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def arrive(temporary: str, together: Barrier) -> None:
    tempfile.tempdir = temporary
    together.wait()


def slowly(folder: Path, log: Path, into: Path) -> None:
    with log.open("a") as lines:
        lines.write("copied\n")
    time.sleep(0.3)
    shipping._copy(folder, into)


def half(folder: Path, into: Path) -> None:
    (into / folder.name).mkdir()
    shutil.copy(folder / "vectors.npy", into / folder.name)
    os.kill(os.getpid(), signal.SIGKILL)


def die_copying(temporary: str, folder: Path) -> None:
    tempfile.tempdir = temporary
    shipping._open_on_node(folder.name, ENOUGH, partial(half, folder), Path)


@pytest.mark.parametrize(
    ("master", "broadcast_gb", "own", "sent"),
    [
        ("local[2]", 1e-9, False, 0),
        ("local[2]", 1.0, False, 0),
        ("spark://host:7077", 1e-9, True, 0),
        ("spark://host:7077", 1.0, True, 1),
    ],
)
def test_a_cluster_s_nodes_have_it_themselves_and_one_machine_leaves_it_where_it_is(
    node: Path, shared: Path, master: str, broadcast_gb: float, own: bool, sent: int
) -> None:
    parcels = list[SimpleNamespace]()

    def broadcast(value: bytes) -> SimpleNamespace:
        parcels.append(SimpleNamespace(value=value))
        return parcels[-1]

    opened = list[Path]()

    def opens(folder: Path) -> Searcher:
        opened.append(folder)
        return Searcher.open(folder)

    spark = SimpleNamespace(sparkContext=SimpleNamespace(master=master, broadcast=broadcast))
    factory = shipping.ship(spark, shared, broadcast_gb, opens)
    assert factory().vectors.tolist() == [[1, 0], [0, 1]]
    assert factory() is factory()
    assert opened == [node / "v1" if own else shared]
    assert len(parcels) == sent
    assert files(opened[0]) == files(shared)


def test_of_processes_that_ask_at_the_same_time_one_copies(
    node: Path, shared: Path, tmp_path: Path
) -> None:
    fetch = partial(slowly, shared, tmp_path / "log")
    with ProcessPoolExecutor(
        3, PROCESSES, arrive, (str(node.parent), PROCESSES.Barrier(3))
    ) as pool:
        asked = [pool.submit(shipping._open_on_node, "v1", ENOUGH, fetch, files) for _ in range(3)]
        assert [one.result() for one in asked] == [files(shared)] * 3
    assert (tmp_path / "log").read_text() == "copied\n"


def test_what_a_killed_worker_left_is_made_anew(node: Path, shared: Path) -> None:
    killed = PROCESSES.Process(target=die_copying, args=(str(node.parent), shared))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert [file.name for file in node.rglob("*.npy")] == ["vectors.npy"]
    assert shipping._open_on_node("v1", ENOUGH, partial(shipping._copy, shared), files) == files(
        shared
    )
    assert sorted(file.name for file in node.iterdir()) == ["lock", "v1"]
    (node / "v1" / "manifest.json").unlink()
    (node / "v1" / "vectors.npy").write_bytes(b"half")
    shipping._open_on_node("v1", ENOUGH, partial(shipping._copy, shared), Searcher.open)


def test_without_room_it_says_how_much_is_needed_and_old_ones_make_room(
    node: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, days in (("old", 2.0), ("young", 0.5)):
        (node / name).mkdir(parents=True)
        os.utime(node / name, (0, time.time() - days * 86_400))

    def room(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=2_000_000 if (node / "old").exists() else 3_000_000)

    monkeypatch.setattr(shutil, "disk_usage", room)
    fetch = partial(shipping._copy, shared)
    with pytest.raises(
        RunError, match=rf"needs 4 MB in {node} on .*, where 3 MB are free\. .*TMPDIR"
    ):
        shipping._open_on_node("v1", 4_000_000, fetch, files)
    assert sorted(file.name for file in node.iterdir()) == ["lock", "young"]
    assert shipping._open_on_node("v1", 3_000_000, fetch, files) == files(shared)


def test_a_copy_is_as_old_as_its_last_use_not_as_what_was_copied(node: Path, shared: Path) -> None:
    other = shutil.copytree(shared, shared.parent / "v2")
    os.utime(shared, (0, 0))
    for folder in (shared, other):
        shipping._open_on_node(folder.name, ENOUGH, partial(shipping._copy, folder), files)
    assert files(node / "v1") == files(shared)


def test_storage_that_a_node_does_not_mount_is_named(node: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no index folder .*/gone on .*index\.broadcast_gb"):
        shipping._open_on_node("gone", ENOUGH, partial(shipping._copy, tmp_path / "gone"), files)
    assert [file.name for file in node.iterdir()] == ["lock"]
