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
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.evaluation import (
    als,
    arms,
    evaluate,
    guards,
    metrics,
    point_in_time,
    splits,
    tune,
)
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.slices import slices
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.stages.profiles import ProfileSettings
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

CUT = "2025-05-01"
PAIRS = 30
IN_USE = ServingConfig("title", ProfileSettings(), ItemItemSettings())


def log(spark: SparkSession, events: list[tuple[str, str, str]]) -> DataFrame:
    rows = [
        (
            f"e{n:04d}",
            user,
            item,
            "view",
            datetime.fromisoformat(at),
            datetime.fromisoformat(at).date(),
        )
        for n, (user, item, at) in enumerate(events)
    ]
    return spark.createDataFrame(rows, schemas.INTERACTIONS.schema)


def pairs(events: DataFrame) -> set[tuple[str, str]]:
    return {(row["user_id"], row["item_id"]) for row in events.collect()}


EVENTS = [
    ("ann", "A", "2025-04-29"),
    ("ann", "A", "2025-05-02"),
    ("ann", "B", "2025-04-30 23:59:59"),
    ("ann", "C", "2025-05-01 00:00:00"),
    ("ann", "D", "2025-05-03"),
    ("ben", "A", "2025-05-01 00:00:01"),
    ("cat", "C", "2025-04-01"),
]


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


def test_the_metrics_are_those_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """ranx (Bassani 2022) on random lists, some shorter than k, some with nothing relevant on them."""
    monkeypatch.setenv(
        "NUMBA_DISABLE_JIT", "1"
    )  # compiling takes longer than all that is computed here
    import ranx

    rng, users, items = np.random.default_rng(14), 300, 60
    top = np.stack([rng.permutation(items)[:20] for _ in range(users)])
    top[np.arange(20) >= rng.integers(1, 30, users)[:, None]] = -1
    wanted = [np.sort(rng.choice(items, rng.integers(1, 15), replace=False)) for _ in range(users)]
    relevant = np.concatenate([user * items + row for user, row in enumerate(wanted)])
    found, sizes = metrics.hits(top, relevant, items), np.array([len(row) for row in wanted])
    truth = ranx.Qrels(
        {f"u{user}": {f"i{item}": 1 for item in row} for user, row in enumerate(wanted)}
    )
    lists = ranx.Run(
        {
            f"u{user}": {f"i{item}": 1 - rank / 100 for rank, item in enumerate(row) if item >= 0}
            for user, row in enumerate(top)
        }
    )
    for k in (1, 5, 10, 20):
        ours = metrics.per_user(found, sizes, k)
        for name in metrics.ACCURACY:
            ranx.evaluate(truth, lists, f"{name}@{k}")
            theirs = [lists.scores[f"{name}@{k}"][f"u{user}"] for user in range(users)]
            np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-9, err_msg=f"{name}@{k}")


