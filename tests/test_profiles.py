"""Profiles: literal events to literal weights, the mean vector against numpy, incremental runs."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from shop import Event, MakePipeline, build_exact, item_row, log, upsert
from small_indexes import unit

from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import Pipeline
from vlm4rec_spark.pipeline import index as index_stage
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import profiles
from vlm4rec_spark.stages.profiles import ProfileSettings
from vlm4rec_spark.storage.schemas import IDENTITIES, INTERACTIONS, ITEMS, PROFILES

SETTINGS = ProfileSettings(bot_events_per_day=3)
DIMENSION = 24


def histories(
    spark: SparkSession, events: Sequence[Event], settings: ProfileSettings = SETTINGS
) -> dict[str, dict]:
    items = spark.createDataFrame([(item,) for item in "ABCD"], "item_id STRING")
    rows = profiles.histories(log(spark, events), items, settings).collect()
    return {row["user_id"]: row.asDict(recursive=True) for row in rows}


def weights(profile: dict) -> dict[str, float]:
    return {item["item_id"]: item["weight"] for item in profile["history"]}


EVENTS = [
    ("ann", "A", "view", "2025-01-01 12:00:00"),
    ("ann", "B", "cart", "2025-01-31 12:00:00"),
    ("ann", "A", "purchase", "2025-03-02 12:00:00"),
    ("ann", "C", "scroll", "2025-04-01 12:00:00"),
    ("ann", "gone", "purchase", "2025-04-01 12:00:00"),
    ("ben", "D", "scroll", "2025-01-01 12:00:00"),
    ("cat", "gone", "view", "2025-01-01 12:00:00"),
    *[("bot", "A", "view", f"2025-01-01 12:00:0{second}") for second in range(4)],
    *[("fan", "B", "view", f"2025-01-0{day} 12:00:00") for day in range(1, 5)],
]


def test_a_returned_item_is_seen_but_counts_only_by_later_events(spark: SparkSession):
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
    by_user = histories(spark, events, settings)
    assert weights(by_user["ann"]) == {"B": 1, "C": 1}
    assert by_user["ann"]["seen"] == ["A", "B", "C"]
    assert by_user["ann"]["events"] == 2
    assert set(by_user) == {"ann"}


def test_a_repeated_event_counts_once_per_session(spark: SparkSession):
    events = [("ann", "A", "view", f"2025-01-01 12:{minute:02d}:00") for minute in (0, 20, 40)]
    events += [
        ("ann", "A", "view", "2025-01-01 13:20:00"),
        ("ann", "A", "cart", "2025-01-01 12:21:00"),
        ("ann", "B", "view", "2025-01-01 12:22:00"),
    ]
    by_user = histories(spark, events, ProfileSettings(session_minutes=30, half_life_days=None))
    # Each view but the last is within half an hour of the one before it.
    assert weights(by_user["ann"]) == {"A": 1 + 1 + 3, "B": 1}
    assert histories(spark, events, ProfileSettings(session_minutes=30, min_items=3)) == {}


def test_weights_seen_bots_and_unknown_items(spark: SparkSession):
    by_user = histories(spark, EVENTS)
    # ben only scrolled, cat's item isn't in the catalogue. bot has four events on a day, fan one.
    assert set(by_user) == {"ann", "fan"}
    ann = by_user["ann"]
    # A: a view 60 days before the last event that counts, 1 x 0.5, and a purchase, 5 x 1.
    # B: a cart 30 days before it.
    assert list(weights(ann)) == ["A", "B"]
    assert weights(ann) == pytest.approx({"A": 5.5, "B": 3 * 0.5**0.5}, rel=1e-15)
    assert ann["seen"] == ["A", "B", "C"]
    assert ann["events"] == 3
    assert ann["last_event_at"] == datetime(2025, 3, 2, 12)
    assert by_user["fan"]["events"] == 4


def test_the_profile_of_a_quiet_user_does_not_change(spark: SparkSession):
    later = [*EVENTS, ("new", "D", "purchase", "2030-01-01 12:00:00")]
    assert histories(spark, later)["ann"] == histories(spark, EVENTS)["ann"]


def test_without_half_life_and_with_the_last_item_only(spark: SparkSession):
    event_weights = {"view": 2.0, "cart": 7.0}
    settings = ProfileSettings(event_weights=event_weights, half_life_days=None, last_n=1)
    ann = histories(spark, EVENTS, settings)["ann"]
    # The purchase doesn't count now, so the cart of B is the latest event.
    assert weights(ann) == {"B": 7.0}
    assert ann["seen"] == ["A", "B", "C"]
    assert ann["events"] == 2


def test_an_item_weighs_less_for_each_later_item(spark: SparkSession):
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
    drawn = unit(np.random.default_rng(3).standard_normal((40, DIMENSION)))
    return {f"i{number:02d}": vector for number, vector in enumerate(drawn)}


@pytest.fixture
def open_searcher(
    spark: SparkSession, tmp_path, vectors: dict[str, np.ndarray]
) -> Callable[[], Searcher]:
    folder = tmp_path / "test_profiles"
    matrix = np.stack(list(vectors.values()))
    return ship(spark, build_exact(folder, vectors, matrix), 1.0, Searcher.open)


def random_histories() -> dict[str, list[tuple[str, float]]]:
    """Item ids and weights of 30 users, and of two with an item outside the index."""
    rng = np.random.default_rng(4)
    by_user = {}
    for user in range(30):
        items = rng.permutation(40)[: 1 + user % 9]
        item_weights = rng.random(9) + 0.1
        by_user[f"u{user:02d}"] = [
            (f"i{item:02d}", float(weight))
            for item, weight in zip(items, item_weights, strict=False)
        ]
    by_user["unknown"] = [("gone", 1.0)]
    by_user["half"] = [("gone", 9.0), ("i00", 1.0)]
    return by_user


def test_the_vector_is_numpys_mean_on_any_number_of_partitions(
    spark: SparkSession,
    vectors: dict[str, np.ndarray],
    open_searcher: Callable[[], Searcher],
):
    by_user = random_histories()
    frame = spark.createDataFrame(
        [(user, history, ["x"], 1, datetime(2025, 1, 1)) for user, history in by_user.items()],
        "user_id STRING, history ARRAY<STRUCT<item_id: STRING, weight: DOUBLE>>, "
        "seen ARRAY<STRING>, events BIGINT, last_event_at TIMESTAMP",
    )

    def embeddings(partitions: int) -> dict[str, list[float]]:
        rows = frame.repartition(partitions, "user_id")
        embedded = profiles.with_embedding(rows, "caption", open_searcher)
        return {row["user_id"]: row["embedding"] for row in embedded.collect()}

    by_numpy = embeddings(1)
    assert embeddings(7) == by_numpy
    assert by_numpy.pop("unknown") is None
    for user, embedding in by_numpy.items():
        indexed = [(item, weight) for item, weight in by_user[user] if item in vectors]
        total = sum(weight * vectors[item].astype(np.float64) for item, weight in indexed)
        np.testing.assert_allclose(
            embedding,
            total / np.linalg.norm(total),
            rtol=0,
            atol=1e-7,
        )


class Nights:
    """A shop with a random log, run night by night."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.titles = {f"i{number}": f"Thing {number} of {number % 3}" for number in range(12)}
        self.items = list(self.titles)
        self._rng = np.random.default_rng(0)
        self._events = 0
        self._written: dict[str, str] = {}

    def run(
        self, day: int, users: list[str], items: list[str] | None = None
    ) -> tuple[set[str], int]:
        """Three events per user, then a run.

        Returns the users whose rows changed, and how many profiles were rebuilt. Asserts that the
        table equals a full rebuild.
        """
        self._add_events(day, users, items or self.items)
        stages = ["profiles"]
        if self._written != self.titles:
            self._write_items()
            stages = ["embed", "index", "profiles"]
        tables = self.pipeline.tables
        version = tables.versions([PROFILES]).get("profiles")
        result = self.pipeline.run(stages)[-1]
        assert self.profiles().orderBy("user_id").collect() == self._full_rebuild()
        changes = []
        if version is not None:
            changes = tables.changed_since(PROFILES, version).collect()
        return {row["user_id"] for row in changes}, int(result.details["users_rebuilt"])

    def profiles(self) -> DataFrame:
        return self.pipeline.tables.read(PROFILES)

    def users_of(self, item: str) -> set[str]:
        events = self.pipeline.tables.read(INTERACTIONS).where(F.col("item_id") == item)
        return {row["user_id"] for row in events.collect()}

    def identify(
        self,
        anonymous_id: str,
        user_id: str,
    ) -> None:
        upsert(self.pipeline, IDENTITIES, [(anonymous_id, user_id, None)])

    def _add_events(
        self,
        day: int,
        users: list[str],
        items: list[str],
    ) -> None:
        events = []
        for user in users:
            for item in self._rng.choice(items, 3, replace=False):
                clock = f"{self._rng.integers(24):02d}:{self._rng.integers(60):02d}:00"
                events.append((user, item, "view", f"2025-01-{day:02d} {clock}"))
        rows = log(self.pipeline.spark, events, self._events)
        self._events += len(events)
        self.pipeline.tables.insert(INTERACTIONS, rows)

    def _write_items(self) -> None:
        rows = [item_row(item, title=title) for item, title in self.titles.items()]
        upsert(self.pipeline, ITEMS, rows)
        self._written = dict(self.titles)

    def _full_rebuild(self) -> list:
        context = self.pipeline.context
        rows = profiles.histories(context.log(), context.read(ITEMS), context.config.profiles)
        opens = partial(Searcher.open, index_stage.index_folder(context))
        return profiles.with_embedding(rows, "title", opens).orderBy("user_id").collect()


