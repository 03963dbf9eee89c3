"""The index folder: any Python process can open and search it.

    manifest.json    written last: what the folder was built from, and all checksums
    ids.parquet      item_id, sorted; row i belongs to vector i
    vectors.npy      float32 (items, dimension), memory-mapped, shared by all processes of a node
    words.npy        int32 (items, words), memory-mapped: see `telling_words`
    vocabulary.parquet   the word of each number, rarest in the catalogue first
    scann/           ScaNN's codes, if the catalogue is large enough for an approximate index
    coded.npy        int64: for each code the row of its item, -1 if the item changed or is gone

A version may reuse the codes and word weights of an earlier one, its base. Items that came since
are the delta: they have no codes and are searched exactly. Knows vectors and ids, not users or
rules.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.blocks import blocks
from vlm4rec_spark.models.index.telling_words import telling_words
from vlm4rec_spark.models.ranking.top_k import Candidates, top_k

FORMAT = 3
_ADVICE = "Run the index stage again."
_SCANN_MIN_ITEMS = 16
"""A tree with asymmetric hashing needs at least 16 items (ScaNN 1.4.2)."""
EXACT_COST = 5
"""Cost of an item in exact search, in scored codes: 384 products and a share of the sorting."""
_RESCORING_COST = 100
"""Cost of a candidate that is rescored, in scored codes (384 dimensions)."""
_MIN_QUERIES = 64
"""With 32 queries at a time ScaNN 1.4.2 searches other leaves than with 40, for one in hundreds."""
_EXTRA_NEIGHBORS = 8
"""Neighbors beyond the candidates that ScaNN is asked for, and that are dropped.