def test_the_random_arm_is_seeded_and_leaves_seen_items_out(spark: SparkSession) -> None:
    histories = spark.createDataFrame(
        [(f"u{n}", ["A"]) for n in range(20)], "user_id STRING, seen ARRAY<STRING>"
    )
    ids, none = pd.Index(list("ABCDEF"), dtype=object), np.zeros(6, np.float32)
    drawn = [
        {
            row["user_id"]: row["items"]
            for row in point_in_time.scored_lists(histories, ids, none, 5, seed).collect()
        }
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {tuple(sorted(items)) for items in drawn[0].values()} == {tuple("BCDEF")}
    assert len({tuple(items) for items in drawn[0].values()}) > 10


def world(spark: SparkSession, shift: int = 0) -> evaluate.EvaluationTables:
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
    items = spark.createDataFrame(
        [(name, True) for name in [*names, *bare]], "item_id STRING, available BOOLEAN"
    )
    return evaluate.EvaluationTables(
        log(spark, events), items, spark.createDataFrame(rows, schemas.EMBEDDINGS.schema)
    )


def test_what_is_found_together_is_an_arm_and_a_share_of_the_blend(spark: SparkSession) -> None:
    """Who has H has R of the next number, which looks like something else; u00 to u04 are to be told by the others."""
    events = [(f"u{n:02d}", f"H{n % 5:02d}", "2025-01-01") for n in range(40)]
    events += [
        (f"u{n:02d}", f"R{n % 5 + 1:02d}", "2025-01-02" if n >= 5 else "2025-05-02")
        for n in range(40)
    ]
    tables = world(spark)
    tables = evaluate.EvaluationTables(log(spark, events), tables.items, tables.embeddings)
    most = replace(IN_USE, item_item=ItemItemSettings(share=0.6))
    lists = evaluate_lists(spark, tables, ("cooccurrence", "blend", "title"), most)
    expected = {f"u{n:02d}": [f"R{n % 5 + 1:02d}"] for n in range(5)}
    assert lists["cooccurrence"] == lists["blend"] == expected
    alike = {f"u{n:02d}": [f"R{n:02d}"] for n in range(5)}
    assert lists["title"] == alike
    # Of its own the blend has a share of .4, and likeness of 1 is more than that.
    assert evaluate_lists(spark, tables, ("blend",))["blend"] == alike


def evaluate_lists(
    spark: SparkSession,
    tables: evaluate.EvaluationTables,
    names: tuple[str, ...],
    in_use: ServingConfig = IN_USE,
    **settings: object,
) -> dict[str, dict]:
    """The lists of each arm, as they are judged."""
    found, lists = {}, point_in_time.PointInTime.lists

    def caught(world: point_in_time.PointInTime, arm: Arm, k: int) -> np.ndarray:
        top = lists(world, arm, k)
        found[arm.name] = {
            user: [world.items[item] for item in row if item >= 0]
            for user, row in zip(world.users["user_id"], top, strict=True)
        }
        return top

    point_in_time.PointInTime.lists = caught  # type: ignore[method-assign]
    try:
        given = {"k": 1, "also_k": (), **settings}
        chosen = EvaluateSettings(arms=names, control=names[0], splits=("time",), cut=CUT, **given)  # type: ignore[arg-type]
        evaluate.evaluate(spark, tables, chosen, in_use, lambda line: None)
    finally:
        point_in_time.PointInTime.lists = lists  # type: ignore[method-assign]
    return found


def run(
    spark: SparkSession, tables: evaluate.EvaluationTables, **settings: object
) -> tuple[list[dict], dict[str, str]]:
    chosen = EvaluateSettings(arms=("random", "popularity", "title"), cut=CUT, k=1, **settings)  # type: ignore[arg-type]
    return evaluate.evaluate(spark, tables, chosen, IN_USE, lambda line: None)


@pytest.fixture(scope="module")
def judged(spark: SparkSession) -> tuple[list[dict], dict[str, str]]:
    return run(spark, world(spark))


def value(
    rows: list[dict], arm: str, split: str = "time", metric: str = "recall", slice_: str = "all"
) -> dict:
    wanted = (arm, split, metric, slice_, 1)
    (row,) = (r for r in rows if (r["arm"], r["split"], r["metric"], r["slice"], r["k"]) == wanted)
    return row


def test_oracle_like_vectors_find_all_but_the_user_without_a_list(
    judged: tuple[list[dict], dict[str, str]],
) -> None:
    rows, details = judged
    for split in ("time", "leave_one_out"):
        for metric in metrics.ACCURACY:
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
    assert (time["cut"], time["users"], time["candidates"], time["left_out_share"]) == (
        CUT,
        31,
        60,
        0.0769,
    )


def test_a_slice_under_thirty_users_gives_no_number(
    judged: tuple[list[dict], dict[str, str]],
) -> None:
    for slice_, users in (("history 1-4", 26), ("history 5-19", 5), ("history 20+", 0)):
        row = value(judged[0], "title", slice_=slice_)
        assert (row["users"], row["value"], row["low"], row["high"]) == (users, None, None, None)


def test_segments_are_slices_the_largest_first() -> None:
    segments = ["b"] * 3 + ["a"] * 3 + ["c"] * 4 + [None] + [f"{n:02d}" for n in range(9)]
    users = pd.DataFrame({"seen": [[]] * len(segments), "segment": segments})
    found = {
        s.name: int(s.users.sum())
        for s in slices(users, None, np.ones(1, int), pd.DataFrame({"category": ["x"]}))
        if s.name.startswith("segment")
    }
    largest = {"segment c": 4, "segment a": 3, "segment b": 3}
    assert list(found.items()) == [*largest.items(), *((f"segment {n:02d}", 1) for n in range(5))]


def test_an_arm_in_another_shape_finds_what_a_mean_blurs(spark: SparkSession) -> None:
    """Thirty users like two things that look nothing alike; what they take next looks like one of them."""
    side, tilt = np.eye(PAIRS * 2), 0.6
    names, vectors, events = [], [], []
    for n in range(PAIRS):
        one, other = side[2 * n], side[2 * n + 1]
        between = (one + other) / np.sqrt(2)
        # Nearer to the mean of both than R is, and further from each of them.
        looks = {
            "H": one,
            "J": other,
            "R": tilt * side[2 * n - 1] + np.sqrt(1 - tilt**2) * one,
            "M": between,
        }
        names += [f"{letter}{n:02d}" for letter in looks]
        vectors += looks.values()
        events += [(f"u{n:02d}", f"{letter}{n:02d}", "2025-01-01") for letter in "HJ"]
        events += [(f"u{n:02d}", f"R{n:02d}", "2025-05-01")]
    rows = [
        (name, "title", "test", "-", False, vector.tolist())
        for name, vector in zip(names, vectors, strict=True)
    ]
    items = spark.createDataFrame(
        [(name, True) for name in names], "item_id STRING, available BOOLEAN"
    )
    tables = evaluate.EvaluationTables(
        log(spark, events), items, spark.createDataFrame(rows, schemas.EMBEDDINGS.schema)
    )
    chosen = EvaluateSettings(
        arms=("title", "title/max_similarity"), cut=CUT, k=1, splits=("time",), control="title"
    )
    found, _ = evaluate.evaluate(spark, tables, chosen, IN_USE, lambda line: None)
    assert value(found, "title")["value"] == 0
    assert value(found, "title/max_similarity")["value"] == 1


def test_a_shape_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        ValidationError,
        match=r"title/sum: after the slash stands a profile shape, mean or plain_mean",
    ):
        EvaluateSettings(arms=("title", "title/sum"))


