"""Searches every item's neighbors, divided among the workers. Knows the index; knows no user."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.neighbors import BYTES, FORMAT, NeighborBlock, Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher

_BLOCK_ITEMS = 1_024
_DRIVER_BYTES = 2**27
"""The driver holds at most this much of the workers' results at a time."""
_BLOCK_SCHEMA = "first BIGINT, positions BINARY, cosines BINARY"


def build(
    spark: SparkSession,
    searcher: Searcher,
    open_searcher: Callable[[], Searcher],
    effort: Effort,
    folder: Path,
) -> Path:
    """Search every item, write its neighbors under `folder` and return the path.

    The path is named by the content. A sound folder of the same content is kept. Folders that
    weren't used for a day are deleted. `effort` is that of each search; its candidates are the
    depth. Needs `neighbors.size_gb` on disk and a few hundred MB of memory.
    """
    # The manifest has the index's checksums: of the same vectors ScaNN may build other leaves.
    content = [FORMAT, searcher.manifest, effort.leaves, effort.candidates]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    target = folder / digest[:16]
    if not artifact.reuse(target, Neighbors.open):
        blocks = _search_blocks(spark, len(searcher), open_searcher, effort)
        Neighbors.write(target, searcher, effort, blocks)
    return target


def _search_blocks(
    spark: SparkSession, items: int, open_searcher: Callable[[], Searcher], effort: Effort
) -> Iterator[NeighborBlock]:
    """Yield blocks: first position, positions (int32) and cosines (float32), both (items, depth).

    One Spark job searches as many blocks as the driver may hold.
    """
    block_items = _BLOCK_ITEMS
    depth = min(effort.candidates, items)

    def search(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        searcher = open_searcher()
        for batch in batches:
            for first in batch.column("id").to_pylist():
                queries = searcher.vectors[first : first + block_items]
                yield _block(first, *searcher.search(queries, effort))

    blocks_per_job = max(1, _DRIVER_BYTES // (BYTES * depth * block_items))
    items_per_job = block_items * blocks_per_job
    for start in range(0, items, items_per_job):
        end = min(start + items_per_job, items)
        firsts = spark.range(start, end, block_items)
        blocks = firsts.mapInArrow(search, _BLOCK_SCHEMA).toArrow()
        for first, positions, cosines in zip(*blocks.columns, strict=True):
            yield NeighborBlock(
                first.as_py(),
                np.frombuffer(positions.as_buffer(), np.int32).reshape(-1, depth),
                np.frombuffer(cosines.as_buffer(), np.float32).reshape(-1, depth),
            )


def _block(first: int, positions: np.ndarray, cosines: np.ndarray) -> pa.RecordBatch:
    columns = {
        "first": [first],
        "positions": [positions.astype(np.int32).tobytes()],
        "cosines": [cosines.astype(np.float32).tobytes()],
    }
    return pa.RecordBatch.from_pydict(columns)