Which of equal codes ScaNN cuts off depends on their number. Their order doesn't.
"""
_BLOCK_SCORES = 2**24
_BLOCK_ROWS = 2**16


@dataclass(frozen=True)
class Effort:
    """How hard an approximate search tries: tree leaves searched, candidates rescored exactly."""

    leaves: int
    candidates: int

    def cost(self, searcher: "Searcher") -> float:
        """Cost of one query, in scored codes."""
        codes = len(searcher.coded) * self.leaves / searcher.leaf_count
        delta = EXACT_COST * len(searcher.delta)
        return codes + delta + _RESCORING_COST * self.candidates


class Searcher:
    """Cosine search over unit vectors. Open one with `Searcher.open`; it can't be pickled."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.manifest = manifest
        self.index_id: str = manifest["index_id"]
        self.base: str = manifest["base"]
        """index_id of the version whose codes and word weights are used; its own if built anew."""
        self.leaf_count: int = manifest["leaves"]
        """Leaves of ScaNN's tree; 0 if search is exact."""
        self.approximate = self.leaf_count > 0
        self.arrow_ids = _read_strings(folder / "ids.parquet")
        self.ids = np.asarray(self.arrow_ids.to_pylist(), dtype=object)
        self.vectors = artifact.map_array(folder / "vectors.npy")
        self.words = artifact.map_array(folder / "words.npy")
        self.vocabulary = _read_strings(folder / "vocabulary.parquet")
        self.coded = artifact.map_array(folder / "coded.npy")
        self.delta = np.setdiff1d(np.arange(len(self.ids)), self.coded)
        self._scann: Any = _open_scann(folder / "scann") if self.approximate else None
        self._positions = pd.Index(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def build(
        folder: Path,
        index_id: str,
        ids: Sequence[str],
        vectors: ndarray,
        texts: Sequence[str],
        ann_min_items: int,
        base: "Searcher | None" = None,
        content: str = "",
    ) -> None:
        """Write the index to `folder`.

        ids: sorted and distinct. vectors: float32 (items, dimension), unit. texts: one per item.
        ann_min_items: search is exact below it. base: the version whose codes and word weights are
        reused, see `can_be_base`. content: names what the folder was built from.
        Raises RunError for bad vectors.
        """
        _require_unit_vectors(ids, vectors)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vectors.npy", np.ascontiguousarray(vectors, np.float32))
        _write_strings(folder / "ids.parquet", "item_id", ids)
        frozen_words = base._frozen_words() if base else []
        words = telling_words(texts, frozen_words)
        np.save(folder / "words.npy", words.table)
        _write_strings(folder / "vocabulary.parquet", "word", words.vocabulary)
        coded = base.coded_rows(ids, vectors) if base else np.arange(len(ids))
        np.save(folder / "coded.npy", coded)
        leaves = base.leaf_count if base else _leaf_count(len(ids), ann_min_items)
        if leaves and base:
            shutil.copytree(base.folder / "scann", folder / "scann")
        elif leaves:
            _build_scann(folder / "scann", vectors, leaves)
        details = {
            "format": FORMAT,
            "index_id": index_id,
            "base": base.base if base else index_id,
            "content": content,
            "items": len(ids),
            "dimension": int(vectors.shape[1]),
            "leaves": leaves,
            "words": len(frozen_words or words.vocabulary),
        }
        artifact.seal(folder, details)

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Self:
        """Open an index. Raises RunError if it is incomplete, damaged or of another format."""
        return cls(folder, artifact.read_manifest(folder, "index", FORMAT, _ADVICE, verify))

    def can_be_base(
        self,
        ids: Sequence[str],
        vectors: ndarray,
        ann_min_items: int,
        rebuild_threshold: float,
    ) -> bool:
        """Whether a version of these items may reuse this one's codes and word weights.

        Items that were added, removed or changed may be a share of `rebuild_threshold` at most.
        """
        will_be_approximate = _leaf_count(len(ids), ann_min_items) > 0
        if self.approximate != will_be_approximate or vectors.shape[1] != self.vectors.shape[1]:
            return False
        unchanged = int((self.coded_rows(ids, vectors) >= 0).sum())
        added = len(ids) - unchanged
        removed = len(self.coded) - unchanged
        return added + removed <= rebuild_threshold * len(ids)

    def coded_rows(self, ids: Sequence[str], vectors: ndarray) -> ndarray:
        """`coded` of a version with these items, int64; -1 where an item's vector has changed."""
        rows = pd.Index(ids, dtype=object).get_indexer(self._positions)
        for block in blocks(len(rows), _BLOCK_ROWS):
            block_rows = rows[block]
            changed = (vectors[block_rows] != self.vectors[block]).any(axis=1)
            block_rows[changed] = -1
        return np.where(self.coded >= 0, rows[self.coded], -1)

    def positions(self, item_ids: Sequence[str]) -> ndarray:
        """int64 positions of the items in the index; -1 for an item that isn't in it."""
        return self._positions.get_indexer(pd.Index(item_ids, dtype=object))

    def positions_of(self, item_ids: pa.Array) -> ndarray:
        """As `positions`. Looks each distinct id up once."""
        encoded = item_ids.dictionary_encode()
        positions = self.positions(encoded.dictionary.to_pylist())
        return positions[encoded.indices.to_numpy()]

    def score_all(self, queries: ndarray, subset: ndarray | None = None) -> Candidates:
        """Every item as a candidate of every query: positions and cosines, in index order.

        subset: sorted positions; only these items are scored.
        """
        self._check(queries)
        items = np.arange(len(self)) if subset is None else subset
        vectors = self.vectors if subset is None else self.vectors[subset]
        cosines = queries @ vectors.T
        return Candidates(np.broadcast_to(items, cosines.shape), cosines)

    def search(self, queries: ndarray, effort: Effort) -> Candidates:
        """Approximate candidates, rescored exactly: positions and float64 cosines.

        They keep the order of the search, so the first c are the result of a search for c. A short
        answer has positions of -1, and so has an item that is gone.
        """
        self._check(queries)
        found = self._search_codes(queries, effort)
        positions = found.positions
        if len(self.delta):
            positions = self._merge_delta(queries, found)
        return Candidates(positions, self._cosines(queries, positions))

    def _search_codes(self, queries: ndarray, effort: Effort) -> Candidates:
        """Candidates with ScaNN's own scores, NaN where its answer is short."""
        candidates = min(effort.candidates, len(self))
        padded = np.zeros((max(len(queries), _MIN_QUERIES), queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        search = self._scann.search_batched_parallel
        if os.environ.get("OMP_NUM_THREADS") == "1":
            search = self._scann.search_batched
        codes, scores = search(
            padded,
            final_num_neighbors=min(candidates + _EXTRA_NEIGHBORS, len(self)),
            leaves_to_search=effort.leaves,
        )
        codes = codes[: len(queries), :candidates]
        scores = scores[: len(queries), :candidates]
        # ScaNN pads a short answer with index 0 and a NaN score.
        positions = np.where(np.isnan(scores), -1, self.coded[codes])
        return Candidates(positions, scores)

    def _merge_delta(self, queries: ndarray, found: Candidates) -> ndarray:
        """Positions, with the delta's items merged in by their cosines."""
        width = found.positions.shape[1]
        merged = np.empty_like(found.positions)
        vectors = self.vectors[self.delta]
        no_exclusions = np.empty(0, np.int64)
        all_eligible = np.ones(len(self), bool)
        for block in blocks(len(queries), _BLOCK_SCORES, len(vectors)):
            cosines = queries[block] @ vectors.T
            items = np.broadcast_to(self.delta, cosines.shape)
            delta = top_k(items, cosines, no_exclusions, all_eligible, width)
            positions = np.concatenate([found.positions[block], delta.positions], axis=1)
            scores = np.concatenate([found.scores[block], delta.scores], axis=1)
            # An item that is gone keeps its rank (as -1). Else a deeper search would fill it.
            keys = np.where(np.isnan(scores), np.inf, -scores)
            order = np.argsort(keys, axis=1, kind="stable")[:, :width]
            merged[block] = np.take_along_axis(positions, order, 1)
        return merged

    def _cosines(self, queries: ndarray, positions: ndarray) -> ndarray:
        """Exact cosines, float64 (queries, candidates)."""
        cosines = np.empty(positions.shape)
        # Vectors of one query at a time: they stay in the core's caches.
        for row, query in enumerate(queries.astype(np.float64)):
            cosines[row] = self.vectors[positions[row]].astype(np.float64) @ query
        return cosines

    def _check(self, queries: ndarray) -> None:
        """Raise RunError for queries of another dimension, and for numbers that aren't finite."""
        dimension = self.vectors.shape[1]
        if queries.shape[1] != dimension:
            raise RunError(
                f"The query vectors have {queries.shape[1]} dimensions, the index has {dimension}: "
                "they come from two encoders. Run the stages from embed on again."
            )
        if not np.isfinite(queries).all():
            raise RunError(
                "A query vector has NaN or infinite numbers. Run the stages from embed on again."
            )

    def _frozen_words(self) -> list[str]:
        """The base's words, whose weights don't change."""
        return self.vocabulary.to_pylist()[-self.manifest["words"] :]


def _require_unit_vectors(ids: Sequence[str], vectors: ndarray) -> None:
    if len(ids) == 0:
        raise RunError("The index can't be built: no item has an embedding.")
    deviations = np.abs(np.linalg.norm(vectors, axis=1) - 1)
    bad = np.flatnonzero(~(deviations <= 1e-3))  # a comparison with NaN is false
    if len(bad):
        raise RunError(
            f"The index can't be built: {len(bad):,} of {len(ids):,} embeddings are not unit "
            f"vectors (zero, NaN or unscaled), such as that of {ids[bad[0]]!r}."
        )


def _write_strings(file: Path, column: str, values: Sequence[str]) -> None:
    pq.write_table(pa.table({column: pa.array(values, pa.string())}), file)


def _read_strings(file: Path) -> pa.Array:
    return pq.read_table(file).column(0).combine_chunks()


def _leaf_count(items: int, ann_min_items: int) -> int:
    """Leaves of ScaNN's tree; 0 if so few items are searched exactly."""
    if items < max(ann_min_items, _SCANN_MIN_ITEMS):
        return 0
    # The square root is ScaNN's own rule of thumb (its docs, algorithms.md).
    return round(math.sqrt(items))


def _build_scann(folder: Path, vectors: ndarray, leaves: int) -> None:
    # No reorder(): it stores a second copy of all vectors. vectors.npy serves for rescoring.
    searcher = (
        _scann()
        .scann_ops_pybind.builder(vectors, 10, "dot_product")
        .tree(
            num_leaves=leaves,
            num_leaves_to_search=max(1, leaves // 10),
            training_sample_size=min(len(vectors), 250_000),
        )
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .build()
    )
    folder.mkdir(exist_ok=True)
    searcher.serialize(str(folder), relative_path=True)


def _open_scann(folder: Path) -> Any:
    scann = _scann().scann_ops_pybind.load_searcher(str(folder))
    # In a worker Spark sets this to spark.task.cpus. ScaNN would use all of the machine.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        scann.set_num_threads(int(threads))
    return scann


def _scann() -> Any:
    try:
        import scann
    except ImportError as missing:
        raise UsageError(
            f"{missing}. An approximate index needs: pip install 'vlm4rec_spark[local]'"
        ) from missing
    return scann
