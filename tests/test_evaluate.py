"""Evaluate: the splits, and arms whose scores can be worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from vlm4rec_spark import schemas
from vlm4rec_spark.evaluation import arms, evaluate, metrics, splits
from vlm4rec_spark.evaluation.arms import EvaluateSettings, InUse
from vlm4rec_spark.stages.cooccurrence import CooccurrenceSettings
from vlm4rec_spark.stages.profiles import ProfileSettings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CUT = "2025-05-01"
PAIRS = 30
IN_USE = InUse("title", ProfileSettings(), CooccurrenceSettings())


def log(spark: SparkSession, events: list[tuple[str, str, str]]) -> DataFrame:
    rows = [
        (f"e{n:04d}", user, item, "view", datetime.fromisoformat(at), datetime.fromisoformat(at).date())
        for n, (user, item, at) in enumerate(events)
    ]
    return spark.createDataFrame(rows, schemas.INTERACTIONS.schema)


def pairs(events: DataFrame) -> set[tuple[str, str]]:
    return {(row["user_id"], row["item_id"]) for row in events.collect()}


EVENTS = [
    ("ann", "A", "2025-04-29"), ("ann", "A", "2025-05-02"), ("ann", "B", "2025-04-30 23:59:59"),
    ("ann", "C", "2025-05-01 00:00:00"), ("ann", "D", "2025-05-03"), ("ben", "A", "2025-05-01 00:00:01"),
    ("cat", "C", "2025-04-01"),
]  # fmt: skip


def test_time_split_hides_everything_from_the_cut_on(spark: SparkSession) -> None:
    known, hidden = splits.time_split(log(spark, EVENTS), CUT)
    assert pairs(known) == {("ann", "A"), ("ann", "B"), ("cat", "C")}
    assert pairs(hidden) == {("ann", "A"), ("ann", "C"), ("ann", "D"), ("ben", "A")}
    # A isn't new to ann, D is no candidate, ben had no history and cat has nothing to guess.
    candidates = spark.createDataFrame([(item,) for item in "ABC"], "item_id STRING")
    relevant = splits.relevant(known, hidden, candidates).collect()
    assert [(row["user_id"], row["relevant"]) for row in relevant] == [("ann", ["C"])]


def test_leave_one_out_hides_the_last_event(spark: SparkSession) -> None:
    known, hidden = splits.leave_one_out(log(spark, EVENTS))
    assert pairs(hidden) == {("ann", "D")}
    assert pairs(known) == {("ann", "A"), ("ann", "B"), ("ann", "C"), ("ben", "A"), ("cat", "C")}


def test_the_default_cut_leaves_the_share_of_events(spark: SparkSession) -> None:
    events = [("ann", "A", f"2025-01-{day:02d} 10:00:00") for day in range(1, 11)]
    assert splits.last_share(log(spark, events), 0.2) == "2025-01-09 00:00:00"


def test_the_cut_is_a_time() -> None:
    assert EvaluateSettings(cut=datetime(2025, 5, 1).date()).cut == CUT  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        EvaluateSettings(cut="last week")


def test_metrics_by_hand() -> None:
    found = metrics.hits([["A", "X", "B"], [], ["X", "A"]], [["A", "B", "C"], ["A"], ["A"]], k=2)
    values = metrics.per_user(found, np.array([3, 1, 1]))
    second = 1 / np.log2(3)
    np.testing.assert_allclose(values["recall"], [1 / 3, 0, 1])
    np.testing.assert_allclose(values["hit_rate"], [1, 0, 1])
    np.testing.assert_allclose(values["ndcg"], [1 / (1 + second), 0, second])


def test_the_random_arm_is_seeded_and_leaves_seen_items_out(spark: SparkSession) -> None:
    histories = spark.createDataFrame([(f"u{n}", ["A"]) for n in range(20)], "user_id STRING, seen ARRAY<STRING>")
    scores = pd.Series(0, index=list("ABCDEF"))
    drawn = [{row["user_id"]: row["items"] for row in arms.scored_lists(histories, scores, 5, seed).collect()}
             for seed in (1, 1, 2)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert {tuple(sorted(items)) for items in drawn[0].values()} == {tuple("BCDEF")}
    assert len({tuple(items) for items in drawn[0].values()}) > 10


def world(spark: SparkSession, shift: int = 0) -> evaluate.Tables:
    """Thirty users who looked at H and will look at R, which looks the same; with a `shift`, like another's H.

    A thirty-first has a history without a vector. Five users have seen four more items, also without one.
    """
    bare = [f"N{n}" for n in range(5)]
    names = [f"{letter}{n:02d}" for letter in "HR" for n in range(PAIRS)]
    # The first thirty names are H's, the others R's.
    directions = [*range(PAIRS), *((n + shift) % PAIRS for n in range(PAIRS))]
    rows = [
        (name, "title", "test", "-", False, np.eye(PAIRS)[direction].tolist())
        for name, direction in zip(names, directions, strict=True)
    ]
    events = [(f"u{n:02d}", f"H{n:02d}", "2025-01-01") for n in range(PAIRS)]
    events += [(f"u{n:02d}", f"R{n:02d}", "2025-05-01") for n in range(PAIRS)]
    events += [(f"u{n:02d}", item, "2025-01-02") for n in range(5) for item in bare[1:]]
    events += [("u30", "N0", "2025-01-01"), ("u30", "R00", "2025-05-02")]
    items = spark.createDataFrame([(name, True) for name in [*names, *bare]], "item_id STRING, available BOOLEAN")
    return evaluate.Tables(log(spark, events), items, spark.createDataFrame(rows, schemas.EMBEDDINGS.schema))


def test_what_is_found_together_is_an_arm_and_a_share_of_the_blend(spark: SparkSession) -> None:
    """Who has H has R of the next number, which looks like something else; u00 to u04 are to be told by the others."""
    events = [(f"u{n:02d}", f"H{n % 5:02d}", "2025-01-01") for n in range(40)]
    events += [(f"u{n:02d}", f"R{n % 5 + 1:02d}", "2025-01-02" if n >= 5 else "2025-05-02") for n in range(40)]
    tables = world(spark)
    tables = evaluate.Tables(log(spark, events), tables.items, tables.embeddings)
    most = replace(IN_USE, cooccurrence=CooccurrenceSettings(share=0.6))
    lists = evaluate_lists(spark, tables, ("cooccurrence", "blend", "title"), most)
    expected = {f"u{n:02d}": [f"R{n % 5 + 1:02d}"] for n in range(5)}
    assert lists["cooccurrence"] == lists["blend"] == expected
    alike = {f"u{n:02d}": [f"R{n:02d}"] for n in range(5)}
    assert lists["title"] == alike
    # Of its own the blend has a share of .4, and likeness of 1 is more than that.
    assert evaluate_lists(spark, tables, ("blend",))["blend"] == alike


def evaluate_lists(
    spark: SparkSession, tables: evaluate.Tables, names: tuple[str, ...], in_use: InUse = IN_USE
) -> dict[str, dict]:
    """The lists of each arm, as they are judged."""
    found, collected = {}, evaluate._collected

    def caught(judged: DataFrame, lists: DataFrame) -> pd.DataFrame:
        table = collected(judged, lists)
        found[names[len(found)]] = {row.user_id: row.items for row in table.itertuples()}
        return table

    evaluate._collected = caught
    try:
        chosen = EvaluateSettings(arms=names, control=names[0], splits=("time",), cut=CUT, k=1)
        evaluate.evaluate(spark, tables, chosen, in_use, lambda line: None)
    finally:
        evaluate._collected = collected
    return found


def run(spark: SparkSession, tables: evaluate.Tables, **settings: object) -> tuple[list[dict], dict[str, str]]:
    chosen = EvaluateSettings(arms=("random", "popularity", "title"), cut=CUT, k=1, **settings)  # type: ignore[arg-type]
    return evaluate.evaluate(spark, tables, chosen, IN_USE, lambda line: None)


@pytest.fixture(scope="module")
def judged(spark: SparkSession) -> tuple[list[dict], dict[str, str]]:
    return run(spark, world(spark))


def value(rows: list[dict], arm: str, split: str = "time", metric: str = "recall", slice_: str = "all") -> dict:
    (row,) = (r for r in rows if (r["arm"], r["split"], r["metric"], r["slice"]) == (arm, split, metric, slice_))
    return row


def test_oracle_like_vectors_find_all_but_the_user_without_a_list(judged: tuple[list[dict], dict[str, str]]) -> None:
    rows, details = judged
    for split in ("time", "leave_one_out"):
        for metric in metrics.METRICS:
            title = value(rows, "title", split, metric)
            assert (title["value"], title["users"]) == (pytest.approx(30 / 31), 31)
            assert title["low"] <= title["value"] <= title["high"]
        # H00, or H01 for the one who saw it: everybody's favourite and nobody's next.
        assert value(rows, "popularity", split)["value"] == 0
        assert value(rows, "random", split)["high"] < value(rows, "title", split)["low"]
        assert value(rows, "title", split)["control"] == "popularity"
        assert value(rows, "title", split)["p_value"] < 0.01
        assert value(rows, "popularity", split)["p_value"] is None
    time = json.loads(details["time"])
    assert (time["cut"], time["users"], time["candidates"], time["left_out_share"]) == (CUT, 31, 60, 0.0769)


def test_a_slice_under_thirty_users_gives_no_number(judged: tuple[list[dict], dict[str, str]]) -> None:
    for slice_, users in (("history 1-4", 26), ("history 5-19", 5), ("history 20+", 0)):
        row = value(judged[0], "title", slice_=slice_)
        assert (row["users"], row["value"], row["low"], row["high"]) == (users, None, None, None)


def test_an_arm_in_another_shape_finds_what_a_mean_blurs(spark: SparkSession) -> None:
    """Thirty users like two things that look nothing alike; what they take next looks like one of them."""
    side, tilt = np.eye(PAIRS * 2), 0.6
    names, vectors, events = [], [], []
    for n in range(PAIRS):
        one, other = side[2 * n], side[2 * n + 1]
        between = (one + other) / np.sqrt(2)
        # Nearer to the mean of both than R is, and further from each of them.
        looks = {"H": one, "J": other, "R": tilt * side[2 * n - 1] + np.sqrt(1 - tilt**2) * one, "M": between}
        names += [f"{letter}{n:02d}" for letter in looks]
        vectors += looks.values()
        events += [(f"u{n:02d}", f"{letter}{n:02d}", "2025-01-01") for letter in "HJ"]
        events += [(f"u{n:02d}", f"R{n:02d}", "2025-05-01")]
    rows = [(name, "title", "test", "-", False, vector.tolist()) for name, vector in zip(names, vectors, strict=True)]
    items = spark.createDataFrame([(name, True) for name in names], "item_id STRING, available BOOLEAN")
    tables = evaluate.Tables(log(spark, events), items, spark.createDataFrame(rows, schemas.EMBEDDINGS.schema))
    chosen = EvaluateSettings(arms=("title", "title/max_similarity"), cut=CUT, k=1, splits=("time",), control="title")
    found, _ = evaluate.evaluate(spark, tables, chosen, IN_USE, lambda line: None)
    assert value(found, "title")["value"] == 0
    assert value(found, "title/max_similarity")["value"] == 1


def test_a_shape_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"title/sum: after the slash stands a profile shape, mean or max_sim"):
        EvaluateSettings(arms=("title", "title/sum"))


def test_two_evaluations_are_equal(spark: SparkSession, judged: tuple[list[dict], dict[str, str]]) -> None:
    again, _ = run(spark, world(spark), splits=("time",))
    assert again == [row for row in judged[0] if row["split"] == "time"]


def test_other_vectors_under_the_same_name_are_seen(spark: SparkSession, judged: tuple) -> None:
    """Workers keep what they unpacked: it must be known by its content."""
    rows, _ = run(spark, world(spark, shift=1), splits=("time",))
    assert value(rows, "title")["value"] == 0
