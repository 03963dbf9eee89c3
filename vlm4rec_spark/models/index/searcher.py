"""The index artefact: an immutable folder that any Python process can open and search.

    manifest.json    written last: what the folder was built from, and the checksum of every file
    ids.parquet      item_id, sorted; row i belongs to vector i
    vectors.npy      float32 (items, dimension), memory-mapped, shared by all processes of a node
    words.npy        int32 (items, words), memory-mapped: the item's telling words, rarest first, -1 past the last
    vocabulary.parquet   word i of the catalogue, rarest first
    scann/           ScaNN's codes, when the catalogue is large enough for an approximate index
    coded.npy        int64: for each item that the codes were made of its row now, -1 where it is gone or another

A version may rest on an earlier one, its base: it has the base's codes and the base's word weights, and items that came
since are searched exactly beside the codes.

Knows vectors and ids; knows neither users nor rules (`ranking.py`) nor how a folder travels to an executor.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.ranking.top_k import Candidates, top_k

FORMAT = 3
_AGAIN = "Run the index stage again."
_SCANN_LEAST = 16
"""Tree with asymmetric hashing needs at least 16 items (ScaNN 1.4.2)."""
EXACT_COST = 5
"""Of an item in exact search, in codes that are scored: 384 products and its share in the sorting (see Effort.cost)."""
_LEAST_QUERIES = 64
"""For 32 at a time ScaNN 1.4.2 searches other leaves than for 40, of one query in some hundreds."""
_TIES = 8
"""So many more are asked of ScaNN and left: which of equals (alike codes) it cuts off depends on how many it is asked
for, in what order it tells them doesn't."""
_SCORES_AT_ONCE = 2**24
_ROWS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Effort:
    """How hard an approximate search tries: tree leaves that are searched, candidates that are rescored exactly."""

    leaves: int
    candidates: int

    def with_more(self, more: np.ndarray) -> Effort:
        """As much for each, and for each the most candidates that any of them needs more, int64 (queries,)."""
        return Effort(self.leaves, self.candidates + int(more.max(initial=0)))

    def cost(self, searcher: Searcher) -> float:
        """Of one query, in codes that are scored; a candidate costs as much as a hundred of them (384 dimensions)."""
        codes = len(searcher.coded) * self.leaves / searcher.manifest["leaves"]
        return codes + EXACT_COST * len(searcher.fresh) + 100 * self.candidates


