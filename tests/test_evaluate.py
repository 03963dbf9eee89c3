"""Evaluate: the splits, and arms whose scores can be worked out by hand."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import date, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shop
from pydantic import ValidationError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.evaluation import (
    als,
    arms,
    evaluate,
    guards,
    list_batches,
    metric_rows,
    metrics,
    point_in_time,
    splits,
    tune,
)
from vlm4rec_spark.evaluation.arms import Arm, EvaluateSettings, ServingConfig
from vlm4rec_spark.evaluation.evaluate import Evaluation, EvaluationTables
from vlm4rec_spark.evaluation.point_in_time import PointInTime
from vlm4rec_spark.evaluation.slices import slices
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.stages.profiles import ProfileSettings
from vlm4rec_spark.storage.schemas import EMBEDDINGS

CUT = "2025-05-01"
PAIRS = 30
SERVING = ServingConfig("title", ProfileSettings(), ItemItemSettings())
Event = tuple[str, str, str]
"""User, item and time."""


def log(spark: SparkSession, events: Iterable[Event]) -> DataFrame:
    return shop.log(spark, ((user, item, "view", time) for user, item, time in events))


def embeddings(spark: SparkSession, by_name: Mapping[str, Mapping[str, np.ndarray]]) -> DataFrame:
    """Vectors by representation and item."""
    rows = [
        (item, representation, "test", "-", False, vector.tolist())
        for representation, vectors in by_name.items()
        for item, vector in vectors.items()
    ]
    return spark.createDataFrame(rows, EMBEDDINGS.schema)


def catalogue(spark: SparkSession, item_ids: Iterable[str]) -> DataFrame:
    rows = [(item_id, True) for item_id in item_ids]
    return spark.createDataFrame(rows, "item_id STRING, available BOOLEAN")


def pairs(events: DataFrame) -> set[tuple[str, str]]:
    return {(row["user_id"], row["item_id"]) for row in events.collect()}


def item_ids(events: DataFrame) -> set[str]:
    return {item for _, item in pairs(events)}


EVENTS = [
    ("ann", "A", "2025-04-29"),
    ("ann", "A", "2025-05-02"),
    ("ann", "B", "2025-04-30 23:59:59"),
    ("ann", "C", "2025-05-01 00:00:00"),
    ("ann", "D", "2025-05-03"),
    ("ben", "A", "2025-05-01 00:00:01"),
    ("cat", "C", "2025-04-01"),
]
TEN_DAYS = [("ann", f"I{day}", f"2025-01-{day:02d} 12:00:00") for day in range(1, 11)]


def test_time_split_puts_everything_from_the_cut_on_into_the_test(spark: SparkSession):
    train, test = splits.time_split(log(spark, EVENTS), CUT)
    assert pairs(train) == {("ann", "A"), ("ann", "B"), ("cat", "C")}
    assert pairs(test) == {("ann", "A"), ("ann", "C"), ("ann", "D"), ("ben", "A")}
    # A isn't new to ann, D is no candidate, ben has no train event and cat no test event.
    candidates = spark.createDataFrame([("A",), ("B",), ("C",)], "item_id STRING")
    relevant = splits.relevant(train, test, candidates).collect()
    assert [(row["user_id"], row["relevant"]) for row in relevant] == [("ann", ["C"])]


def test_leave_one_out_tests_on_the_last_event(spark: SparkSession):
    train, test = splits.leave_one_out(log(spark, EVENTS))
    assert pairs(test) == {("ann", "D")}
    assert pairs(train) == {("ann", "A"), ("ann", "B"), ("ann", "C"), ("ben", "A"), ("cat", "C")}


def test_the_default_cut_leaves_the_share_of_events(spark: SparkSession):
    assert splits.last_share(log(spark, TEN_DAYS), 0.2) == "2025-01-09 00:00:00"


def test_the_cut_is_a_time():
    assert EvaluateSettings(cut=date(2025, 5, 1)).cut == CUT  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        EvaluateSettings(cut="last week")


def test_validation_uses_nothing_of_the_test_part(spark: SparkSession):
    settings = EvaluateSettings(splits=("time", "leave_one_out"))
    time, leave_one_out = splits.of(log(spark, TEN_DAYS), settings)
    by_time = splits.validation(time, 0.2)
    assert by_time.cut == "2025-01-07 00:00:00"
    assert item_ids(by_time.test) == {"I7", "I8"}
    without_last = splits.validation(leave_one_out, 0.2)
    assert item_ids(without_last.test) == {"I9"}
    assert "I10" not in item_ids(without_last.train)


def random_lists(users: int, items: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Lists of 20, some shorter, and the relevant items of each user, some not on the list."""
    rng = np.random.default_rng(14)
    top = np.stack([rng.permutation(items)[:20] for _ in range(users)])
    top[np.arange(20) >= rng.integers(1, 30, users)[:, None]] = -1
    relevant = [
        np.sort(rng.choice(items, rng.integers(1, 15), replace=False)) for _ in range(users)
    ]
    return top, relevant


