"""The indexes that arms are searched in, built when an arm needs one. All splits share them.

Knows vectors and ids. Knows no user and no cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation.arms import FUSIONS, IMAGE
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher

NO_CONTENT = ""
"""The representation of an arm in which content has no share: every item has the same vector."""


class ArmIndexes:
    """Indexes under `folder`: all items that have a vector, not only candidates."""

    def __init__(
        self,
        embeddings: DataFrame,
        served: str,
        folder: Path,
    ):
        """embeddings: rows of the table. served: the representation whose vectors the fusions join
        with those of photos."""
        self.folder = folder
        self._embeddings = embeddings
        self._served = served
        self._candidates = pd.Index([], dtype=object)
        self._searchers: dict[str, Searcher] = {}

    def common_items(self, item_ids: pd.Index, representations: Iterable[str]) -> pd.Index:
        """The items, of these, that are in the index of each representation: the candidates."""
        for representation in sorted(representations):
            rows = self._rows(representation)
            item_ids = item_ids[item_ids.isin(rows["item_id"].to_pylist())]
            if len(item_ids):
                self._build(representation, rows)
        self._candidates = item_ids
        return item_ids

    def searcher(self, representation: str) -> Searcher:
        if representation not in self._searchers:
            self._build(representation, self._rows(representation))
        return self._searchers[representation]

    def _build(self, representation: str, rows: pa.Table) -> None:
        index = build_index(
            rows,
            representation or "no_content",
            "evaluate",
            self.folder,
            # Exact search: an arm is measured by its vectors, not by what an approximate index
            # loses.
            ann_min_items=2**62,
        )
        self._searchers[representation] = Searcher.open(index, verify=False)

    def _rows(self, representation: str) -> pa.Table:
        """item_id, embedding, content_sha256 and text, by item_id."""
        if representation == NO_CONTENT:
            return _table(self._candidates, np.ones((len(self._candidates), 1), np.float32))
        if representation in FUSIONS:
            return self._fused(representation)
        is_real = ~F.col("fallback") & (F.col("representation") == representation)
        text = F.lit("").alias("text")
        rows = self._embeddings.where(is_real)
        return (
            rows.select("item_id", "embedding", "content_sha256", text).toArrow().sort_by("item_id")
        )

    def _fused(self, fusion: str) -> pa.Table:
        texts = self.searcher(self._served)
        images = self.searcher(IMAGE)
        item_ids = np.intersect1d(texts.ids, images.ids).tolist()
        text_vectors = texts.vectors[texts.positions(item_ids)]
        image_vectors = images.vectors[images.positions(item_ids)]
        fused = FUSIONS[fusion](text_vectors, image_vectors)
        lengths = np.linalg.norm(fused, axis=1, keepdims=True)
        return _table(item_ids, (fused / lengths).astype(np.float32))


def _table(item_ids: Sequence[str] | pd.Index, vectors: np.ndarray) -> pa.Table:
    empty = [""] * len(item_ids)
    columns = {
        "item_id": item_ids,
        "embedding": list(vectors),
        "content_sha256": empty,
        "text": empty,
    }
    return pa.table(columns)