class Searcher:
    """Cosine search over unit vectors. Open one with `Searcher.open`; it can't be pickled."""

    def __init__(
        self,
        folder: Path,
        names: pa.Array,
        words: np.ndarray,
        vocabulary: pa.Array,
        vectors: np.ndarray,
        coded: np.ndarray,
        scann: Any,
        manifest: dict,
    ):
        self.folder = folder
        self.names, self.words, self.vocabulary = names, words, vocabulary
        self.vectors, self.coded, self.manifest = vectors, coded, manifest
        self.fresh = np.setdiff1d(np.arange(len(names)), coded)
        self.ids = np.asarray(names.to_pylist(), dtype=object)
        self._scann = scann
        self._positions = pd.Index(self.ids)

    @property
    def index_id(self) -> str:
        return self.manifest["index_id"]

    @property
    def base(self) -> str:
        """index_id of the version whose codes and word weights these are; its own where it was built anew."""
        return self.manifest["base"]

    @property
    def approximate(self) -> bool:
        return self._scann is not None

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def build(
        folder: Path,
        index_id: str,
        ids: Sequence[str],
        vectors: np.ndarray,
        texts: Sequence[str],
        ann_min_items: int,
        base: Searcher | None = None,
        content: str = "",
    ) -> None:
        """Write the artefact to `folder`. ids must be sorted and distinct; vectors float32 (items, dimension), unit.

        ScaNN's codes are built from `scann_from` items on; below it search is exact. With a `base` (see `rests`) its
        codes and word weights are taken over. `content` names what the folder was built from. Raises RunError for bad
        vectors.
        """
        if len(ids) == 0:
            raise RunError("The index can't be built: no item has an embedding.")
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) <= 1e-3))
        if len(bad):
            raise RunError(
                f"The index can't be built: {len(bad):,} of {len(ids):,} embeddings are not unit vectors "
                f"(zero, NaN or unscaled), such as that of {ids[bad[0]]!r}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vectors.npy", np.ascontiguousarray(vectors, np.float32))
        pq.write_table(pa.table({"item_id": pa.array(ids, pa.string())}), folder / "ids.parquet")
        frozen = base.vocabulary.to_pylist()[-base.manifest["words"] :] if base else []
        words, vocabulary = _telling_words(texts, frozen)
        np.save(folder / "words.npy", words)
        pq.write_table(
            pa.table({"word": pa.array(vocabulary, pa.string())}), folder / "vocabulary.parquet"
        )
        np.save(folder / "coded.npy", base.still(ids, vectors) if base else np.arange(len(ids)))
        leaves = (
            base.manifest["leaves"]
            if base
            else _leaves(len(ids))
            if _large(len(ids), ann_min_items)
            else 0
        )
        if leaves and base:
            shutil.copytree(base.folder / "scann", folder / "scann")
        elif leaves:
            _build_scann(folder / "scann", vectors)
        artifact.seal(
            folder,
            {
                "format": FORMAT,
                "index_id": index_id,
                "base": base.base if base else index_id,
                "content": content,
                "items": len(ids),
                "dimension": int(vectors.shape[1]),
                "leaves": leaves,
                "words": len(frozen or vocabulary),
            },
        )

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Searcher:
        """Open an artefact. Raises RunError when it is incomplete, damaged or of another format."""
        manifest = artifact.manifest("index", folder, FORMAT, _AGAIN, verify)
        columns = (
            pq.read_table(folder / f"{name}.parquet").column(0) for name in ("ids", "vocabulary")
        )
        names, vocabulary = (column.combine_chunks() for column in columns)
        # As plain arrays: each look into a memmap makes another memmap, which takes longer than the look.
        arrays = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("vectors", "words", "coded")
        )
        vectors, words, coded = map(np.asarray, arrays)
        scann = (
            _scann().scann_ops_pybind.load_searcher(str(folder / "scann"))
            if manifest["leaves"]
            else None
        )
        # In a worker Spark sets this to the task's cores (spark.task.cpus); ScaNN would take all of the machine.
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if scann is not None and threads.isdigit():
            scann.set_num_threads(int(threads))
        return cls(folder, names, words, vocabulary, vectors, coded, scann, manifest)

    def rests(
        self, ids: Sequence[str], vectors: np.ndarray, ann_min_items: int, most: float
    ) -> bool:
        """Whether a version of these items may rest on this one: at most the share `most` came, went or changed."""
        if vectors.shape[1] != self.vectors.shape[1] or self.approximate != _large(
            len(ids), ann_min_items
        ):
            return False
        there = int((self.still(ids, vectors) >= 0).sum())
        return len(ids) - there + len(self.coded) - there <= most * len(ids)

    def still(self, ids: Sequence[str], vectors: np.ndarray) -> np.ndarray:
        """As `coded`, int64, of a version that has these items: where an item of the codes still has its vector."""
        place = pd.Index(ids, dtype=object).get_indexer(self._positions)
        for start in range(0, len(place), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            place[part][(vectors[place[part]] != self.vectors[part]).any(axis=1)] = -1
        return np.where(self.coded >= 0, place[self.coded], -1).astype(np.int64)

    def positions(self, item_ids: Sequence[str]) -> np.ndarray:
        """int64 positions of the items in the index; -1 for an item that isn't in it."""
        return self._positions.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int64)

    def positions_of(self, item_ids: pa.Array) -> np.ndarray:
        """As `positions`; each distinct id is looked up once, however often it stands there."""
        named = item_ids.dictionary_encode()
        known = self.positions(named.dictionary.to_pylist())
        return known[named.indices.to_numpy()] if len(known) else np.empty(0, np.int64)

    def exact(self, queries: np.ndarray, among: np.ndarray | None = None) -> Candidates:
        """Every item, or those at the sorted positions `among`, as a candidate of every query: positions (queries,
        items) and cosines, in index order."""
        self._check(queries)
        scores = queries @ (self.vectors if among is None else self.vectors[among]).T
        items = np.arange(len(self), dtype=np.int64) if among is None else among
        return Candidates(np.broadcast_to(items, scores.shape), scores)

    def search(self, queries: np.ndarray, effort: Effort) -> Candidates:
        """Approximate candidates, rescored exactly: positions and float64 cosines, both (queries, candidates).

        They stand in the order in which they were found, so that the first c are what a search for c gives. ScaNN pads
        a short answer with index 0 and a NaN distance; here such a place has position -1, as has an item that is gone.
        """
        self._check(queries)
        candidates = min(effort.candidates, len(self))
        alone = os.environ.get("OMP_NUM_THREADS") == "1"
        search = self._scann.search_batched if alone else self._scann.search_batched_parallel
        asked = np.zeros((max(len(queries), _LEAST_QUERIES), queries.shape[1]), np.float32)
        asked[: len(queries)] = queries
        positions, distances = search(
            asked,
            final_num_neighbors=min(candidates + _TIES, len(self)),
            leaves_to_search=effort.leaves,
        )
        positions, distances = (
            found[: len(queries), :candidates] for found in (positions, distances)
        )
        positions = np.where(np.isnan(distances), -1, self.coded[positions])
        if len(self.fresh):
            positions = self._with_fresh(queries, positions, distances)
        scores, wide = np.empty(positions.shape), queries.astype(np.float64)
        # Vectors of one query at a time: they stay in the core's caches.
        shape = positions.shape[1], queries.shape[1]
        some, found = np.empty(shape, np.float32), np.empty(shape)
        for row in range(len(queries)):
            np.take(self.vectors, positions[row], axis=0, out=some, mode="clip")
            found[...] = some
            np.matmul(found, wide[row], out=scores[row])
        return Candidates(positions, scores)

    def _check(self, queries: np.ndarray) -> None:
        """Raises RunError for queries of another dimension, or not finite; of a query of zeros all cosines are 0."""
        dimension = self.vectors.shape[1]
        if queries.shape[1] != dimension:
            raise RunError(
                f"A query of {queries.shape[1]} dimensions was asked of an index of {dimension}: they come "
                "from two encoders. Run the stages from embed on again."
            )
        if not np.isfinite(queries).all():
            raise RunError(
                "A query has NaN or infinite numbers. Run the stages from embed on again."
            )

    def _with_fresh(
        self, queries: np.ndarray, positions: np.ndarray, distances: np.ndarray
    ) -> np.ndarray:
        """Positions, merged with those of the items beside the codes: these by their cosines, the others by ScaNN's."""
        candidates, fresh, merged = (
            positions.shape[1],
            self.vectors[self.fresh],
            np.empty_like(positions),
        )
        none, everything = np.empty(0, np.int64), np.ones(len(self), bool)
        step = max(1, _SCORES_AT_ONCE // len(fresh))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            cosines = queries[part] @ fresh.T
            beside = np.broadcast_to(self.fresh, cosines.shape)
            near, nearness = top_k(beside, cosines, none, everything, candidates)
            both = np.concatenate([positions[part], near], axis=1)
            found = np.concatenate([distances[part], nearness], axis=1)
            # An item that is gone keeps its place (as -1): else a deeper search would find another in it.
            order = np.argsort(np.where(np.isnan(found), np.inf, -found), axis=1, kind="stable")[
                :, :candidates
            ]
            merged[part] = np.take_along_axis(both, order, 1)
        return merged


def _large(items: int, ann_min_items: int) -> bool:
    return items >= max(ann_min_items, _SCANN_LEAST)


def _leaves(items: int) -> int:
    # The square root is ScaNN's own rule of thumb (its docs, algorithms.md).
    return max(1, round(math.sqrt(items)))


def _build_scann(folder: Path, vectors: np.ndarray) -> None:
    leaves, sample = _leaves(len(vectors)), min(len(vectors), 250_000)
    searcher = (
        _scann()
        .scann_ops_pybind.builder(vectors, 10, "dot_product")
        .tree(
            num_leaves=leaves,
            num_leaves_to_search=max(1, leaves // 10),
            training_sample_size=sample,
        )
        # No reorder(): it keeps a second copy of all vectors in the folder; candidates are rescored from vectors.npy.
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .build()
    )
    folder.mkdir(exist_ok=True)
    searcher.serialize(str(folder), relative_path=True)


def _scann() -> Any:
    try:
        import scann
    except ImportError as missing:
        raise UsageError(
            f"{missing}. An approximate index needs: pip install 'vlm4rec_spark[local]'"
        ) from missing
    return scann


_WORD = re.compile(r"[^\W\d_]{3,}")
_STOP = frozenset(
    {
        "and",
        "are",
        "but",
        "can",
        "for",
        "from",
        "has",
        "have",
        "into",
        "its",
        "made",
        "not",
        "out",
        "per",
        "same",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "this",
        "used",
        "using",
        "was",
        "were",
        "which",
        "while",
        "with",
        "you",
        "your",
    }
)


_MOST_WORDS = 32


def _telling_words(
    texts: Sequence[str], frozen: Sequence[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """The words of each text by their numbers, and the words; rarest in the catalogue first (inverse document
    frequency), without stop words; of a long text the rarest. Words `frozen` keep their order, after all new ones."""
    words = [set(_WORD.findall(text.lower())) - _STOP for text in texts]
    frequency = Counter(word for row in words for word in row)
    new = frequency.keys() - set(frozen)
    # Beside frozen weights a new word's own would change with each version.
    vocabulary = [*sorted(new, key=lambda word: (0 if frozen else frequency[word], word)), *frozen]
    number = {word: place for place, word in enumerate(vocabulary)}
    rows = [sorted(number[word] for word in row)[:_MOST_WORDS] for row in words]
    table = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table, vocabulary