def test_the_metrics_are_those_of_a_library(monkeypatch):
    """ranx (Bassani 2022)."""
    # Compiling takes longer than all that is computed here.
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    import ranx

    users, items = 300, 60
    top, relevant = random_lists(users, items)
    codes = np.concatenate([user * items + row for user, row in enumerate(relevant)])
    hits = metrics.hit_mask(top, codes, items)
    counts = np.array([len(row) for row in relevant])
    expected = ranx.Qrels(
        {f"u{user}": {f"i{item}": 1 for item in row} for user, row in enumerate(relevant)}
    )
    lists = ranx.Run(
        {
            f"u{user}": {f"i{item}": 1 - rank / 100 for rank, item in enumerate(row) if item >= 0}
            for user, row in enumerate(top)
        }
    )
    for k in (1, 5, 10, 20):
        values = metrics.per_user(hits, counts, k)
        for metric in metrics.ACCURACY:
            name = f"{metric}@{k}"
            ranx.evaluate(expected, lists, name)
            reference = [lists.scores[name][f"u{user}"] for user in range(users)]
            np.testing.assert_allclose(
                values[metric],
                reference,
                rtol=0,
                atol=1e-9,
                err_msg=name,
            )


def test_the_random_arm_is_seeded_and_leaves_seen_items_out():
    users = pa.table({"user_id": [f"u{n}" for n in range(20)], "seen": [["A"]] * 20})
    ids = pd.Index(list("ABCDEF"), dtype=object)

    def lists(seed: int) -> dict[str, list[str]]:
        rank = list_batches.rank_by_value(
            ids,
            np.zeros(6, np.float32),
            5,
            seed,
        )
        drawn = pa.Table.from_batches(list_batches.map_batches(users, rank)).to_pylist()
        return {row["user_id"]: row["items"] for row in drawn}

    first = lists(1)
    assert first == lists(1) != lists(2)
    assert {tuple(sorted(items)) for items in first.values()} == {tuple("BCDEF")}
    assert len({tuple(items) for items in first.values()}) > 10


def tables_of(
    spark: SparkSession,
    events: Iterable[Event],
    items: Iterable[str],
    vectors: Mapping[str, Mapping[str, np.ndarray]],
) -> EvaluationTables:
    return EvaluationTables(
        log(spark, events),
        catalogue(spark, items),
        embeddings(spark, vectors),
        spark.createDataFrame([], "user_id STRING, segment STRING"),
    )


def look_alikes(spark: SparkSession, shift: int = 0) -> EvaluationTables:
    """Thirty users who saw H and will see R, which looks the same; with a `shift`, like another H.

    A thirty-first has a history without a vector. Five users have seen four more such items.
    """
    eye = np.eye(PAIRS)
    vectors = {f"H{n:02d}": eye[n] for n in range(PAIRS)}
    vectors |= {f"R{n:02d}": eye[(n + shift) % PAIRS] for n in range(PAIRS)}
    without_vector = [f"N{n}" for n in range(5)]
    events = [(f"u{n:02d}", f"H{n:02d}", "2025-01-01") for n in range(PAIRS)]
    events += [(f"u{n:02d}", f"R{n:02d}", "2025-05-01") for n in range(PAIRS)]
    events += [(f"u{n:02d}", item, "2025-01-02") for n in range(5) for item in without_vector[1:]]
    events += [("u30", "N0", "2025-01-01"), ("u30", "R00", "2025-05-02")]
    return tables_of(spark, events, [*vectors, *without_vector], {"title": vectors})


