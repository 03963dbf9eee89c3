"""The matrix factorisation that content is compared with: Spark's ALS on implicit feedback, settled on validation.

Knows events and their weights; knows neither content nor metrics of lists beyond the recall that it is chosen by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

GRID = ((32, 0.05, 10.0), (64, 0.05, 10.0), (64, 0.05, 40.0), (64, 0.5, 10.0))
"""Rank, regularisation and confidence (alpha of Hu, Koren and Volinsky 2008) that are tried."""
_ITERATIONS = 10


@dataclass(frozen=True)
class Factors:
    """What ALS found. users: user_id, factors; items: (candidates, rank), zeros for an item without events."""

    users: DataFrame
    items: np.ndarray


def fit(
    events: DataFrame,
    weights: dict[str, float],
    items: pd.Index,
    setting: tuple[float, ...],
    seed: int,
) -> Factors:
    """Factors of the users and items of the events that count. items: the candidates' ids, sorted."""
    from pyspark.ml.feature import StringIndexer
    from pyspark.ml.recommendation import ALS

    rank, regularisation, alpha = setting
    weight = F.create_map(*[F.lit(part) for pair in weights.items() for part in pair])[
        F.col("event_type")
    ]
    counted = (
        events.withColumn("weight", weight)
        .where(F.col("weight").isNotNull())
        .groupBy("user_id", "item_id")
        .agg(F.sum("weight").alias("weight"))
    )
    # In the order of the ids, that the same log gets the same numbers, and ALS the same start.
    indexer = StringIndexer(
        inputCols=["user_id", "item_id"], outputCols=["user", "item"], stringOrderType="alphabetAsc"
    ).fit(counted)
    names = indexer.labelsArray
    rows = indexer.transform(counted).select(
        F.col("user").cast("int"), F.col("item").cast("int"), F.col("weight").cast("float")
    )
    blocks = max(2, min(10, events.sparkSession.sparkContext.defaultParallelism))
    model = ALS(
        rank=int(rank),
        maxIter=_ITERATIONS,
        regParam=regularisation,
        alpha=alpha,
        implicitPrefs=True,
        seed=seed,
        numUserBlocks=blocks,
        numItemBlocks=blocks,
        userCol="user",
        itemCol="item",
        ratingCol="weight",
    ).fit(rows.orderBy("user", "item"))
    of_items = cast(pd.DataFrame, model.itemFactors.toPandas())
    vectors = np.zeros((len(items), int(rank)), np.float32)
    place = items.get_indexer(pd.Index(np.asarray(names[1], object)[of_items["id"].to_numpy()]))
    there = place >= 0
    vectors[place[there]] = np.stack(of_items["features"].tolist())[there]
    spark = events.sparkSession
    users = spark.createDataFrame(
        pd.DataFrame({"id": np.arange(len(names[0])), "user_id": list(names[0])})
    )
    return Factors(
        model.userFactors.join(users, on="id").select(
            "user_id", F.col("features").alias("factors")
        ),
        vectors,
    )
