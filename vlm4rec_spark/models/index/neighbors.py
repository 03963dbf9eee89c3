"""Every item's nearest items, searched once for all users, as a folder beside the index that any process can open.

    manifest.json    written last: the index whose positions these are, how they were searched, the checksums
    positions.npy    int32 (items, depth), memory-mapped: row i holds what a search for item i finds, -1 past the last
    cosines.npy      float32 (items, depth), memory-mapped: exact cosines with item i; what stands at a -1 counts for
                     nothing

A row is in the order in which the search found it, so that its first n are what a search for n finds. Knows positions
of an index; knows neither users nor how the search is divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.searcher import Effort, Searcher

FORMAT = 1
BYTES = 8
"""Of each item and each neighbour: a position and a cosine."""
_AGAIN = "Run the recommend stage again."
_USERS_SERVED = 0.9
_DEPTH_STEP = 32


@dataclass(frozen=True)
class Neighbors:
    """Both arrays, memory-mapped, of one index; `leaves` were searched for each item."""

    positions: np.ndarray
    cosines: np.ndarray
    index_id: str
    leaves: int

    @property
    def depth(self) -> int:
        return self.positions.shape[1]

    @staticmethod
    def write(
        folder: Path,
        searcher: Searcher,
        effort: Effort,
        parts: Iterable[tuple[int, np.ndarray, np.ndarray]],
    ) -> None:
        """Write the folder from parts: the position of the first item, then positions and cosines (items, depth).

        The parts cover the index; one is in memory at a time. effort: that of each search, its candidates the depth.
        """
        folder.mkdir(parents=True, exist_ok=True)
        shape = len(searcher), min(effort.candidates, len(searcher))
        positions, cosines = (
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            for name, dtype in (("positions", np.int32), ("cosines", np.float32))
        )
        for first, near, similar in parts:
            positions[first : first + len(near)], cosines[first : first + len(near)] = near, similar
        for whole in (positions, cosines):
            whole.flush()
        artifact.seal(
            folder,
            {
                "format": FORMAT,
                "index_id": searcher.index_id,
                "items": shape[0],
                "depth": shape[1],
                "leaves": effort.leaves,
            },
        )

    @classmethod
    def open(cls, folder: Path) -> Neighbors:
        """Open the folder. Raises RunError when it is incomplete, damaged or of another format."""
        told = artifact.manifest("neighbours", folder, FORMAT, _AGAIN)
        # As plain arrays: each look into a memmap makes another memmap, which takes longer than the look.
        mapped = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("positions", "cosines")
        )
        positions, cosines = map(np.asarray, mapped)
        return cls(positions, cosines, told["index_id"], told["leaves"])

    def merged_for(self, searcher: Searcher, effort: Effort) -> bool:
        """Whether a search with this effort's leaves finds the same. Raises RunError where the index is another."""
        if self.index_id != searcher.index_id:
            raise RunError(
                f"The neighbours are those of index {self.index_id}, not of {searcher.index_id}. {_AGAIN}"
            )
        return self.leaves == effort.leaves


def pays_off(sample: pa.Table, users: int, items: int) -> bool:
    """True if the histories of `users` users hold more items than the index, judged by a sample."""
    sampled = pc.sum(pc.list_value_length(sample["history"])).as_py() or 0
    return users * sampled > items * len(sample)


def needed_depth(candidates: int, sample: pa.Table, items: int) -> int:
    """Neighbors per item that are enough for nine users in ten: the candidates and the user's `seen`.

    Rounded up to a multiple of 32, so that a few new events don't need a new file. For users who
    have seen more, neighbors are searched as if there were no file.
    """
    seen = pc.list_value_length(sample["seen"]).to_numpy()
    enough = candidates + np.quantile(seen, _USERS_SERVED)
    return min(_DEPTH_STEP * math.ceil(enough / _DEPTH_STEP), items)


def size_gb(items: int, depth: int) -> float:
    """Size of the folder on disk."""
    return items * depth * BYTES / 1e9
