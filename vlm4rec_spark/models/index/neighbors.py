"""Every item's nearest items, searched once for all users, as a folder that any process can open.

    manifest.json    written last: the index whose positions these are, the effort, all checksums
    positions.npy    int32 (items, depth): row i has the result of a search for item i,
                     -1 past the last
    cosines.npy      float32 (items, depth): exact cosines with item i; without meaning at a -1

A row keeps the order of the search. So its first n are the result of a search for n candidates.
Knows positions of an index. Doesn't know users, or how the search is distributed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.index.searcher import Effort, Searcher

FORMAT = 1
BYTES = 8
"""Per item and neighbor: a position and a cosine."""
_USERS_SERVED = 0.9
_DEPTH_STEP = 32
_ADVICE = "Run the recommend stage again."


class NeighborBlock(NamedTuple):
    """Rows of the table from `first_item` on, both arrays (rows, depth)."""

    first_item: int
    positions: ndarray
    cosines: ndarray


@dataclass(frozen=True)
class Neighbors:
    """Both arrays, memory-mapped, of one index. `leaves` were searched for each item."""

    positions: ndarray
    cosines: ndarray
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
        blocks: Iterable[NeighborBlock],
    ) -> None:
        """Write the folder from blocks that cover the index. One block is in memory at a time.

        effort: that of each search; its candidates are the depth.
        """
        folder.mkdir(parents=True, exist_ok=True)
        items = len(searcher)
        depth = min(effort.candidates, items)
        positions = _create(folder / "positions.npy", np.int32, (items, depth))
        cosines = _create(folder / "cosines.npy", np.float32, (items, depth))
        for block in blocks:
            rows = slice(block.first_item, block.first_item + len(block.positions))
            positions[rows] = block.positions
            cosines[rows] = block.cosines
        positions.flush()
        cosines.flush()
        details = {
            "format": FORMAT,
            "index_id": searcher.index_id,
            "items": items,
            "depth": depth,
            "leaves": effort.leaves,
        }
        artifact.seal(folder, details)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the folder. Raises RunError if it is incomplete, damaged or of another format."""
        manifest = artifact.read_manifest(folder, "neighbours", FORMAT, _ADVICE)
        positions = artifact.map_array(folder / "positions.npy")
        cosines = artifact.map_array(folder / "cosines.npy")
        return cls(positions, cosines, manifest["index_id"], manifest["leaves"])

    def replace_search(self, searcher: Searcher, leaves: int) -> bool:
        """Whether a search of so many leaves finds the same neighbors.

        Raises RunError if the neighbors are those of another index.
        """
        if self.index_id != searcher.index_id:
            raise RunError(
                f"The neighbours are those of index {self.index_id}, "
                f"not of {searcher.index_id}. {_ADVICE}"
            )
        return self.leaves == leaves


def pays_off(sample: pa.Table, users: int, items: int) -> bool:
    """True if the histories of `users` users hold more items than the index, judged by a sample."""
    sampled = pc.sum(pc.list_value_length(sample["history"])).as_py() or 0
    return users * sampled > items * len(sample)


def needed_depth(candidates: int, sample: pa.Table, items: int) -> int:
    """Neighbors per item that are enough for nine users in ten.

    These users need the candidates and as many as they have `seen`. Rounded up to a multiple of 32,
    so that a few new events don't need a new folder. For users who have seen more, neighbors
    are searched as if there were no folder.
    """
    seen = pc.list_value_length(sample["seen"]).to_numpy()
    enough = candidates + np.quantile(seen, _USERS_SERVED)
    return min(_DEPTH_STEP * math.ceil(enough / _DEPTH_STEP), items)


def size_gb(items: int, depth: int) -> float:
    """Size of the folder on disk."""
    return items * depth * BYTES / 1e9


def _create(file: Path, dtype: type, shape: tuple[int, int]) -> np.memmap:
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
