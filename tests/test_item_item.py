"""Item-item scores: pairs counted by hand, the same bits on any partitioning, lists with them."""

import os
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from shop import build_exact

from vlm4rec_spark.models.index.build import build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import item_item, recommend
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.storage.schemas import PROFILES

AT = datetime(2025, 1, 1)
HISTORIES = {"ann": "ABC", "ben": "BA", "cat": "ADX", "dan": "", "eve": "E"}
SCHEMA = "user_id STRING, history ARRAY<STRUCT<item_id: STRING, weight: DOUBLE>>"


def frame(spark: SparkSession, histories: dict[str, str]) -> DataFrame:
    rows = [(user, [(item, 1.0) for item in items]) for user, items in histories.items()]
    return spark.createDataFrame(rows, SCHEMA)


def strengths(pairs: DataFrame) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for row in pairs.collect():
        table.setdefault(row["item_id"], {})[row["other_id"]] = row["strength"]
    return table


def test_pairs_by_hand(spark: SparkSession):
    plain_count = ItemItemSettings(distance_decay=0.5, popularity_power=0)
    assert strengths(item_item.pairs(frame(spark, HISTORIES), plain_count)) == {
        "A": {"B": 2.0, "C": 0.5, "D": 1.0, "X": 0.5},
        "B": {"A": 2.0, "C": 1.0},
        "C": {"A": 0.5, "B": 1.0},
        "D": {"A": 1.0, "X": 1.0},
        "X": {"A": 0.5, "D": 1.0},
    }
    cosine = ItemItemSettings(distance_decay=1, popularity_power=0.5, max_neighbors=2)
    by_cosine = strengths(item_item.pairs(frame(spark, HISTORIES), cosine))
    assert by_cosine["B"] == pytest.approx({"A": 2 / 6**0.5, "C": 1 / 2**0.5})
    # C, D and X have equal strengths: the smallest id wins.
    assert by_cosine["A"] == pytest.approx({"B": 2 / 6**0.5, "C": 1 / 3**0.5})


def test_partitioning_does_not_change_a_bit(spark: SparkSession):
    rng = np.random.default_rng(3)
    histories = {
        f"u{user}": "".join(rng.permutation(list("ABCDEFGHIJ"))[: rng.integers(1, 9)])
        for user in range(80)
    }
    rows = frame(spark, histories)
    expected = strengths(item_item.pairs(rows.repartition(1), ItemItemSettings()))
    assert strengths(item_item.pairs(rows.repartition(7), ItemItemSettings())) == expected
    assert len(expected) == 10


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory) -> Path:
    vectors = np.eye(6, dtype=np.float32)[[0, 1, 2, 3, 4, 4]]
    folder = tmp_path_factory.mktemp("index") / "test_item_item"
    return build_exact(folder, "ABCDEF", vectors)


@pytest.fixture
def searcher(index_folder: Path) -> Searcher:
    return Searcher.open(index_folder)


def test_a_folder_is_named_by_its_content_and_unused_ones_are_deleted(
    spark: SparkSession, searcher: Searcher, tmp_path
):
    rows = item_item.pairs(frame(spark, HISTORIES), ItemItemSettings())
    a_day_ago = time.time() - 90_000
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "old", (a_day_ago, a_day_ago))
    folder = build_item_item(rows.toArrow(), searcher, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", folder.name}
    os.utime(folder, (a_day_ago, a_day_ago))
    assert build_item_item(rows.repartition(5).toArrow(), searcher, tmp_path) == folder
    assert folder.stat().st_mtime > a_day_ago + 10_000  # it counts as used
    (folder / "strengths.npy").write_bytes(b"damage")
    assert build_item_item(rows.toArrow(), searcher, tmp_path) == folder
    scores = ItemItemScores.open(folder)
    neighbors = [[searcher.ids[item] for item in row if item >= 0] for row in scores.positions]
    # X isn't in the index.
    assert neighbors == [["B", "D", "C"], ["A", "C"], ["B", "A"], ["A"], [], []]


def test_histories_without_pairs_give_a_sound_folder(
    spark: SparkSession, searcher: Searcher, tmp_path
):
    rows = item_item.pairs(frame(spark, {"eve": "E"}), ItemItemSettings())
    scores = ItemItemScores.open(build_item_item(rows.toArrow(), searcher, tmp_path))
    assert (scores.positions == -1).all()
    assert scores.scores_for(np.array([0, 4]), np.ones(2))[0].tolist() == []


def test_lists_name_the_source_of_a_score(
    spark: SparkSession, index_folder: Path, searcher: Searcher, tmp_path
):
    """ann has B, which occurs with A. eve has E, which occurs with nothing and is similar to F."""
    rows = []
    for user, item in (("ann", "B"), ("eve", "E")):
        vector = searcher.vectors["ABCDEF".index(item)].tolist()
        rows.append((user, "title", [(item, 1.0)], [item], vector, 1, AT))
    profiles = spark.createDataFrame(rows, PROFILES.schema)
    pairs = item_item.pairs(frame(spark, HISTORIES), ItemItemSettings())
    folder = build_item_item(pairs.toArrow(), searcher, tmp_path)
    lists = recommend.recommend(
        profiles,
        ship(spark, index_folder, 1.0, Searcher.open),
        recommend.all_items_except(searcher, []),
        k=2,
        effort=None,
        scoring=recommend.ProfileScoring(
            share=0.4, open_item_item=ship(spark, folder, 1.0, ItemItemScores.open)
        ),
    )
    best = {row["user_id"]: row["items"][0].asDict() for row in lists.collect()}
    columns = ("item_id", "score", "source", "because_item_id")
    assert {user: tuple(item[column] for column in columns) for user, item in best.items()} == {
        "ann": ("A", 0.4, "cooccurrence", "B"),
        "eve": ("F", 0.6, "content", "E"),
    }
