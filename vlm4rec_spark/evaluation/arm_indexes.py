"""The indexes that arms are searched in, built when an arm needs one. All splits share them.

Knows vectors and ids. Knows no user and no cut.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from vlm4rec_spark.evaluation.arms import FUSIONS, IMAGE
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher

NO_CONTENT = "no_content"
"""The representation of an arm in which content has no share: every item has the same vector."""

_FEW_ITEMS = 10_000
"""Up to so many items the vectors of all representations are read at once: some 100 MB."""


class ArmIndexes:
    """Indexes under `folder`: all items that have a vector, not only candidates."""

    def __init__(self, embeddings: DataFrame, served: str, folder: Path):
        """embeddings: rows of the table `embeddings`. served: the representation whose vectors the
        fusions average or concatenate with those of photos."""
        self.folder = folder
        self._embeddings = embeddings
        self._served = served
        self._candidates = pd.Index([], dtype=object)
        self._searchers: dict[str, Searcher] = {}

    def common_items(self, item_ids: pd.Index, representations: Iterable[str]) -> pd.Index:
        """The items, of these, that are in the index of each representation: the candidates."""
        names = sorted(representations)
        at_once = len(names) if len(item_ids) <= _FEW_ITEMS else 1
        for start in range(0, len(names), max(at_once, 1)):
            group = names[start : start + at_once]
            vectors = self._vectors(group)
            for representation in group:
                rows = vectors.filter(pc.equal(vectors["representation"], representation))
                item_ids = item_ids[item_ids.isin(rows["item_id"].to_pylist())]
                if len(item_ids):
                    self._build(representation, rows)
        self._candidates = item_ids
        return item_ids

    def searcher(self, representation: str) -> Searcher:
        """The index of a representation of `common_items`, of a fusion, or of NO_CONTENT."""
        if representation not in self._searchers:
            if representation in FUSIONS:
                rows = self._fused(representation)
            else:
                rows = _table(self._candidates, np.ones((len(self._candidates), 1), np.float32))
            self._build(representation, rows)
        return self._searchers[representation]

    def _build(self, representation: str, rows: pa.Table) -> None:
        index = build_index(
            rows,
            representation,
            encoder_id="evaluate",
            folder=self.folder,
            # Exact search: an arm is measured by its vectors, not by what an approximate index
            # loses.
            ann_min_items=2**62,
        )
        self._searchers[representation] = Searcher.open(index, verify=False)

    def _vectors(self, representations: Sequence[str]) -> pa.Table:
        """Rows of the table, by item_id, without fallbacks."""
        is_real = ~F.col("fallback") & F.col("representation").isin(*representations)
        columns = ("item_id", "representation", "embedding", "content_sha256")
        rows = self._embeddings.where(is_real).select(*columns, F.lit("").alias("text"))
        return rows.toArrow().sort_by("item_id")

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