def with_log(spark: SparkSession, events: Iterable[Event]) -> EvaluationTables:
    return replace(look_alikes(spark), interactions=log(spark, events))


def evaluated(
    spark: SparkSession,
    tables: EvaluationTables,
    **settings: object,
) -> Evaluation:
    """An evaluation at k = 1 and CUT, by default of three arms."""
    defaults = {"arms": ("random", "popularity", "title"), "cut": CUT, "k": 1}
    chosen = EvaluateSettings(**{**defaults, **settings})  # type: ignore[arg-type]
    return evaluate.evaluate(
        spark,
        tables,
        chosen,
        SERVING,
        lambda line: None,
    )


@pytest.fixture(scope="module")
def evaluation(spark: SparkSession) -> Evaluation:
    return evaluated(spark, look_alikes(spark))


def row_of(
    evaluation: Evaluation,
    arm: str,
    split: str = "time",
    metric: str = "recall",
    slice_: str = "all",
) -> dict:
    key = {"arm": arm, "split": split, "metric": metric, "slice": slice_, "k": 1}
    (row,) = (row for row in evaluation.rows if key.items() <= row.items())
    return row


@pytest.mark.parametrize("split", ["time", "leave_one_out"])
def test_perfect_vectors_find_all_but_the_user_without_a_list(evaluation: Evaluation, split: str):
    for metric in metrics.ACCURACY:
        title = row_of(evaluation, "title", split, metric)
        assert title["value"] == pytest.approx(30 / 31)
        assert title["users"] == 31
        assert title["low"] <= title["value"] <= title["high"]
    # H00, or H01 for the user who saw it: everybody's favorite and nobody's next item.
    assert row_of(evaluation, "popularity", split)["value"] == 0
    assert row_of(evaluation, "random", split)["high"] < row_of(evaluation, "title", split)["low"]


def test_arms_are_compared_with_the_control(evaluation: Evaluation):
    title = row_of(evaluation, "title")
    assert title["control"] == "popularity"
    assert title["p_value"] < 0.01
    assert title["difference"] == title["value"]
    assert (title["difference_low"], title["difference_high"]) == (title["low"], title["high"])
    popularity = row_of(evaluation, "popularity")
    assert popularity["control"] == ""
    assert popularity["p_value"] is popularity["difference"] is None


def test_the_details_say_what_was_evaluated(evaluation: Evaluation):
    facts = evaluation.facts["time"]
    assert facts["cut"] == CUT
    assert facts["users"] == 31
    assert facts["candidates"] == 60
    assert facts["left_out_share"] == 0.0769


@pytest.mark.parametrize(
    ("slice_", "users"), [("history 1-4", 26), ("history 5-19", 5), ("history 20+", 0)]
)
def test_a_slice_under_thirty_users_gives_no_number(
    evaluation: Evaluation,
    slice_: str,
    users: int,
):
    row = row_of(evaluation, "title", slice_=slice_)
    assert row["users"] == users
    assert row["value"] is row["low"] is row["high"] is None


def test_segments_are_slices_the_largest_first():
    segments = ["b"] * 3 + ["a"] * 3 + ["c"] * 4 + [None] + [f"{n:02d}" for n in range(9)]
    users = pd.DataFrame({"seen": [[]] * len(segments), "segment": segments})
    items = pd.DataFrame({"category": ["x"]})
    sizes = [
        (part.name, int(part.users.sum()))
        for part in slices(
            users,
            None,
            np.ones(1, int),
            items,
        )
        if part.name.startswith("segment")
    ]
    assert sizes[:3] == [("segment c", 4), ("segment a", 3), ("segment b", 3)]
    assert sizes[3:] == [(f"segment {n:02d}", 1) for n in range(5)]


