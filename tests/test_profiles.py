"""Profiles: literal events to literal weights, and the mean vector against numpy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import functions as F

from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import index as index_stage
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import profiles
from vlm4rec_spark.stages.profiles import ProfileSettings
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from vlm4rec_spark.pipeline import Pipeline

SETTINGS = ProfileSettings(bot_events_per_day=3)
DIMENSION = 24


def log(spark: SparkSession, *events: tuple[str, str, str, str]) -> DataFrame:
    """Interactions of (user, item, type, time)."""
    rows = [
        (f"e{n}", user, item, kind, at, at.date())
        for n, (user, item, kind, at) in enumerate(
            (u, i, k, datetime.fromisoformat(t)) for u, i, k, t in events
        )
    ]
    return spark.createDataFrame(rows, schemas.INTERACTIONS.schema)


def histories(
    spark: SparkSession,
    events: list[tuple[str, str, str, str]],
    settings: ProfileSettings = SETTINGS,
) -> dict[str, dict]:
    items = spark.createDataFrame([(item,) for item in "ABCD"], "item_id STRING")
    rows = profiles.histories(log(spark, *events), items, settings).collect()
    return {row["user_id"]: row.asDict(recursive=True) for row in rows}


EVENTS = [
    ("ann", "A", "view", "2025-01-01 12:00:00"),
    ("ann", "B", "cart", "2025-01-31 12:00:00"),
    ("ann", "A", "purchase", "2025-03-02 12:00:00"),
    ("ann", "C", "scroll", "2025-04-01 12:00:00"),
    ("ann", "gone", "purchase", "2025-04-01 12:00:00"),
    ("ben", "D", "scroll", "2025-01-01 12:00:00"),
    ("cat", "gone", "view", "2025-01-01 12:00:00"),
    *[("bot", "A", "view", f"2025-01-01 12:00:0{n}") for n in range(4)],
    *[("fan", "B", "view", f"2025-01-0{n} 12:00:00") for n in range(1, 5)],
]


def test_what_was_sent_back_is_seen_but_no_taste_until_it_is_taken_up_again(
    spark: SparkSession,
) -> None:
    events = [
        ("ann", "A", "purchase", "2025-01-01 12:00:00"),
        ("ann", "A", "return", "2025-01-09 12:00:00"),
        ("ann", "B", "purchase", "2025-01-01 12:00:00"),
        ("ann", "B", "return", "2025-01-09 12:00:00"),
        ("ann", "B", "view", "2025-01-10 12:00:00"),
        ("ann", "C", "view", "2025-01-02 12:00:00"),
        ("ben", "A", "hide", "2025-01-02 12:00:00"),
    ]
    settings = ProfileSettings(negative_events=("return", "hide"), half_life_days=None)
    found = histories(spark, events, settings)
    assert {item["item_id"]: item["weight"] for item in found["ann"]["history"]} == {"B": 1, "C": 1}
    assert (found["ann"]["seen"], found["ann"]["events"]) == (["A", "B", "C"], 2)
    assert set(found) == {"ann"}


def test_a_session_counts_once(spark: SparkSession) -> None:
    events = [("ann", "A", "view", f"2025-01-01 12:{minute:02d}:00") for minute in (0, 20, 40)]
    events += [
        ("ann", "A", "view", "2025-01-01 13:20:00"),
        ("ann", "A", "cart", "2025-01-01 12:21:00"),
        ("ann", "B", "view", "2025-01-01 12:22:00"),
    ]
    found = histories(spark, events, ProfileSettings(session_minutes=30, half_life_days=None))
    # Each view but the last is within half an hour of the one before it.
    assert {item["item_id"]: item["weight"] for item in found["ann"]["history"]} == {
        "A": 1 + 1 + 3,
        "B": 1,
    }
    assert histories(spark, events, ProfileSettings(session_minutes=30, min_items=3)) == {}


def test_weights_seen_bots_and_unknown_items(spark: SparkSession) -> None:
    found = histories(spark, EVENTS)
    # ben only scrolled, cat's item isn't in the catalogue, bot made four events on one day and fan only one.
    assert set(found) == {"ann", "fan"}
    ann = found["ann"]
    # A: view 60 days before the last event that counts, 1 x 0.5, and a purchase, 5 x 1. B: cart 30 days before it.
    assert [item["item_id"] for item in ann["history"]] == ["A", "B"]
    assert [item["weight"] for item in ann["history"]] == pytest.approx(
        [5.5, 3 * 0.5**0.5], rel=1e-15
    )
    assert ann["seen"] == ["A", "B", "C"]
    assert (ann["events"], ann["last_event_at"]) == (3, datetime(2025, 3, 2, 12))
    assert found["fan"]["events"] == 4


def test_a_quiet_users_profile_does_not_change(spark: SparkSession) -> None:
    later = [*EVENTS, ("new", "D", "purchase", "2030-01-01 12:00:00")]
    assert histories(spark, later)["ann"] == histories(spark, EVENTS)["ann"]


def test_without_half_life_and_with_the_last_item_only(spark: SparkSession) -> None:
    settings = ProfileSettings(
        event_weights={"view": 2.0, "cart": 7.0}, half_life_days=None, last_n=1
    )
    ann = histories(spark, EVENTS, settings)["ann"]
    # The purchase doesn't count now, so the cart of B is the latest event.
    assert ann["history"] == [{"item_id": "B", "weight": 7.0}]
    assert (ann["seen"], ann["events"]) == (["A", "B", "C"], 2)


def test_an_item_weighs_less_for_each_that_came_later(spark: SparkSession) -> None:
    events = [
        ("ann", item, "view", f"2025-01-0{day} 12:00:00") for day, item in enumerate("ABC", 1)
    ]
    settings = ProfileSettings(half_life_days=None, position_decay=0.5, last_n=2)
    assert histories(spark, events, settings)["ann"]["history"] == [
        {"item_id": "C", "weight": 1.0},
        {"item_id": "B", "weight": 0.5},
    ]


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(3).standard_normal((40, DIMENSION))
    drawn = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return {f"i{n:02d}": vector for n, vector in enumerate(drawn)}


def test_the_vector_is_numpys_mean_on_any_number_of_partitions(
    spark: SparkSession, tmp_path: Path, vectors: dict[str, np.ndarray]
) -> None:
    table = pa.table(
        {
            "item_id": list(vectors),
            "embedding": pa.array([v.tolist() for v in vectors.values()], pa.list_(pa.float32())),
            "content_sha256": ["-"] * len(vectors),
            "text": [""] * len(vectors),
        }
    )
    searcher = ship(
        spark,
        build_index(table, "caption", "test", tmp_path, ann_min_items=10**6),
        1.0,
        Searcher.open,
    )
    rng = np.random.default_rng(4)
    drawn = {
        f"u{n:02d}": [
            (f"i{i:02d}", float(w))
            for i, w in zip(rng.permutation(40)[: 1 + n % 9], rng.random(9) + 0.1, strict=False)
        ]
        for n in range(30)
    }
    drawn |= {"unknown": [("gone", 1.0)], "half": [("gone", 9.0), ("i00", 1.0)]}
    now = datetime(2025, 1, 1)
    frame = spark.createDataFrame(
        [(user, history, ["x"], 1, now) for user, history in drawn.items()],
        "user_id STRING, history ARRAY<STRUCT<item_id: STRING, weight: DOUBLE>>, seen ARRAY<STRING>, events BIGINT, "
        "last_event_at TIMESTAMP",
    )
    found = []
    for partitions in (1, 7):
        made = profiles.with_embedding(
            frame.repartition(partitions, "user_id"), "caption", searcher
        )
        found.append({row["user_id"]: row["embedding"] for row in made.collect()})
    assert found[0] == found[1]
    assert found[0].pop("unknown") is None
    for user, embedding in found[0].items():
        total = sum(
            weight * vectors[item].astype(np.float64)
            for item, weight in drawn[user]
            if item in vectors
        )
        np.testing.assert_allclose(embedding, total / np.linalg.norm(total), rtol=0, atol=1e-7)


def test_new_events_and_items_touch_only_their_users_and_all_is_as_if_made_anew(
    spark: SparkSession, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """A random log in six nights; the third brings a new item, and one that is called otherwise from then on."""
    rng, titles, made = (
        np.random.default_rng(0),
        {f"i{n}": f"Thing {n} of {n % 3}" for n in range(12)},
        count(),
    )
    run = pipeline(
        tmp_path,
        "representation=title",
        "profiles.half_life_days=7",
        "profiles.bot_events_per_day=20",
    )

    def night(day: int, users: list[str], items: list[str]) -> tuple[set[str], str]:
        """Users whose rows changed, and how many were made again."""
        events = [
            (
                user,
                item,
                "view",
                f"2025-01-{day:02d} {rng.integers(24):02d}:{rng.integers(60):02d}:00",
            )
            for user in users
            for item in rng.choice(items, 3, replace=False)
        ]
        rows = log(spark, *events).collect()
        numbered = spark.createDataFrame(
            [(f"e{next(made)}", *row[1:]) for row in rows], schemas.INTERACTIONS.schema
        )
        run.tables.insert(schemas.INTERACTIONS, numbered)
        now = datetime(2025, 1, 1)
        catalogue = [(item, title, *[None] * 8, True, None, now) for item, title in titles.items()]
        run.tables.upsert(schemas.ITEMS, spark.createDataFrame(catalogue, schemas.ITEMS.schema))
        before = run.tables.versions([schemas.PROFILES]).get("profiles")
        outcome = run.run(["embed", "index", "profiles"])[-1]
        # Everything made anew, by the stage's own functions.
        whole = profiles.histories(
            run.context.log(), run.context.read(schemas.ITEMS), run.config.profiles
        )
        opens = partial(Searcher.open, index_stage.index_folder(run.context))
        anew = profiles.with_embedding(whole, "title", opens).orderBy("user_id").collect()
        assert run.tables.read(schemas.PROFILES).orderBy("user_id").collect() == anew
        changed = (
            [] if before is None else run.tables.changed_since(schemas.PROFILES, before).collect()
        )
        return {row["user_id"] for row in changed}, outcome.details["users_rebuilt"]

    def known_as(anonymous: str, user: str) -> None:
        row = spark.createDataFrame([(anonymous, user, None)], schemas.IDENTITIES.schema)
        run.tables.upsert(schemas.IDENTITIES, row)

    known_as("visitor", "u20")
    everybody, known = [f"u{n:02d}" for n in range(30)], list(titles)
    assert night(1, everybody, known)[1] == "30"
    # u00 and u01 also meet what isn't in the catalogue yet.
    assert night(2, everybody[:2], ["late", "later", "i1"]) == ({"u00", "u01"}, "2")
    titles |= {"late": "A late thing", "i3": "Another name"}
    renamed = {
        row["user_id"]
        for row in run.tables.read(schemas.INTERACTIONS).where("item_id = 'i3'").collect()
    }
    touched, rebuilt = night(3, ["u05", "new"], known)
    assert {"u00", "u01", "u05", "new"} | renamed == touched
    assert int(rebuilt) == len(touched) < 20
    # A bot's day takes the profile away.
    assert night(4, ["u07"] * 10, known) == ({"u07"}, "1")
    # Somebody signs in; a visitor who is known by now counts as the user.
    known_as("u10", "u11")
    assert night(5, ["visitor"], known) == ({"u10", "u11", "u20"}, "3")
    assert "u10" not in {row["user_id"] for row in run.tables.read(schemas.PROFILES).collect()}
    # What a run by other settings wrote before it was killed is written over, whoever's events are new.
    other = run.tables.read(schemas.PROFILES).withColumn("events", F.lit(77).cast("long"))
    run.tables.upsert(schemas.PROFILES, other)
    touched, rebuilt = night(6, ["u08"], known)
    assert ("u09" in touched, int(rebuilt)) == (True, 30)
