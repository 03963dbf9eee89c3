"""Builds index and item-item folders, each named by a hash of its content.

Knows vectors, ids and counted pairs. Doesn't know where these come from. Imports no Spark.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.item_item_scores import FORMAT as ITEM_ITEM_FORMAT
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import FORMAT as INDEX_FORMAT
from vlm4rec_spark.models.index.searcher import Searcher


def build_index(
    rows: pa.Table,
    representation: str,
    encoder_id: str,
    folder: Path,
    ann_min_items: int,
    base: Searcher | None = None,
    rebuild_threshold: float = 0.0,
) -> Path:
    """Build the index of `rows` under `folder` and return its path.

    rows: item_id, embedding, content_sha256 and text, sorted by item_id. A sound index of the same
    content is kept. The new index reuses the codes of the version `base`, unless more than a share
    of `rebuild_threshold` of the items was added, removed or changed since. Runs in one process and
    holds all vectors: items x dimension x 4 bytes, twice while ScaNN trains.
    """
    ids = rows["item_id"].to_pylist()
    vectors = _matrix(rows["embedding"])
    content = _digest(
        INDEX_FORMAT,
        representation,
        encoder_id,
        ann_min_items,
        ids,
        rows["content_sha256"].to_pylist(),
        # Evaluation arms have no encoder id: only the vectors tell their indexes apart.
        _sha256(vectors),
    )
    if base and base.manifest["content"] == content:
        return base.folder
    if base and not base.can_be_base(ids, vectors, ann_min_items, rebuild_threshold):
        base = None
    base_id = base.base if base else ""
    reused_codes = _sha256(base.coded_rows(ids, vectors)) if base else ""
    index_id = _digest(content, base_id, reused_codes)[:16]
    target = folder / index_id
    try:
        Searcher.open(target)
        return target
    except RunError:  # missing, incomplete or damaged
        shutil.rmtree(target, ignore_errors=True)
    texts = [text or "" for text in rows["text"].to_pylist()]
    Searcher.build(
        target,
        index_id,
        ids,
        vectors,
        texts,
        ann_min_items,
        base,
        content,
    )
    return target


def build_item_item(pairs: pa.Table, searcher: Searcher, folder: Path) -> Path:
    """Build the folder of item-item scores under `folder` and return its path.

    pairs: item_id, other_id and strength. A sound folder of the same content is kept. Pairs with an
    item outside the index are left out. Folders that weren't used for a day are deleted. Holds all
    pairs: items x max_neighbors x about 60 bytes.
    """
    first = searcher.positions(pairs["item_id"].to_pylist())
    second = searcher.positions(pairs["other_id"].to_pylist())
    strengths = pairs["strength"].to_numpy().astype(np.float32)
    # In one order, so that the name doesn't depend on how the rows were partitioned.
    order = np.lexsort((second, first))
    order = order[(first >= 0)[order] & (second >= 0)[order]]
    columns = (first[order], second[order], strengths[order])
    digests = [_sha256(column) for column in columns]
    target = folder / _digest(ITEM_ITEM_FORMAT, searcher.index_id, *digests)[:16]
    if not artifact.reuse(target, ItemItemScores.open):
        ItemItemScores.build(target, searcher.index_id, len(searcher), *columns)
    return target


def _matrix(embeddings: pa.ChunkedArray) -> np.ndarray:
    """float32 (items, dimension)."""
    if not len(embeddings):
        return np.empty((0, 1), np.float32)
    values = pa.concat_arrays(embeddings.chunks).flatten()
    return np.asarray(values, np.float32).reshape(len(embeddings), -1)


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