def test_an_arm_in_another_shape_finds_what_a_mean_blurs(spark: SparkSession):
    """Thirty users like two things that look different; their next item looks like one of them."""
    eye = np.eye(PAIRS * 2)
    vectors, events = {}, []
    for n in range(PAIRS):
        one, other = eye[2 * n], eye[2 * n + 1]
        vectors[f"H{n:02d}"] = one
        vectors[f"J{n:02d}"] = other
        vectors[f"R{n:02d}"] = 0.6 * eye[2 * n - 1] + 0.8 * one
        # Closer to the mean of both than R is, and further from each of them.
        vectors[f"M{n:02d}"] = (one + other) / np.sqrt(2)
        user = f"u{n:02d}"
        events += [(user, f"H{n:02d}", "2025-01-01"), (user, f"J{n:02d}", "2025-01-01")]
        events.append((user, f"R{n:02d}", "2025-05-01"))
    tables = tables_of(spark, events, vectors, {"title": vectors})
    names = ("title", "title/max_similarity")
    evaluation = evaluated(
        spark,
        tables,
        arms=names,
        splits=("time",),
        control="title",
    )
    assert row_of(evaluation, "title")["value"] == 0
    assert row_of(evaluation, "title/max_similarity")["value"] == 1


def test_a_shape_that_does_not_exist_is_refused():
    message = r"title/sum: a profile shape follows the slash: mean or plain_mean"
    with pytest.raises(ValidationError, match=message):
        EvaluateSettings(arms=("title", "title/sum"))


def test_two_evaluations_are_equal(spark: SparkSession, evaluation: Evaluation):
    repeated = evaluated(spark, look_alikes(spark), splits=("time",))
    assert repeated.rows == [row for row in evaluation.rows if row["split"] == "time"]


@pytest.mark.usefixtures("evaluation")
def test_other_vectors_under_the_same_name_are_used(spark: SparkSession):
    """Workers cache the index that they unpacked: they must tell indexes apart by content."""
    shifted = evaluated(spark, look_alikes(spark, shift=1), splits=("time",))
    assert row_of(shifted, "title")["value"] == 0


def test_shuffled_items_fall_to_chance(evaluation: Evaluation):
    for arm in ("random", "popularity", "title"):
        # Chance is one of 60, on 31 users.
        assert row_of(evaluation, arm, metric=metric_rows.SHUFFLED)["value"] < 0.15
    assert evaluation.facts["time"]["above_chance"] == []


