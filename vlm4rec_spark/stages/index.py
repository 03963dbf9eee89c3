"""Embeddings to the index artefact, and the artefact to every worker. Knows where it is built and how it travels."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field
from pyspark.sql import DataFrame, SparkSession

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import FORMAT, Searcher

Artifact = TypeVar("Artifact")


class IndexSettings(BaseModel):
    """Where the artefact lies (a folder that the driver can write), and when search becomes approximate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = "index"
    ann_min_items: int = Field(20_000, ge=1)
    rebuild_threshold: float = Field(0.1, ge=0, le=1)
    broadcast_gb: float = Field(1.0, gt=0)


def index_rows(
    embeddings: DataFrame, texts: DataFrame, representation: str, encoder_id: str
) -> DataFrame:
    """item_id, embedding, content_sha256 and text of the items to index, sorted by item_id."""
    chosen = embeddings.where(
        (embeddings["representation"] == representation) & (embeddings["encoder_id"] == encoder_id)
    )
    text = texts.where(texts["representation"] == representation).select("item_id", "text")
    return (
        chosen.join(text, on="item_id", how="left")
        .select("item_id", "embedding", "content_sha256", "text")
        .orderBy("item_id")
    )


def build(
    rows: pa.Table,
    representation: str,
    encoder_id: str,
    folder: Path,
    ann_min_items: int,
    base: Searcher | None = None,
    rebuild_threshold: float = 0.0,
) -> Path:
    """Build the artefact of `index_rows` under `folder`, named by its content; a sound one is left as it is.

    It rests on the version `base` unless a larger share of the items than `rebuild_share` has come, gone or changed
    since the base's codes were made. Runs in one process and holds all vectors: items x dimension x 4 bytes, twice
    while ScaNN trains.
    """
    ids = rows["item_id"].to_pylist()
    flat = (
        pa.concat_arrays(rows["embedding"].chunks).flatten()
        if len(ids)
        else pa.array([], pa.float32())
    )
    vectors = (
        np.asarray(flat, np.float32).reshape(len(ids), -1)
        if len(ids)
        else np.empty((0, 1), np.float32)
    )
    # The vectors too: workers keep what they unpacked by this id, and an evaluation's arms have no encoder's name.
    content = [
        FORMAT,
        representation,
        encoder_id,
        ann_min_items,
        ids,
        rows["content_sha256"].to_pylist(),
        hashlib.sha256(vectors.tobytes()).hexdigest(),
    ]
    made_of = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if base and base.manifest["content"] == made_of:
        return base.folder
    if base and not base.rests(ids, vectors, ann_min_items, rebuild_threshold):
        base = None
    coded = hashlib.sha256(base.still(ids, vectors).tobytes()).hexdigest() if base else ""
    beside = [made_of, base.base if base else "", coded]
    index_id = hashlib.sha256(json.dumps(beside).encode()).hexdigest()[:16]
    target = folder / index_id
    try:
        Searcher.open(target)
        return target
    except RunError:  # none, a torn or a damaged one
        shutil.rmtree(target, ignore_errors=True)
    texts = [text or "" for text in rows["text"].to_pylist()]
    Searcher.build(target, index_id, ids, vectors, texts, ann_min_items, base, made_of)
    return target


def ship(
    spark: SparkSession, folder: Path, broadcast_gb: float, opens: Callable[[Path], Artifact]
) -> Callable[[], Artifact]:
    """A factory that opens the artefact once per worker process.

    Where workers are on this machine they open the folder where it is. On a cluster each node gets it once, into its
    temporary folder: up to `broadcast_gb` out of a broadcast, above it as a copy of the folder, which must then lie on
    storage that every node mounts at the same path.
    """
    # Workers may have been started in another folder.
    whole = folder.resolve()
    if str(spark.sparkContext.master).startswith("local["):
        return partial(_opened, folder.name, opens, partial(opens, whole))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > broadcast_gb * 1e9:
        fetch: Callable[[Path], object] = partial(_copy, whole)
    else:
        parcel = io.BytesIO()
        with tarfile.open(fileobj=parcel, mode="w") as tar:
            tar.add(folder, arcname=folder.name)
        fetch = partial(_unpack, spark.sparkContext.broadcast(parcel.getvalue()))
    return partial(_opened, folder.name, opens, partial(_on_node, folder.name, size, fetch, opens))


_open: dict[str, tuple[str, Any]] = {}
"""Python workers are reused from query to query: of each kind the last artefact stays open, known by its content."""


def _opened(
    name: str, opens: Callable[[Path], Artifact], opener: Callable[[], Artifact]
) -> Artifact:
    kind = opens.__qualname__
    if _open.get(kind, ("",))[0] != name:
        _open.pop(kind, None)
        _open[kind] = name, opener()
    return _open[kind][1]


def _on_node(
    name: str, size: int, fetch: Callable[[Path], object], opens: Callable[[Path], Artifact]
) -> Artifact:
    """Opens this node's own copy of the artefact, after whoever comes first has fetched it, `size` bytes.

    fetch: brings the artefact into a folder, under its name.
    """
    base = Path(tempfile.gettempdir()) / f"vlm4rec-index-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to another user")
    folder = base / name
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _remove_old(base)
            free = shutil.disk_usage(base).free
            if free < size:
                raise RunError(
                    f"The index needs {size / 1e6:,.0f} MB in {base} on {platform.node()}, where "
                    f"{free / 1e6:,.0f} MB are free. Make room, or name another folder by TMPDIR in the "
                    "executors' environment."
                )
            # The folder appears whole, manifest.json and all: what a killed worker leaves is none.
            with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=base) as aside:
                fetch(Path(aside))
                (Path(aside) / name).rename(folder)
        os.utime(folder)
    # Others may open it at the same time: each reads all of it, for the checksums.
    return opens(folder)


def _unpack(broadcast: Any, into: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(broadcast.value)) as tar:
        tar.extractall(into, filter="data")


def _copy(folder: Path, into: Path) -> None:
    if not folder.is_dir():
        raise RunError(
            f"There is no index folder {folder} on {platform.node()}: one above index.broadcast_gb must lie "
            "on storage that every node mounts at the same path."
        )
    shutil.copytree(folder, into / folder.name)


_ASIDE = "aside-"


def _remove_old(base: Path) -> None:
    """What no job has asked for in a day, and what killed workers left."""
    # An open memory map outlives its file's name, so a job that still reads an old artefact isn't harmed.
    for old in base.iterdir():
        if old.is_dir() and (
            old.name.startswith(_ASIDE) or time.time() - old.stat().st_mtime > 86_400
        ):
            shutil.rmtree(old, ignore_errors=True)
