"""The matrix factorization that content is compared with: Spark's ALS on implicit feedback.

Knows events and their weights. Knows neither content nor metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

if TYPE_CHECKING:
    from pyspark.ml.recommendation import ALS

_ITERATIONS = 10


class AlsSetting(NamedTuple):
    """alpha: the confidence of Hu, Koren and Volinsky (2008)."""

    rank: int
    regularization: float
    alpha: float


GRID = (
    AlsSetting(32, 0.05, 10.0),
    AlsSetting(64, 0.05, 10.0),
    AlsSetting(64, 0.05, 40.0),
    AlsSetting(64, 0.5, 10.0),
)
"""The settings that are tried."""


@dataclass(frozen=True)
class Ratings:
    """Events as ALS takes them. rows: user and item (numbers of ids), weight. user_ids, item_ids:
    the ids in the order of their numbers."""

    rows: DataFrame
    user_ids: pd.Index
    item_ids: pd.Index


@dataclass(frozen=True)
class Factors:
    """users: float32 (user_ids, rank). items: float32 (candidates, rank), zeros if an item has no
    event."""

    user_ids: pd.Index
    users: np.ndarray
    items: np.ndarray


@contextmanager
def ratings(events: DataFrame, weights: dict[str, float]) -> Iterator[Ratings]:
    """The weighted events, for several fits."""
    from pyspark.ml.feature import StringIndexer

    summed = _sum_weights(events, weights)
    # In the order of the ids: the same log gets the same numbers, and ALS the same start.
    indexer = StringIndexer(
        inputCols=["user_id", "item_id"], outputCols=["user", "item"], stringOrderType="alphabetAsc"
    ).fit(summed)
    numbered = indexer.transform(summed).select(
        F.col("user").cast("int"), F.col("item").cast("int"), F.col("weight").cast("float")
    )
    rows = numbered.orderBy("user", "item").persist()
    user_ids, item_ids = indexer.labelsArray
    yield Ratings(rows, pd.Index(list(user_ids)), pd.Index(list(item_ids)))
    rows.unpersist()


def fit(
    ratings: Ratings,
    setting: AlsSetting,
    seed: int,
    user_ids: pd.Series,
    item_ids: pd.Index,
) -> Factors:
    """Factors of these users, without those who have no rating, and of these items."""
    spark = ratings.rows.sparkSession
    model = _estimator(setting, seed, spark).fit(ratings.rows)
    numbers = ratings.user_ids.get_indexer(pd.Index(user_ids))
    numbers = np.sort(numbers[numbers >= 0])
    rated = spark.createDataFrame(pd.DataFrame({"id": numbers}))
    rated_ids = ratings.user_ids[numbers]
    user_factors = model.userFactors.join(F.broadcast(rated), on="id", how="left_semi")
    return Factors(
        rated_ids,
        _vectors(user_factors, ratings.user_ids, rated_ids, setting.rank),
        _vectors(model.itemFactors, ratings.item_ids, item_ids, setting.rank),
    )


def _estimator(
    setting: AlsSetting,
    seed: int,
    spark: SparkSession,
) -> ALS:
    from pyspark.ml.recommendation import ALS

    blocks = max(2, min(10, spark.sparkContext.defaultParallelism))
    return ALS(
        rank=setting.rank,
        maxIter=_ITERATIONS,
        regParam=setting.regularization,
        alpha=setting.alpha,
        implicitPrefs=True,
        seed=seed,
        numUserBlocks=blocks,
        numItemBlocks=blocks,
        userCol="user",
        itemCol="item",
        ratingCol="weight",
    )


def _sum_weights(events: DataFrame, weights: dict[str, float]) -> DataFrame:
    """user_id, item_id, weight: the summed weights of the events that have one."""
    by_type = F.create_map(*[F.lit(part) for pair in weights.items() for part in pair])
    weighted = events.withColumn("weight", by_type[F.col("event_type")])
    counted = weighted.where(F.col("weight").isNotNull())
    return counted.groupBy("user_id", "item_id").agg(F.sum("weight").alias("weight"))


def _vectors(
    factors: DataFrame,
    fitted_ids: pd.Index,
    ids: pd.Index,
    rank: int,
) -> np.ndarray:
    """The factors of `ids`, float32 (ids, rank). fitted_ids: the ids by number."""
    rows = cast(pd.DataFrame, factors.toPandas())
    positions = ids.get_indexer(fitted_ids[rows["id"].to_numpy()])
    wanted = positions >= 0
    vectors = np.zeros((len(ids), rank), np.float32)
    features = np.array(rows["features"].tolist(), np.float32).reshape(-1, rank)
    vectors[positions[wanted]] = features[wanted]
    return vectors