def test_two_evaluations_are_equal(
    spark: SparkSession, judged: tuple[list[dict], dict[str, str]]
) -> None:
    again, _ = run(spark, world(spark), splits=("time",))
    assert again == [row for row in judged[0] if row["split"] == "time"]


def test_other_vectors_under_the_same_name_are_seen(spark: SparkSession, judged: tuple) -> None:
    """Workers keep what they unpacked: it must be known by its content."""
    rows, _ = run(spark, world(spark, shift=1), splits=("time",))
    assert value(rows, "title")["value"] == 0


def test_exchanged_labels_fall_to_chance(judged: tuple[list[dict], dict[str, str]]) -> None:
    rows, details = judged
    for arm in ("random", "popularity", "title"):
        assert (
            value(rows, arm, metric="recall_shuffled")["value"] < 0.15
        )  # one of 60 by chance, of 31 users
    assert json.loads(details["time"])["above_chance"] == []
    exchanged = guards.shuffled(np.arange(0, 600, 7), 60, seed=1)
    assert len(np.unique(exchanged)) == len(exchanged)
    assert np.bincount(exchanged // 60).tolist() == np.bincount(np.arange(0, 600, 7) // 60).tolist()
    assert guards.above_chance(np.array([1.0, 0.0] * 50), 1, 60)
    assert not guards.above_chance(np.array([1.0] + [0.0] * 59), 1, 60)


def test_a_planted_leak_ends_the_evaluation(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profiles made of the whole log: the commonest mistake there is."""
    tables, made = world(spark), point_in_time.profiles.histories
    monkeypatch.setattr(
        point_in_time.profiles, "histories", lambda known, *rest: made(tables.interactions, *rest)
    )
    with pytest.raises(
        RunError, match=r"a leak: 31 of 31 histories of the split time hold what is to be guessed"
    ):
        run(spark, tables, splits=("time",))


def test_events_after_the_cut_are_a_leak_and_seen_items_no_recommendation() -> None:
    users = pd.DataFrame(
        {"relevant": [["b"]], "seen": [["a"]], "last_event_at": [datetime(2025, 5, 1)]}
    )
    with pytest.raises(
        RunError, match=r"a leak: 1 of 1 histories of the split time hold events from 2025-05-01 on"
    ):
        guards.no_leak("time", CUT, users)
    guards.no_leak("leave_one_out", None, users)
    with pytest.raises(
        RunError, match=r"the arm title recommends 1 items that their users have seen already"
    ):
        guards.nothing_seen("title", np.array([[3, 1], [2, -1]]), np.array([1, 8]), 5)
    guards.nothing_seen("title", np.array([[3, 0], [2, -1]]), np.array([1, 8]), 5)


def test_identical_vectors_raise_an_alarm(spark: SparkSession) -> None:
    """Texts that lost what told them apart: the paper's own bug."""
    tables, heard = world(spark), []
    same = tables.embeddings.withColumn("embedding", F.array_repeat(F.lit(1.0).cast("float"), 1))
    chosen = EvaluateSettings(
        arms=("random", "title"), control="random", splits=("time",), cut=CUT, k=1
    )
    _, details = evaluate.evaluate(
        spark, replace(tables, embeddings=same), chosen, IN_USE, heard.append
    )
    assert json.loads(details["time"])["identical_vectors"] == {"title": 60}
    assert any(
        "60 of 60 candidates share their title vector with another" in line for line in heard
    )


def test_replay_cuts_one_after_another(spark: SparkSession) -> None:
    events = [("ann", f"I{day}", f"2025-01-{day:02d} 12:00:00") for day in range(1, 11)]
    settings = EvaluateSettings(splits=("replay",), cut="2025-01-05", replay_cuts=2)
    first, second = splits.of(log(spark, events), settings)
    assert (first.name, first.cut, second.name) == ("replay 1", "2025-01-05 00:00:00", "replay 2")
    assert (
        second.cut == "2025-01-07 18:00:00"
    )  # half of what is left until the last event, at a whole minute
    names = [
        {item for _, item in pairs(each)}
        for each in (first.train, first.test, second.train, second.test)
    ]
    assert names == [
        {"I1", "I2", "I3", "I4"},
        {"I5", "I6", "I7"},
        {f"I{n}" for n in range(1, 8)},
        {"I8", "I9", "I10"},
    ]


def test_validation_looks_at_nothing_of_the_test_part(spark: SparkSession) -> None:
    events = [("ann", f"I{day}", f"2025-01-{day:02d} 12:00:00") for day in range(1, 11)]
    settings = EvaluateSettings(splits=("time", "leave_one_out"))
    by_time, one_out = (
        splits.validation(each, 0.2) for each in splits.of(log(spark, events), settings)
    )
    assert (by_time.cut, {item for _, item in pairs(by_time.test)}) == (
        "2025-01-07 00:00:00",
        {"I7", "I8"},
    )
    assert {item for _, item in pairs(one_out.test)} == {"I9"}
    assert "I10" not in {item for _, item in pairs(one_out.train)}


def vectors(name: str, ids: list[str], rows: np.ndarray) -> list[tuple]:
    return [
        (item, name, "test", "-", False, row.tolist()) for item, row in zip(ids, rows, strict=True)
    ]


def test_a_fusion_knows_what_either_knows(spark: SparkSession) -> None:
    """Even users' next item looks like their last, odd users' is called like it."""
    tables, even = world(spark), np.arange(2 * PAIRS) % 2 == 0
    ids = [f"{letter}{n:02d}" for letter in "HR" for n in range(PAIRS)]
    alike = np.eye(PAIRS)[[*range(PAIRS), *range(PAIRS)]]
    shifted = np.eye(PAIRS)[[*range(PAIRS), *np.roll(np.arange(PAIRS), 4)]]
    rows = vectors("image", ids, np.where(even[:, None], alike, shifted))
    rows += vectors("title", ids, np.where(even[:, None], shifted, alike))
    both = replace(tables, embeddings=spark.createDataFrame(rows, schemas.EMBEDDINGS.schema))
    names = ("title", "image", "fusion_average", "fusion_concat")
    found = evaluate_lists(spark, both, names, k=2)
    right = {
        name: np.mean([f"R{n:02d}" in found[name][f"u{n:02d}"] for n in range(PAIRS)])
        for name in names
    }
    assert right == {"title": 0.5, "image": 0.5, "fusion_average": 1, "fusion_concat": 1}
    short = [(*row[:5], row[5] if row[1] == "title" else [1.0]) for row in rows]
    other = replace(tables, embeddings=spark.createDataFrame(short, schemas.EMBEDDINGS.schema))
    with pytest.raises(
        UsageError,
        match="fusion_average needs vectors of one length; those of the texts have 30, tho",
    ):
        evaluate_lists(spark, other, ("fusion_average",))


def test_an_arm_of_ones_own_is_the_lists_in_use_with_something_else(spark: SparkSession) -> None:
    with pytest.raises(ValidationError, match="position_decay"):
        EvaluateSettings(custom_arms={"wrong": {"profiles": {"position_decay": 2}}})
    own = {"mine": {"profiles": {"shape": "max_similarity"}, "cooccurrence": {"share": 0.0}}}
    settings = EvaluateSettings(arms=("mine",), custom_arms=own)
    mine, ours = (
        arms.resolve(name, settings.custom_arms, IN_USE)
        for name in ("mine", "title/max_similarity")
    )
    assert mine.by == ours.by
    plain = arms.resolve("title/plain_mean", {}, IN_USE).by.profiles
    assert (set(plain.event_weights.values()), plain.half_life_days, plain.position_decay) == (
        {1.0},
        None,
        1.0,
    )


def test_als_learns_who_takes_what_together(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two circles of twenty users, each with eight items of which everybody has had six."""
    rng, events = np.random.default_rng(0), []
    for user in range(40):
        own = [f"{'HR'[user % 2]}{n:02d}" for n in rng.permutation(8)[:7]]
        events += [
            (f"u{user:02d}", item, f"2025-01-{day + 1:02d}") for day, item in enumerate(own[:6])
        ]
        events.append((f"u{user:02d}", own[6], "2025-05-01"))
    tables = replace(world(spark), interactions=log(spark, events))
    monkeypatch.setattr(als, "GRID", als.GRID[:1])
    found = evaluate_lists(spark, tables, ("random", "als"), k=2)
    kind = [
        item[0] == "HR"[int(user[1:]) % 2] for user, items in found["als"].items() for item in items
    ]
    assert (len(kind), np.mean(kind)) == (80, 1.0)
    assert found["als"] == evaluate_lists(spark, tables, ("als",), k=2)["als"]


def test_popularity_may_look_at_the_last_days_only(spark: SparkSession) -> None:
    events = [(f"u{n:02d}", "H00", "2025-01-01") for n in range(30)]
    events += [(f"u{n:02d}", "H01", "2025-04-20") for n in range(30, 35)]
    events += [("u40", "H02", "2025-04-29"), ("u40", "R00", "2025-05-02")]
    tables = replace(world(spark), interactions=log(spark, events))
    assert evaluate_lists(spark, tables, ("popularity",))["popularity"] == {"u40": ["H00"]}
    assert evaluate_lists(spark, tables, ("popularity",), popularity_days=30)["popularity"] == {
        "u40": ["H01"]
    }


def test_tune_finds_what_was_planted_without_the_test_part(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has H has R of the next number; the last event, which is for the test, says otherwise."""
    events = [(f"u{n:02d}", f"H{n % 5:02d}", "2025-01-01") for n in range(60)]
    events += [
        (f"u{n:02d}", f"R{n % 5 + 1:02d}", "2025-02-02" if n % 3 else "2025-01-02")
        for n in range(60)
    ]
    events += [(f"u{n:02d}", f"R{n % 5 + 10:02d}", "2025-05-02") for n in range(60)]
    tables = replace(world(spark), interactions=log(spark, events))
    for name in ("_DECAYS", "_HALF_LIVES", "_LAST", "_SPOKEN", "_POWERS", "_APART"):
        monkeypatch.setattr(tune, name, ())
    monkeypatch.setattr(tune, "_SHARES", (0.2, 0.7))
    chosen, heard = EvaluateSettings(splits=("time",), cut=CUT, test_share=0.3, k=1, also_k=()), []
    found = tune.tune(spark, tables, chosen, IN_USE, ["title"], "ndcg", heard.append)
    assert (found.cut, found.users) == ("2025-02-02 00:00:00", 40)
    assert (found.best.in_use.item_item.share, found.best.recall) == (0.7, 1.0)
    assert (found.best_content.in_use.item_item.share, found.best_content.recall) == (0.0, 0.0)
    assert len(heard) == len(found.trials) == 3 + 1 + 2 + 4
    again = tune.tune(spark, tables, chosen, IN_USE, ["title"], "ndcg", heard.append)
    same = [[replace(trial, seconds=0) for trial in each.trials] for each in (found, again)]
    assert same[0] == same[1]
