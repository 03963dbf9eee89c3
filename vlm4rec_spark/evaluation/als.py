"""The matrix factorization that content is compared with: Spark's ALS on implicit feedback.

Knows events and their weights. Knows neither content nor metrics.
"""

from __future__ import annotations

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
class Factors:
    """users: user_id, factors. items: float32 (candidates, rank), zeros if an item has no event."""

    users: DataFrame
    items: np.ndarray


def fit(
    events: DataFrame,
    weights: dict[str, float],
    item_ids: pd.Index,
    setting: AlsSetting,
    seed: int,
) -> Factors:
    """Factors of the users and items of the weighted events. item_ids: the candidates, sorted."""
    from pyspark.ml.feature import StringIndexer

    ratings = _ratings(events, weights)
    # In the order of the ids: the same log gets the same numbers, and ALS the same start.
    indexer = StringIndexer(
        inputCols=["user_id", "item_id"], outputCols=["user", "item"], stringOrderType="alphabetAsc"
    ).fit(ratings)
    rows = indexer.transform(ratings).select(
        F.col("user").cast("int"), F.col("item").cast("int"), F.col("weight").cast("float")
    )
    model = _estimator(setting, seed, events.sparkSession).fit(rows.orderBy("user", "item"))
    user_ids, fitted_ids = indexer.labelsArray
    users = events.sparkSession.createDataFrame(
        pd.DataFrame({"id": np.arange(len(user_ids)), "user_id": list(user_ids)})
    )
    factors = model.userFactors.withColumnRenamed("features", "factors").join(users, on="id")
    vectors = _item_vectors(model.itemFactors, list(fitted_ids), item_ids, setting.rank)
    return Factors(factors.select("user_id", "factors"), vectors)


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


def _ratings(events: DataFrame, weights: dict[str, float]) -> DataFrame:
    """user_id, item_id, weight: the summed weights of the events that have one."""
    by_type = F.create_map(*[F.lit(part) for pair in weights.items() for part in pair])
    weighted = events.withColumn("weight", by_type[F.col("event_type")])
    counted = weighted.where(F.col("weight").isNotNull())
    return counted.groupBy("user_id", "item_id").agg(F.sum("weight").alias("weight"))


def _item_vectors(
    factors: DataFrame,
    fitted_ids: list[str],
    item_ids: pd.Index,
    rank: int,
) -> np.ndarray:
    rows = cast(pd.DataFrame, factors.toPandas())
    fitted = np.asarray(fitted_ids, object)[rows["id"].to_numpy()]
    positions = item_ids.get_indexer(pd.Index(fitted))
    is_candidate = positions >= 0
    vectors = np.zeros((len(item_ids), rank), np.float32)
    vectors[positions[is_candidate]] = np.stack(rows["features"].tolist())[is_candidate]
    return vectors
