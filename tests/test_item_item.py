"""Co-occurrence: pairs counted by hand, the same bits on any partitioning, and lists that say which part spoke."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from vlm4rec_spark.models.index.build import build_index, build_item_item
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import item_item, recommend
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

AT = datetime(2025, 1, 1)
HISTORIES = {"ann": "ABC", "ben": "BA", "cat": "ADX", "dan": "", "eve": "E"}
SCHEMA = "user_id STRING, history ARRAY<STRUCT<item_id: STRING, weight: DOUBLE>>"


def frame(spark: SparkSession, histories: dict[str, str]) -> DataFrame:
    rows = [(user, [(item, 1.0) for item in items]) for user, items in histories.items()]
    return spark.createDataFrame(rows, SCHEMA)


def counted(found: DataFrame) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for row in found.collect():
        table.setdefault(row["item_id"], {})[row["other_id"]] = row["strength"]
    return table


def test_pairs_by_hand(spark: SparkSession) -> None:
    plain = ItemItemSettings(distance_decay=0.5, popularity_power=0)
    assert counted(item_item.pairs(frame(spark, HISTORIES), plain)) == {
        "A": {"B": 2.0, "C": 0.5, "D": 1.0, "X": 0.5},
        "B": {"A": 2.0, "C": 1.0},
        "C": {"A": 0.5, "B": 1.0},
        "D": {"A": 1.0, "X": 1.0},
        "X": {"A": 0.5, "D": 1.0},
    }
    cosine = ItemItemSettings(distance_decay=1, popularity_power=0.5, max_neighbors=2)
    found = counted(item_item.pairs(frame(spark, HISTORIES), cosine))
    assert found["B"] == pytest.approx({"A": 2 / 6**0.5, "C": 1 / 2**0.5})
    assert found["A"] == pytest.approx(
        {"B": 2 / 6**0.5, "C": 1 / 3**0.5}
    )  # C, D and X are alike: the smaller id


def test_the_bits_do_not_depend_on_how_rows_lie(spark: SparkSession) -> None:
    rng = np.random.default_rng(3)
    histories = {
        f"u{n}": "".join(rng.permutation(list("ABCDEFGHIJ"))[: rng.integers(1, 9)])
        for n in range(80)
    }
    rows = frame(spark, histories)
    few, many = (counted(item_item.pairs(rows.repartition(n), ItemItemSettings())) for n in (1, 7))
    assert few == many
    assert len(few) == 10


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vectors = np.eye(6, dtype=np.float32)[[0, 1, 2, 3, 4, 4]]
    table = pa.table(
        {
            "item_id": list("ABCDEF"),
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
            "content_sha256": ["-"] * 6,
            "text": [""] * 6,
        }
    )
    return build_index(table, "title", "test", tmp_path_factory.mktemp("index"), 10**6)


@pytest.fixture
def searcher(indexed: Path) -> Searcher:
    return Searcher.open(indexed)


def test_a_folder_is_named_by_its_content_and_an_old_one_goes(
    spark: SparkSession, searcher: Searcher, tmp_path: Path
) -> None:
    rows = item_item.pairs(frame(spark, HISTORIES), ItemItemSettings())
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    os.utime(tmp_path / "old", (time.time() - 90_000,) * 2)
    folder = build_item_item(rows.toArrow(), searcher, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", folder.name}
    os.utime(folder, (time.time() - 90_000,) * 2)
    assert build_item_item(rows.repartition(5).toArrow(), searcher, tmp_path) == folder
    assert time.time() - folder.stat().st_mtime < 80_000  # it is in use again
    (folder / "strengths.npy").write_bytes(b"damage")
    assert build_item_item(rows.toArrow(), searcher, tmp_path) == folder
    found = ItemItemScores.open(folder)
    near = [[searcher.ids[item] for item in row if item >= 0] for row in found.positions]
    assert near == [["B", "D", "C"], ["A", "C"], ["B", "A"], ["A"], [], []]  # X isn't in the index


def test_nothing_found_together_is_a_sound_folder(
    spark: SparkSession, searcher: Searcher, tmp_path: Path
) -> None:
    rows = item_item.pairs(frame(spark, {"eve": "E"}), ItemItemSettings())
    found = ItemItemScores.open(build_item_item(rows.toArrow(), searcher, tmp_path))
    assert (found.positions == -1).all()
    assert found.scores_for(np.array([0, 4]), np.ones(2))[0].tolist() == []


def test_lists_say_which_part_spoke(
    spark: SparkSession, indexed: Path, searcher: Searcher, tmp_path: Path
) -> None:
    """ann has B, found with A; eve has E, found with nothing, and like F."""
    rows = [
        (
            user,
            "title",
            [(item, 1.0)],
            [item],
            searcher.vectors["ABCDEF".index(item)].tolist(),
            1,
            AT,
        )
        for user, item in (("ann", "B"), ("eve", "E"))
    ]
    profiles = spark.createDataFrame(rows, schemas.PROFILES.schema)
    pairs = item_item.pairs(frame(spark, HISTORIES), ItemItemSettings())
    folder = build_item_item(pairs.toArrow(), searcher, tmp_path)
    opens = ship(spark, folder, 1.0, ItemItemScores.open)
    opener = ship(spark, indexed, 1.0, Searcher.open)
    blend = recommend.Matching("mean", 0.4, 1.0, opens)
    rows = recommend.recommend(
        profiles, opener, recommend.without(opener(), []), 2, None, blend
    ).collect()
    found = {row["user_id"]: row["items"][0].asDict() for row in rows}
    names = ("item_id", "score", "source", "because_item_id")
    told = {user: tuple(item[name] for name in names) for user, item in found.items()}
    assert told == {"ann": ("A", 0.4, "cooccurrence", "B"), "eve": ("F", 0.6, "content", "E")}