def test_shuffling_items_keeps_the_number_of_each_user():
    codes = np.arange(0, 600, 7)
    shuffled = guards.shuffle_items(codes, 60, seed=1)
    assert len(np.unique(shuffled)) == len(codes)
    assert np.bincount(shuffled // 60).tolist() == np.bincount(codes // 60).tolist()


def test_recall_above_chance_is_flagged():
    assert guards.above_chance(np.array([1.0, 0.0] * 50), 1, 60)
    assert not guards.above_chance(np.array([1.0] + [0.0] * 59), 1, 60)


def test_a_planted_leak_ends_the_evaluation(spark: SparkSession, monkeypatch):
    """Profiles from the whole log: the commonest mistake there is."""
    tables = look_alikes(spark)
    original = point_in_time.profiles.weighted_events

    def leaking(train: DataFrame, *rest: object) -> DataFrame:
        return original(tables.interactions, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(point_in_time.profiles, "weighted_events", leaking)
    message = r"a leak: 31 of 31 histories of the split time contain test items"
    with pytest.raises(RunError, match=message):
        evaluated(spark, tables, splits=("time",))


def test_events_after_the_cut_are_a_leak():
    users = pd.DataFrame(
        {"relevant": [["b"]], "seen": [["a"]], "last_event_at": [datetime(2025, 5, 1)]}
    )
    message = r"a leak: 1 of 1 histories of the split time contain events from the cut 2025-05-01"
    with pytest.raises(RunError, match=message):
        guards.no_leak("time", CUT, users)
    guards.no_leak("leave_one_out", None, users)


def test_a_seen_item_on_a_list_ends_the_evaluation():
    seen = np.array([1, 8])
    message = r"the arm title recommends 1 items that their users have already seen"
    with pytest.raises(RunError, match=message):
        guards.nothing_seen(
            "title",
            np.array([[3, 1], [2, -1]]),
            seen,
            5,
        )
    guards.nothing_seen(
        "title",
        np.array([[3, 0], [2, -1]]),
        seen,
        5,
    )


def test_identical_vectors_raise_an_alarm(spark: SparkSession):
    """Texts that lost what distinguished them: the paper's own bug."""
    tables = look_alikes(spark)
    equal = tables.embeddings.withColumn("embedding", F.array(F.lit(1.0).cast("float")))
    settings = EvaluateSettings(
        arms=("random", "title"),
        control="random",
        splits=("time",),
        cut=CUT,
        k=1,
    )
    lines: list[str] = []
    evaluation = evaluate.evaluate(
        spark,
        replace(tables, embeddings=equal),
        settings,
        SERVING,
        lines.append,
    )
    assert evaluation.facts["time"]["identical_vectors"] == {"title": 60}
    warning = "60 of 60 candidates share their title vector with another"
    assert any(warning in line for line in lines)


def lists_of(
    spark: SparkSession,
    tables: EvaluationTables,
    names: tuple[str, ...],
    serving: ServingConfig = SERVING,
    **settings: object,
) -> dict[str, dict[str, list[str]]]:
    """The lists of each arm by user, as they are evaluated."""
    lists: dict[str, dict[str, list[str]]] = {}
    original = PointInTime.lists

    def record(
        snapshot: PointInTime,
        arm: Arm,
        k: int,
    ) -> np.ndarray:
        top = original(snapshot, arm, k)
        lists[arm.name] = {
            user: [snapshot.item_ids[item] for item in row if item >= 0]
            for user, row in zip(snapshot.users["user_id"], top, strict=True)
        }
        return top

    defaults = {"k": 1, "also_k": (), "splits": ("time",), "cut": CUT}
    changes = {"arms": names, "control": names[0], **settings}
    chosen = EvaluateSettings(**{**defaults, **changes})  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PointInTime, "lists", record)
        evaluate.evaluate(
            spark,
            tables,
            chosen,
            serving,
            lambda line: None,
        )
    return lists


def test_cooccurrence_is_an_arm_and_a_share_of_the_blend(spark: SparkSession):
    """Who has H has R of the next number, which looks different; u00 to u04 learn from others."""
    events = [(f"u{n:02d}", f"H{n % 5:02d}", "2025-01-01") for n in range(40)]
    for n in range(40):
        time = "2025-01-02" if n >= 5 else "2025-05-02"
        events.append((f"u{n:02d}", f"R{n % 5 + 1:02d}", time))
    tables = with_log(spark, events)
    serving = replace(SERVING, item_item=ItemItemSettings(share=0.6))
    lists = lists_of(
        spark,
        tables,
        ("cooccurrence", "blend", "title"),
        serving,
    )
    together = {f"u{n:02d}": [f"R{n % 5 + 1:02d}"] for n in range(5)}
    alike = {f"u{n:02d}": [f"R{n:02d}"] for n in range(5)}
    assert lists["cooccurrence"] == lists["blend"] == together
    assert lists["title"] == alike
    # Its default share is .4, and a similarity of 1 is more than that.
    assert lists_of(spark, tables, ("blend",))["blend"] == alike


def half_seen(spark: SparkSession) -> EvaluationTables:
    """Even users' next item looks like their last one, odd users' is called like it."""
    alike = np.eye(PAIRS)[[*range(PAIRS), *range(PAIRS)]]
    shifted = np.eye(PAIRS)[[*range(PAIRS), *np.roll(np.arange(PAIRS), 4)]]
    even = (np.arange(2 * PAIRS) % 2 == 0)[:, None]
    ids = [f"{letter}{n:02d}" for letter in "HR" for n in range(PAIRS)]
    vectors = {
        "image": dict(zip(ids, np.where(even, alike, shifted), strict=True)),
        "title": dict(zip(ids, np.where(even, shifted, alike), strict=True)),
    }
    return replace(look_alikes(spark), embeddings=embeddings(spark, vectors))


def test_a_fusion_knows_what_either_knows(spark: SparkSession):
    names = ("title", "image", "fusion_average", "fusion_concat")
    lists = lists_of(
        spark,
        half_seen(spark),
        names,
        k=2,
    )
    hit_rate = {
        name: np.mean([f"R{n:02d}" in lists[name][f"u{n:02d}"] for n in range(PAIRS)])
        for name in names
    }
    assert hit_rate == {"title": 0.5, "image": 0.5, "fusion_average": 1, "fusion_concat": 1}


def test_an_average_of_vectors_of_two_lengths_is_refused(spark: SparkSession):
    tables = half_seen(spark)
    is_title = F.col("representation") == "title"
    one = F.array(F.lit(1.0).cast("float"))
    short = tables.embeddings.withColumn(
        "embedding", F.when(is_title, F.col("embedding")).otherwise(one)
    )
    message = "fusion_average needs vectors of one length. Texts have 30 dimensions, photos 1"
    with pytest.raises(UsageError, match=message):
        lists_of(spark, replace(tables, embeddings=short), ("fusion_average",))


def test_a_custom_arm_replaces_settings_of_the_served_lists():
    with pytest.raises(ValidationError, match="position_decay"):
        EvaluateSettings(custom_arms={"wrong": {"profiles": {"position_decay": 2}}})  # type: ignore[dict-item]
    overrides = {"profiles": {"shape": "max_similarity"}, "item_item": {"share": 0.0}}
    settings = EvaluateSettings(arms=("custom",), custom_arms={"custom": overrides})  # type: ignore[dict-item]
    custom = arms.resolve("custom", settings.custom_arms, SERVING)
    named = arms.resolve("title/max_similarity", settings.custom_arms, SERVING)
    assert custom.serving == named.serving


def test_a_plain_mean_weighs_all_events_equally():
    profiles = arms.resolve("title/plain_mean", {}, SERVING).serving.profiles
    assert set(profiles.event_weights.values()) == {1.0}
    assert profiles.half_life_days is None
    assert profiles.position_decay == 1.0


def test_als_learns_who_takes_what_together(spark: SparkSession, monkeypatch):
    """Two circles of twenty users, each with eight items of which everybody has had six."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(40):
        *seen, last = [f"{'HR'[user % 2]}{n:02d}" for n in rng.permutation(8)[:7]]
        for day, item in enumerate(seen, 1):
            events.append((f"u{user:02d}", item, f"2025-01-{day:02d}"))
        events.append((f"u{user:02d}", last, "2025-05-01"))
    tables = with_log(spark, events)
    monkeypatch.setattr(als, "GRID", als.GRID[:1])
    monkeypatch.setattr(als, "_ITERATIONS", 4)
    lists = lists_of(
        spark,
        tables,
        ("random", "als"),
        k=2,
    )["als"]
    own_circle = [
        item[0] == "HR"[int(user[1:]) % 2] for user, items in lists.items() for item in items
    ]
    assert len(own_circle) == 80
    assert all(own_circle)


EVERY_KIND = (
    *("random", "popularity", "als", "cooccurrence", "blend"),
    *("title", "image", "fusion_average", "fusion_concat"),
    *("title/recency_time", "title/max_similarity", "title/multi_taste", "blended_shape"),
)


def busy_shop(spark: SparkSession) -> EvaluationTables:
    """Sixty users and items without any order, so that scores are close to each other."""
    rng = np.random.default_rng(5)
    ids = [f"{letter}{n:02d}" for letter in "HR" for n in range(PAIRS)]
    vectors = {}
    for name in ("title", "image"):
        drawn = rng.normal(size=(len(ids), 8))
        unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        vectors[name] = dict(zip(ids, unit, strict=True))
    events = []
    for user in range(60):
        items = rng.choice(ids, 12, replace=False)
        events += [
            (f"u{user:02d}", str(item), f"2025-0{1 + rank // 3}-0{1 + rank % 3}")
            for rank, item in enumerate([*items[:10], items[0], items[3], *items[10:]])
        ]
    return tables_of(spark, events, ids, vectors)


def test_the_driver_ranks_like_the_workers(spark: SparkSession, monkeypatch):
    """Small data needs no tasks: every kind of arm has the same lists either way."""
    tables = busy_shop(spark)
    blended = {"profiles": {"shape": "max_similarity"}, "item_item": {"share": 0.5}}
    monkeypatch.setattr(als, "GRID", als.GRID[:1])
    monkeypatch.setattr(als, "_ITERATIONS", 2)
    by_place = []
    for max_scores in (0, 2**26):
        monkeypatch.setattr(point_in_time, "_DRIVER_SCORES", max_scores)
        lists = lists_of(
            spark,
            tables,
            EVERY_KIND,
            custom_arms={"blended_shape": blended},
            k=10,
        )
        by_place.append(lists)
    on_workers, in_driver = by_place
    assert set(on_workers) == set(EVERY_KIND)
    for arm in EVERY_KIND:
        assert {len(items) for items in in_driver[arm].values()} == {10}, arm
        assert in_driver[arm] == on_workers[arm], arm
    assert len({str(lists) for lists in in_driver.values()}) == len(EVERY_KIND)


@pytest.mark.parametrize(("days", "item"), [(None, "H00"), (30, "H01")])
def test_popularity_may_count_the_last_days_only(
    spark: SparkSession,
    days: int | None,
    item: str,
):
    events = [(f"u{n:02d}", "H00", "2025-01-01") for n in range(30)]
    events += [(f"u{n:02d}", "H01", "2025-04-20") for n in range(30, 35)]
    events += [("u40", "H02", "2025-04-29"), ("u40", "R00", "2025-05-02")]
    tables = with_log(spark, events)
    lists = lists_of(
        spark,
        tables,
        ("popularity",),
        popularity_days=days,
    )
    assert lists["popularity"] == {"u40": [item]}


@pytest.fixture
def few_options(monkeypatch) -> None:
    options = dict.fromkeys(tune.OPTIONS, ()) | {"item_item.share": (0.2, 0.7)}
    monkeypatch.setattr(tune, "OPTIONS", options)


@pytest.mark.usefixtures("few_options")
def test_tune_finds_what_was_planted_without_the_test_part(spark: SparkSession):
    """Who has H has R of the next number. The last event, which is in the test, says otherwise."""
    events = [(f"u{n:02d}", f"H{n % 5:02d}", "2025-01-01") for n in range(60)]
    for n in range(60):
        time = "2025-02-02" if n % 3 else "2025-01-02"
        events.append((f"u{n:02d}", f"R{n % 5 + 1:02d}", time))
    events += [(f"u{n:02d}", f"R{n % 5 + 10:02d}", "2025-05-02") for n in range(60)]
    tables = with_log(spark, events)
    settings = EvaluateSettings(splits=("time",), cut=CUT, test_share=0.3, k=1, also_k=())
    lines: list[str] = []
    arguments = (spark, tables, settings, SERVING, ["title"], "ndcg")
    tuned = tune.tune(*arguments, lines.append)
    assert tuned.cut == "2025-02-02 00:00:00"
    assert tuned.users == 40
    assert tuned.best.serving.item_item.share == 0.7
    assert tuned.best.recall == 1.0
    assert tuned.best_content.serving.item_item.share == 0.0
    assert tuned.best_content.recall == 0.0
    # Three shapes, equal event weights, two shares, and four close to the best one.
    assert len(lines) == len(tuned.trials) == 3 + 1 + 2 + 4
    repeated = tune.tune(*arguments, lines.append)
    assert [replace(trial, seconds=0) for trial in repeated.trials] == [
        replace(trial, seconds=0) for trial in tuned.trials
    ]
