"""How an artifact (an index, neighbors, item-item scores) gets from the driver to every worker.

Knows folders, nodes and worker processes. Doesn't know what an artifact holds.
"""

from __future__ import annotations

import fcntl
import io
import os
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyspark.sql import SparkSession

from vlm4rec_spark.errors import RunError

if TYPE_CHECKING:
    from pyspark import Broadcast

Artifact = TypeVar("Artifact")

_TMP_PREFIX = "tmp-"
_SECONDS_UNUSED = 86_400

_open_artifacts: dict[str, tuple[str, Any]] = {}
"""Per kind the folder name and the artifact that was opened last.

Spark reuses Python workers from query to query, so the artifact stays open between them.
"""


def ship(
    spark: SparkSession, folder: Path, broadcast_gb: float, opens: Callable[[Path], Artifact]
) -> Callable[[], Artifact]:
    """Return a factory that opens the artifact once per worker process.

    On one machine (`local[...]`) workers open the folder where it is. On a cluster each node gets
    one copy in its temporary folder. Up to `broadcast_gb` the copy comes from a broadcast. A larger
    artifact is copied from its folder, which must be mounted at the same path on every node.
    """
    # Workers may have been started in another folder.
    absolute = folder.resolve()
    if str(spark.sparkContext.master).startswith("local["):
        return partial(_open_once, folder.name, opens, partial(opens, absolute))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > broadcast_gb * 1e9:
        fetch: Callable[[Path], object] = partial(_copy, absolute)
    else:
        archive = spark.sparkContext.broadcast(_packed(folder))
        fetch = partial(_unpack, archive)
    open_on_node = partial(_open_on_node, folder.name, size, fetch, opens)
    return partial(_open_once, folder.name, opens, open_on_node)


def _open_once(
    name: str, opens: Callable[[Path], Artifact], opener: Callable[[], Artifact]
) -> Artifact:
    kind = opens.__qualname__
    open_name, _ = _open_artifacts.get(kind, ("", None))
    if open_name != name:
        # The old artifact goes first: both may not fit into memory.
        _open_artifacts.pop(kind, None)
        _open_artifacts[kind] = (name, opener())
    _, artifact = _open_artifacts[kind]
    return artifact


def _open_on_node(
    name: str, size: int, fetch: Callable[[Path], object], opens: Callable[[Path], Artifact]
) -> Artifact:
    """Open this node's own copy of the artifact. The first process fetches its `size` bytes.

    `fetch` writes the artifact into a given folder, under its name. Raises RunError if the disk is
    too small.
    """
    cache = _node_cache()
    folder = cache / name
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _remove_unused(cache)
            _check_free_space(cache, size)
            # Renamed when complete: a killed worker leaves no half artifact under this name.
            with tempfile.TemporaryDirectory(prefix=_TMP_PREFIX, dir=cache) as tmp:
                fetch(Path(tmp))
                (Path(tmp) / name).rename(folder)
        os.utime(folder)
    # Outside the lock: opening reads all of it for the checksums, and processes can do so together.
    return opens(folder)


def _node_cache() -> Path:
    cache = Path(tempfile.gettempdir()) / f"vlm4rec-index-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise PermissionError(f"{cache} belongs to another user")
    return cache


def _check_free_space(cache: Path, size: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < size:
        raise RunError(
            f"The index needs {size / 1e6:,.0f} MB in {cache} on {platform.node()}, where "
            f"{free / 1e6:,.0f} MB are free. Make room, or name another folder by TMPDIR in the "
            "executors' environment."
        )


def _packed(folder: Path) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(folder, arcname=folder.name)
    return archive.getvalue()


def _unpack(archive: Broadcast[bytes], into: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive.value)) as tar:
        tar.extractall(into, filter="data")


def _copy(folder: Path, into: Path) -> None:
    if not folder.is_dir():
        raise RunError(
            f"There is no index folder {folder} on {platform.node()}. An index above "
            "index.broadcast_gb must lie on storage that every node mounts at the same path."
        )
    shutil.copytree(folder, into / folder.name)


def _remove_unused(cache: Path) -> None:
    """Remove what no job has opened for a day, and what killed workers left."""
    # An open memory map outlives its file's name: a job that still reads an artifact isn't harmed.
    for folder in cache.iterdir():
        if not folder.is_dir():
            continue
        unused_for = time.time() - folder.stat().st_mtime
        if folder.name.startswith(_TMP_PREFIX) or unused_for > _SECONDS_UNUSED:
            shutil.rmtree(folder, ignore_errors=True)
