"""Which items are found together in histories, as a folder beside the index that any Python process can open.

    manifest.json     written last: the index whose positions these are, and the checksum of every file
    positions.npy     int32 (items, kept): row i holds the items found with item i, strongest first, -1 past the last
    strengths.npy     float32 (items, kept): how strongly, 0 past the last

Knows positions of an index; knows neither users nor where the counts come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm4rec_spark.models.index import artifact
from vlm4rec_spark.models.ranking.top_k import Candidates

FORMAT = 1
_AGAIN = "Run the recommend stage again."


@dataclass(frozen=True)
class ItemItemScores:
    """Both arrays, memory-mapped."""

    positions: np.ndarray
    strengths: np.ndarray

    @staticmethod
    def build(
        folder: Path,
        index_id: str,
        items: int,
        first: np.ndarray,
        second: np.ndarray,
        strengths: np.ndarray,
    ) -> None:
        """Write the folder from rows of (position, position of an item found with it, strength), each pair once."""
        order = np.lexsort((second, -strengths, first))
        first, second, strengths = first[order], second[order], strengths[order]
        counts = np.bincount(first, minlength=items)
        place = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = items, max(1, int(counts.max(initial=0)))
        positions, strong = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        positions[first, place], strong[first, place] = second, strengths
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "positions.npy", positions)
        np.save(folder / "strengths.npy", strong)
        artifact.seal(
            folder, {"format": FORMAT, "index_id": index_id, "items": items, "kept": shape[1]}
        )

    @classmethod
    def open(cls, folder: Path) -> ItemItemScores:
        """Open the folder. Raises RunError when it is incomplete, damaged or of another format."""
        artifact.manifest("cooccurrence", folder, FORMAT, _AGAIN)
        return cls(
            *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("positions", "strengths"))
        )

    def scores_for(self, history: np.ndarray, weights: np.ndarray) -> Candidates:
        """The items found with those of a history, by position, and how strongly: float64, the strongest is 1.

        An item's strength is the sum over the history of weight times strength; the scale is the user's own, so that
        it means the same in a small log and in a large one.
        """
        near = self.positions[history]
        there = near >= 0
        spoken = (self.strengths[history].astype(np.float64) * weights[:, None])[there]
        found, rows = np.unique(near[there].astype(np.int64), return_inverse=True)
        total = np.bincount(rows, spoken, len(found))
        return Candidates(found, total / total.max(initial=1e-300))
