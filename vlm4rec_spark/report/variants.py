"""A few users' lists with and without variants collapsed: those that hide most, and the ranking with it in its place.

Knows the tables that say how a hidden item scores; knows no HTML. A list doesn't hold the scores of what it hides, so
they are worked out again from the vectors; where that doesn't give the list's own scores too, the user is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pyspark.sql import Row
from pyspark.sql import functions as F

from vlm4rec_spark import schemas
from vlm4rec_spark.models.ranking import SCORE_DIGITS
from vlm4rec_spark.report.album import Album
from vlm4rec_spark.report.data import Collapsed, Variants

if TYPE_CHECKING:
    from vlm4rec_spark.tables import Tables

_USERS = 3
_PLACES = 12
_SAME = 1e-5
"""By so much at most a score that was worked out again differs: the last digits of float32."""

Place = tuple[str, float, Sequence[str]]
"""item_id, score and what the place hides."""


class ChosenVariants:
    """Of the users whose first places hide most, the item ids of these places and of the ranking without collapsing."""

    def __init__(self, tables: Tables, shape: str, encoder: str):
        """`shape` of the profiles; `encoder` that their vectors are of."""
        # A place's best come first, so that no more than the strip's length can be in the strip.
        first = F.transform(
            F.slice("items", 1, _PLACES),
            lambda item: F.struct(item["item_id"], item["score"], F.slice(item["collapsed"], 1, _PLACES)),
        )
        hidden = F.size(F.flatten(F.transform(F.slice("items", 1, _PLACES), lambda item: item["collapsed"])))
        lists = tables.read(schemas.RECOMMENDATIONS).select(
            "user_id", first.alias("places"), F.least("k", F.lit(_PLACES)).alias("length"), hidden.alias("hidden")
        )
        lists = lists.where(F.col("hidden") > 0)
        self._lists = lists.count()
        order = (F.desc("hidden"), F.xxhash64("user_id"), F.col("user_id"))
        profiles = (
            tables.read(schemas.PROFILES)
            .where(F.col("embedding").isNotNull())
            .select("user_id", "representation", "embedding", "history")
        )
        few = lists.orderBy(*order).limit(_USERS).join(profiles, on="user_id", how="inner").orderBy(*order).collect()
        vectors = _vectors(tables, few, shape, encoder)
        scores = [item_scores(row["embedding"], row["history"], vectors, shape) for row in few]
        ranked = [ranking(row["places"], mine, row["length"]) for row, mine in zip(few, scores, strict=True)]
        self._few = [(row["user_id"], row["places"], ids) for row, ids in zip(few, ranked, strict=True) if ids]

    @property
    def items(self) -> Iterator[str]:
        for _, places, ranked in self._few:
            yield from (*(item for item, *_ in places), *ranked)

    def shown(self, album: Album) -> Variants:
        return Variants(self._lists, tuple(
            Collapsed(user, tuple(album.main(item) for item, *_ in places), tuple(map(album.main, ranked)),
                      {other: place for place, (*_, others) in enumerate(places, 1) for other in others})
            for user, places, ranked in self._few
        ))  # fmt: skip


def ranking(places: Sequence[Place], scores: Mapping[str, float], length: int) -> list[str]:
    """The first item ids, best first, of a list's items and all that they hide; ties by id, as in the list.

    Empty where `scores` lacks one of them or has another score than the list, where the list isn't in the order of its
    scores, and where nothing is gained by hiding.
    """
    listed = {item: score for item, score, _ in places}
    hidden = {other for _, _, others in places for other in others}
    if not listed.keys() | hidden <= scores.keys() or any(abs(scores[item] - listed[item]) > _SAME for item in listed):
        return []
    if list(listed) != sorted(listed, key=lambda item: (-listed[item], item)):
        return []
    every = {item: round(scores[item], SCORE_DIGITS) for item in hidden} | listed
    ranked = sorted(every, key=lambda item: (-every[item], item))[:length]
    return [] if listed.keys() <= set(ranked) else ranked


def item_scores(
    embedding: Sequence[float], history: Sequence[tuple[str, float]], vectors: Mapping[str, np.ndarray], shape: str
) -> dict[str, float]:
    """Of every item that has a vector its cosine with the profile, or with `max_similarity` its highest one with an
    item of the history, each weighing what it weighs beside the heaviest."""
    tastes = [np.array(embedding, np.float64)]
    if shape == "max_similarity":
        there = [(vectors[item], weight) for item, weight in history if item in vectors]
        heaviest = max((weight for _, weight in there), default=1.0)
        tastes = [vector * weight / heaviest for vector, weight in there]
    return {item: max((float(taste @ vector) for taste in tastes), default=0.0) for item, vector in vectors.items()}


def _vectors(tables: Tables, few: Sequence[Row], shape: str, encoder: str) -> dict[str, np.ndarray]:
    """Of what these users' places name and hide, and of their histories where the shape asks for them."""
    if not few:
        return {}
    wanted = {item for row in few for first, _, others in row["places"] for item in (first, *others)}
    if shape == "max_similarity":
        wanted |= {item for row in few for item, _ in row["history"]}
    rows = tables.read(schemas.EMBEDDINGS).where(F.col("item_id").isin(sorted(wanted)))
    # Profiles are all of one representation; an encoder that came after them may have vectors of another length.
    mine = (F.col("representation") == few[0]["representation"]) & (F.col("encoder_id") == encoder)
    alike = F.size("embedding") == len(few[0]["embedding"])
    found = rows.where(mine & alike).select("item_id", "embedding").collect()
    return {item: np.array(vector, np.float64) for item, vector in found}
