"""Items that occur together in histories, as a folder that any Python process can open.

    manifest.json     written last: the index whose positions these are, and all checksums
    positions.npy     int32 (items, max_neighbors): row i has the items found with item i,
                      strongest first, -1 past the last
    strengths.npy     float32 (items, max_neighbors): how strongly, 0 past the last

Knows positions of an index. Doesn't know users, or where the counts come from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy import ndarray

from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.ranking.top_k import Candidates, rank_in_group

FORMAT = 1
_ADVICE = "Run the recommend stage again."


@dataclass(frozen=True)
class ItemItemScores:
    """Both arrays, memory-mapped."""

    positions: ndarray
    strengths: ndarray

    @staticmethod
    def build(
        folder: Path,
        index_id: str,
        items: int,
        first: ndarray,
        second: ndarray,
        strengths: ndarray,
    ) -> None:
        """Write the folder from pairs: two positions and the strength, each pair once."""
        order = np.lexsort((second, -strengths, first))
        rows = first[order]
        counts = np.bincount(rows, minlength=items)
        columns = rank_in_group(counts)
        max_neighbors = max(1, int(counts.max(initial=0)))
        positions = np.full((items, max_neighbors), -1, np.int32)
        positions[rows, columns] = second[order]
        strength_table = np.zeros((items, max_neighbors), np.float32)
        strength_table[rows, columns] = strengths[order]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "positions.npy", positions)
        np.save(folder / "strengths.npy", strength_table)
        details = {
            "format": FORMAT,
            "index_id": index_id,
            "items": items,
            "max_neighbors": max_neighbors,
        }
        artifact.seal(folder, details)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the folder. Raises RunError if it is incomplete, damaged or of another format."""
        artifact.read_manifest(folder, "cooccurrence", FORMAT, _ADVICE)
        positions = artifact.map_array(folder / "positions.npy")
        strengths = artifact.map_array(folder / "strengths.npy")
        return cls(positions, strengths)

    def scores_for(self, history: ndarray, weights: ndarray) -> Candidates:
        """The items found with those of one user's history: sorted positions and float64 scores.

        A score is the sum over the history of weight times strength. It is scaled so that the
        user's strongest item has 1. So it means the same in small and large logs.
        """
        neighbors = self.positions[history]
        filled = neighbors >= 0
        strengths = self.strengths[history].astype(np.float64) * weights[:, None]
        neighbor_items = neighbors[filled].astype(np.int64)
        items, groups = np.unique(neighbor_items, return_inverse=True)
        totals = np.bincount(groups, strengths[filled], len(items))
        return Candidates(items, totals / totals.max(initial=1e-300))
