"""The index to every item's nearest items: one search of each item, divided over the workers. Knows no user."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import SparkSession

from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.neighbors import BYTES, FORMAT, Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher

_ITEMS_AT_ONCE = 1_024
_DRIVER_BYTES = 2**27
"""So much of what the workers have found is on the driver at a time."""
_USERS_SERVED = 0.9
_STEP = 32


def pays(sample: pa.Table, users: int, items: int) -> bool:
    """Whether the histories of so many users, of which `sample` is one, hold more items than the index."""
    held = pc.sum(pc.list_value_length(sample["history"])).as_py() or 0
    return users * held > items * len(sample)


def depth(candidates: int, sample: pa.Table, items: int) -> int:
    """Neighbours of each item that do for nine users of ten: the candidates, and what is in the user's `seen`.

    Rounded up to a multiple of 32, so that a night's few events ask for no other file. Of who has seen more, the items
    are searched as without one.
    """
    seen = pc.list_value_length(sample["seen"]).to_numpy()
    return min(_STEP * math.ceil((candidates + np.quantile(seen, _USERS_SERVED)) / _STEP), items)


def gigabytes(items: int, depth: int) -> float:
    """On disk."""
    return items * depth * BYTES / 1e9


def build(
    spark: SparkSession,
    searcher: Searcher,
    open_searcher: Callable[[], Searcher],
    effort: Effort,
    folder: Path,
) -> Path:
    """Search every item and write its neighbours under `folder`, named by their content; a sound folder is left as it
    is.

    effort: of each search, its candidates the depth. Needs `gigabytes` on disk and a few hundred MB of memory; folders
    that nobody has used for a day are deleted.
    """
    # The index's checksums too: built again of the same vectors, its leaves may hold others.
    content = [FORMAT, searcher.manifest, effort.leaves, effort.candidates]
    target = folder / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    if not artifact.reused(target, Neighbors.open):
        Neighbors.write(
            target, searcher, effort, _searched(spark, len(searcher), open_searcher, effort)
        )
    return target


def _searched(
    spark: SparkSession, items: int, open_searcher: Callable[[], Searcher], effort: Effort
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Blocks: the position of the first item, positions (int32) and cosines (float32), both (items, depth).

    One Spark job for as many blocks as the driver may hold.
    """
    at_once, width = _ITEMS_AT_ONCE, min(effort.candidates, items)

    def search(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        for batch in batches:
            for first in batch.column("id").to_pylist():
                near, cosines = searcher.search(searcher.vectors[first : first + at_once], effort)
                row = first, near.astype(np.int32).tobytes(), cosines.astype(np.float32).tobytes()
                columns = [pa.array([value]) for value in row]
                yield pa.RecordBatch.from_arrays(columns, names=["first", "positions", "cosines"])

    step = at_once * max(1, _DRIVER_BYTES // (BYTES * width * at_once))
    for start in range(0, items, step):
        firsts = spark.range(start, min(start + step, items), at_once)
        blocks = firsts.mapInArrow(
            search, "first BIGINT, positions BINARY, cosines BINARY"
        ).toArrow()
        for first, near, cosines in zip(*blocks.columns, strict=True):
            block = (
                np.frombuffer(near.as_buffer(), np.int32),
                np.frombuffer(cosines.as_buffer(), np.float32),
            )
            yield first.as_py(), *(each.reshape(-1, width) for each in block)