@pytest.fixture
def nights(pipeline: MakePipeline, tmp_path) -> Nights:
    settings = ("representation=title", "profiles.half_life_days=7")
    return Nights(pipeline(tmp_path, *settings, "profiles.bot_events_per_day=20"))


def test_a_night_rebuilds_only_profiles_of_users_whose_events_or_items_changed(
    nights: Nights,
):
    nights.identify("visitor", "u20")
    users = [f"u{number:02d}" for number in range(30)]
    _, rebuilt = nights.run(1, users)
    assert rebuilt == 30
    # u00 and u01 also have events on items that aren't in the catalogue yet.
    assert nights.run(2, users[:2], ["late", "later", "i1"]) == ({"u00", "u01"}, 2)
    # One of these items comes into the catalogue, and i3 gets another title.
    nights.titles |= {"late": "A late thing", "i3": "Another name"}
    expected = {"u00", "u01", "u05", "new"} | nights.users_of("i3")
    assert nights.run(3, ["u05", "new"]) == (expected, len(expected))
    assert len(expected) < 20
    # A day with bot traffic takes the profile away.
    assert nights.run(4, ["u07"] * 10) == ({"u07"}, 1)
    # An anonymous user is identified. An identified visitor counts as the user.
    nights.identify("u10", "u11")
    assert nights.run(5, ["visitor"]) == ({"u10", "u11", "u20"}, 3)
    assert nights.profiles().where("user_id = 'u10'").isEmpty()
    # A run with other settings that was killed may have written rows: all are rebuilt.
    foreign_rows = nights.profiles().withColumn("events", F.lit(77).cast("long"))
    nights.pipeline.tables.upsert(PROFILES, foreign_rows)
    changed, rebuilt = nights.run(6, ["u08"])
    assert "u09" in changed
    assert rebuilt == 30
