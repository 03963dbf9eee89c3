"""Recommend: exact search equals brute force, ScaNN keeps its promises, reasons are explained."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from shop import log
from small_indexes import unit

from vlm4rec_spark.models.encoding.text_encoder import load_embedder
from vlm4rec_spark.models.index import neighbors
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import Cap, ListRules
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import MeanQuery
from vlm4rec_spark.spark import neighbors_file
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import popularity, recommend
from vlm4rec_spark.stages.recommend import CONTENT, ProfileScoring
from vlm4rec_spark.storage import schemas

OpenSearcher = Callable[[], Searcher]

ITEMS = 400
USERS = 60
DIMENSION = 16
K = 10
AT = datetime(2025, 1, 1)
WITHDRAWN = [f"i{n:03d}" for n in range(0, ITEMS - 1, 7)]
COLORS = ("red", "green", "blue", "black")
MAX_SIMILARITY = ProfileScoring("max_similarity")


@dataclass
class World:
    """Random items (the last two are equal) and users, as numpy has them and as Spark does."""

    ids: list[str]
    vectors: np.ndarray
    seen: dict[str, list[str]]
    queries: dict[str, np.ndarray]
    profiles: DataFrame
    exact: Path
    scann: Path

    def position(self, item: str) -> int:
        return self.ids.index(item)

    def cosines(self, items: list[str]) -> np.ndarray:
        """float32 (all items, items)."""
        return self.vectors @ self.vectors[[self.position(item) for item in items]].T

    def best(
        self,
        user: str,
        scores: np.ndarray,
        withdrawn: list[str],
    ) -> list[tuple[str, float]]:
        """The k best items by their scores, (items,)."""
        excluded = {*self.seen[user], *withdrawn}
        ranked = sorted(
            (-round(float(score), 6), item)
            for item, score in zip(self.ids, scores, strict=True)
            if item not in excluded
        )
        return [(item, -score) for score, item in ranked[:K]]

    def brute_force(
        self,
        user: str,
        withdrawn: list[str],
    ) -> list[tuple[str, float]]:
        return self.best(user, self.vectors @ self.queries[user], withdrawn)


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory) -> World:
    rng = np.random.default_rng(11)
    ids = [f"i{n:03d}" for n in range(ITEMS)]
    vectors = unit(rng.standard_normal((ITEMS, DIMENSION)))
    vectors[-1] = vectors[-2]
    texts = [f"A {COLORS[n % 4]} thing, nr{n}." for n in range(ITEMS)]
    exact = tmp_path_factory.mktemp("exact")
    scann = tmp_path_factory.mktemp("scann")
    Searcher.build(
        exact,
        "exact",
        ids,
        vectors,
        texts,
        ann_min_items=10**6,
    )
    Searcher.build(
        scann,
        "scann",
        ids,
        vectors,
        texts,
        ann_min_items=16,
    )
    rows = profile_tuples(rng, ids, vectors)
    nobody = ("nobody", "caption", [("gone", 1.0)], ["gone"], None, 1, AT)
    profiles = spark.createDataFrame([*rows, nobody], schemas.PROFILES.schema)
    seen = {user: items for user, _, _, items, *_ in rows}
    queries = {user: np.float32(vector) for user, _, _, _, vector, *_ in rows}
    return World(
        ids,
        vectors,
        seen,
        queries,
        profiles.repartition(3).persist(),
        exact,
        scann,
    )


def profile_tuples(
    rng: np.random.Generator,
    ids: list[str],
    vectors: np.ndarray,
) -> list[tuple]:
    """u00 has seen all but three items; u01's query is the vector of the two equal items."""
    rows = []
    for n in range(USERS):
        user = f"u{n:02d}"
        length = ITEMS - 3 if n == 0 else 1 + n % 40
        history = [ids[i] for i in rng.permutation(ITEMS)[:length]]
        if n == 1:
            history = ids[100:102]
            query = vectors[-1]
        else:
            query = unit(rng.standard_normal(DIMENSION))
        weighted = [(item, 1.0) for item in history[:5]]
        rows.append((user, "caption", weighted, sorted(history), query.tolist(), 1, AT))
    return rows


@pytest.fixture
def open_exact(spark: SparkSession, world: World) -> OpenSearcher:
    return ship(spark, world.exact, 1.0, Searcher.open)


@pytest.fixture
def open_scann(spark: SparkSession, world: World) -> OpenSearcher:
    return ship(spark, world.scann, 1.0, Searcher.open)


def recommend_lists(
    profiles: DataFrame,
    open_searcher: OpenSearcher,
    withdrawn: list[str],
    effort: Effort | None,
    scoring: ProfileScoring = CONTENT,
) -> dict[str, list[Row]]:
    list_rules = recommend.all_items_except(open_searcher(), withdrawn)
    rows = recommend.recommend(profiles, open_searcher, list_rules, K, effort, scoring)
    return {row["user_id"]: row["items"] for row in rows.collect()}


def column(items: list[Row], name: str) -> list:
    return [item[name] for item in items]


def test_exact_search_equals_brute_force(world: World, open_exact: OpenSearcher):
    lists = recommend_lists(world.profiles, open_exact, WITHDRAWN, None)
    assert set(lists) == set(world.queries)  # a profile without a vector gets no list
    for user, items in lists.items():
        expected = world.brute_force(user, WITHDRAWN)
        assert column(items, "item_id") == [item for item, _ in expected]
        scores = [score for _, score in expected]
        assert column(items, "score") == pytest.approx(scores, abs=2e-6)
    assert len(lists["u00"]) <= 3
    assert {len(items) for user, items in lists.items() if user != "u00"} == {K}
    # Equal scores: the smaller id first.
    assert column(lists["u01"], "item_id")[:2] == ["i398", "i399"]


def test_max_similarity_equals_brute_force_and_names_the_nearest_history_item(
    spark: SparkSession, world: World, open_exact: OpenSearcher
):
    rows = []
    histories = {}
    for row in world.profiles.collect():
        ids = column(row["history"], "item_id")
        weights = [3.0 * 0.9**age for age in range(len(ids))]
        histories[row["user_id"]] = ids
        weighted = list(zip(ids, weights, strict=True))
        rows.append((*row[:2], weighted, *row[3:]))
    profiles = spark.createDataFrame(rows, schemas.PROFILES.schema)
    lists = recommend_lists(profiles, open_exact, WITHDRAWN, None, MAX_SIMILARITY)
    assert set(lists) == set(world.queries)
    for user, items in lists.items():
        history = histories[user]
        similarities = world.cosines(history) * 0.9 ** np.arange(len(history))
        expected = world.best(user, similarities.max(axis=1), WITHDRAWN)
        scores = [score for _, score in expected]
        assert column(items, "score") == pytest.approx(scores, abs=2e-6)
        for item in items:
            similarity = similarities[world.position(item["item_id"])]
            reason = history.index(item["because_item_id"])
            assert similarity[reason] == pytest.approx(similarity.max(), abs=2e-6)


SEARCH = Effort(leaves=4, candidates=20)
DEPTH = 64
"""The 20 candidates and the 37 items that nine users in ten haven't seen more than, rounded up."""


@pytest.fixture
def build_neighbors(
    spark: SparkSession,
    world: World,
    open_scann: OpenSearcher,
    tmp_path,
    monkeypatch,
) -> Callable[[], Path]:
    """Builds the neighbors in blocks of 96 items, with one Spark job for every two blocks."""
    monkeypatch.setattr(neighbors_file, "_BLOCK_ITEMS", 96)
    monkeypatch.setattr(neighbors_file, "_DRIVER_BYTES", 2 * 96 * 8 * DEPTH)
    searcher = Searcher.open(world.scann)
    effort = Effort(SEARCH.leaves, DEPTH)
    folder = tmp_path / "neighbors"
    return partial(neighbors_file.build, spark, searcher, open_scann, effort, folder)


def test_the_depth_of_neighbors_is_enough_for_most_users(world: World):
    histories = [items[:5] for items in world.seen.values()]
    sample = pa.table({"seen": list(world.seen.values()), "history": histories})
    assert neighbors.needed_depth(SEARCH.candidates, sample, ITEMS) == DEPTH
    assert neighbors.needed_depth(SEARCH.candidates, sample, 50) == 50
    assert neighbors.pays_off(sample, 100, ITEMS)
    assert not neighbors.pays_off(sample, USERS, ITEMS)


def test_precomputed_neighbors_give_the_same_lists(
    spark: SparkSession,
    world: World,
    open_scann: OpenSearcher,
    build_neighbors: Callable[[], Path],
):
    """They are deep enough for most users, but not for u00."""
    open_neighbors = ship(spark, build_neighbors(), 1.0, Neighbors.open)
    precomputed = ProfileScoring("max_similarity", open_neighbors=open_neighbors)
    profiles = world.profiles.repartition(1)
    searched = recommend_lists(profiles, open_scann, WITHDRAWN, SEARCH, MAX_SIMILARITY)
    lists = recommend_lists(profiles, open_scann, WITHDRAWN, SEARCH, precomputed)
    assert len(lists) == USERS
    assert lists == searched


def test_neighbors_are_built_once_and_a_damaged_folder_again(
    world: World, build_neighbors: Callable[[], Path], tmp_path
):
    unused = tmp_path / "neighbors" / "old"
    unused.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(unused, (two_days_ago, two_days_ago))
    folder = build_neighbors()
    assert list(folder.parent.iterdir()) == [folder]

    searcher = Searcher.open(world.scann)
    expected = searcher.search(searcher.vectors, Effort(SEARCH.leaves, DEPTH))
    built = Neighbors.open(folder)
    assert built.positions.tolist() == expected.positions.tolist()
    filled = expected.positions >= 0
    assert not filled.all()
    cosines = expected.scores.astype(np.float32)
    assert built.cosines[filled].tolist() == cosines[filled].tolist()

    manifest = (folder / "manifest.json").stat()
    assert build_neighbors() == folder
    assert (folder / "manifest.json").stat() == manifest
    (folder / "cosines.npy").write_bytes(b"damage")
    assert build_neighbors() == folder
    assert Neighbors.open(folder).positions.tolist() == expected.positions.tolist()


def test_every_reason_is_the_nearest_history_item_and_its_shared_words(
    world: World, open_exact: OpenSearcher
):
    lists = recommend_lists(world.profiles, open_exact, [], None)
    profiles = world.profiles.where("user_id <> 'nobody'").collect()
    histories = {row["user_id"]: column(row["history"], "item_id") for row in profiles}
    checked = 0
    for user, items in lists.items():
        history = histories[user]
        by_item = world.cosines(history)
        for item in items:
            position = world.position(item["item_id"])
            cosines = by_item[position]
            reason = item["because_item_id"]
            assert cosines[history.index(reason)] >= cosines.max() - 2e-6
            color = COLORS[position % 4]
            same_color = color == COLORS[world.position(reason) % 4]
            assert item["because_terms"] == ([color, "thing"] if same_color else ["thing"])
            checked += 1
    assert checked >= K * (USERS - 1)


def test_scann_gives_full_ordered_lists_and_repeats_itself(world: World, open_scann: OpenSearcher):
    effort = Effort(leaves=10, candidates=60)
    assert Searcher.open(world.scann).approximate
    lists = recommend_lists(world.profiles, open_scann, WITHDRAWN, effort)
    assert recommend_lists(world.profiles, open_scann, WITHDRAWN, effort) == lists
    hits = 0
    for user, items in lists.items():
        ids = column(items, "item_id")
        expected = [item for item, _ in world.brute_force(user, WITHDRAWN)]
        assert len(set(ids)) == len(ids) == len(expected)
        assert not {*ids} & {*world.seen[user], *WITHDRAWN}
        order = [(-item["score"], item["item_id"]) for item in items]
        assert order == sorted(order)
        hits += len({*ids} & {*expected})
    assert hits / (K * USERS) > 0.6


@pytest.fixture(scope="module")
def sample(world: World) -> pa.Table:
    with_vector = world.profiles.where("embedding IS NOT NULL")
    return with_vector.select("embedding", "history", "seen").toArrow()


def test_calibration_keeps_the_promised_recall(world: World, sample: pa.Table):
    searcher = Searcher.open(world.scann)
    list_rules = recommend.all_items_except(searcher, WITHDRAWN)
    assert list_rules.eligible(0).sum() == ITEMS - len(WITHDRAWN)
    easy = recommend.calibrate(searcher, sample, list_rules, K, promise=0.5)
    assert easy.effort is not None
    assert 0.5 <= easy.low <= easy.recall <= 1
    assert easy.users == USERS
    hard = recommend.calibrate(searcher, sample, list_rules, K, promise=0.9)
    if hard.effort is not None:
        assert hard.effort.leaves > easy.effort.leaves
        assert hard.low >= 0.9
    other = recommend.calibrate(searcher, sample, list_rules, K, 0.5, MAX_SIMILARITY)
    assert other.effort is not None
    assert other.recall != easy.recall  # it was measured on other lists


def test_search_is_exact_if_no_effort_keeps_the_promise(world: World, sample: pa.Table):
    for folder, promise in ((world.scann, 1.1), (world.exact, 0.9)):
        searcher = Searcher.open(folder)
        list_rules = recommend.all_items_except(searcher, WITHDRAWN)
        assert recommend.calibrate(searcher, sample, list_rules, K, promise).effort is None


CATALOGUE = "ABCDEXZ"


@pytest.fixture(scope="module")
def user_counts(spark: SparkSession) -> DataFrame:
    """Seven users have an event on an item of the catalogue; three of them belong to the club."""
    items_by_user = {
        "a": "ABC",
        "b": "AB",
        "c": "AX",
        "d": "DE",
        "e": "DE",
        "new": "",
        "met": "DX",
        "unsaid": "A",
        "gone": "G",
    }
    events = [
        (user, item, "view", "2025-01-01")
        for user, items in items_by_user.items()
        for item in items * 2
    ]
    users = [(user, "club", None, None, None) for user in ("d", "e", "met", "club")]
    users.append(("unsaid", None, None, None, None))
    return popularity.count_users(
        log(spark, events),
        spark.createDataFrame([(item,) for item in CATALOGUE], "item_id STRING"),
        spark.createDataFrame(users, schemas.USERS.schema),
    ).persist()


def test_users_are_counted_in_their_segment_and_overall(user_counts: DataFrame):
    counts = {
        (row["segment"], row["item_id"]): (row["users"], row["segment_users"])
        for row in user_counts.collect()
    }
    assert counts["", "A"] == (4, 7)
    assert counts["", "D"] == (3, 7)
    assert counts["club", "D"] == (3, 3)
    assert counts["club", "E"] == (2, 3)
    assert ("club", "A") not in counts


def test_shares_of_a_small_segment_are_smoothed(spark: SparkSession, user_counts: DataFrame):
    allowed = spark.createDataFrame([(item,) for item in "ABCDEZ"], "item_id STRING")
    shares = {
        (row["segment"], row["item_id"]): row["share"]
        for row in popularity.popular_items(user_counts, allowed).collect()
    }
    assert shares["", "A"] == pytest.approx(4 / 7)
    assert shares["club", "D"] == pytest.approx((3 + 20 * 3 / 7) / 23)
    assert shares["club", "A"] == pytest.approx((0 + 20 * 4 / 7) / 23)
    assert {segment for segment, _ in shares} == {"", "club"}
    assert {item for _, item in shares} == {*"ABCDE"}


@pytest.fixture
def popularity_scoring(world: World) -> popularity.PopularityScoring:
    searcher = Searcher.open(world.exact)
    table = pa.table(
        {
            "segment": ["", "", "", "club", "club", "club"],
            "item_id": ["i005", "i009", "lost", "i009", "i005", "i007"],
            "share": [0.5, 0.25, 0.9, 0.75, 0.5, 0.25],
        }
    )
    return popularity.PopularityScoring(
        {
            0: popularity.by_position(table, searcher),
            2: popularity.by_position(table.slice(4), searcher),
        }
    )


def test_popular_lists_are_new_to_their_users_and_keep_the_rules(
    spark: SparkSession,
    world: World,
    popularity_scoring: popularity.PopularityScoring,
):
    users = spark.createDataFrame(
        [
            ("all", None, 0, []),
            ("club", "club", 0, ["i009"]),
            ("other", "x", 0, ["i005"]),
            ("ruled", "club", 2, []),
        ],
        "user_id STRING, segment STRING, rules BIGINT, seen ARRAY<STRING>",
    )
    rows = recommend.recommend(
        users,
        partial(Searcher.open, world.exact),
        ListRules(np.full(ITEMS, 3), caps=[Cap(np.zeros(ITEMS, int), 2)]),
        k=3,
        effort=None,
        scoring=popularity_scoring,
    )
    lists = {row["user_id"]: row["items"] for row in rows.collect()}
    for items in lists.values():
        assert set(column(items, "source")) == {"popular"}
        assert set(column(items, "because_item_id")) == {None}
    assert {user: [item[:2] for item in items] for user, items in lists.items()} == {
        "all": [("i005", 0.5), ("i009", 0.25)],
        "club": [("i005", 0.5), ("i007", 0.25)],
        "other": [("i009", 0.25)],
        "ruled": [("i005", 0.5), ("i007", 0.25)],
    }


SCIENTIFIC = Path(__file__).resolve().parents[2] / "shared" / "data" / "scientific"


def read_scientific(name: str) -> list[str]:
    return (SCIENTIFIC / f"Scientific.{name}").read_text().splitlines()


def scientific_searcher(folder: Path) -> Searcher:
    titles = dict(line.split("\t", 1) for line in read_scientific("text")[1:])
    items = sorted(titles)
    texts = [" ".join(titles[item].split()[:40]) for item in items]
    vectors = load_embedder("minilm", "main").embed(texts)
    Searcher.build(
        folder,
        "x",
        items,
        vectors,
        [""] * len(items),
        ann_min_items=16,
    )
    return Searcher.open(folder)


def scientific_histories(positions: dict[str, int]) -> list[list[int]]:
    """The positions of each test user's items."""
    id_of = dict(line.split()[::-1] for line in read_scientific("item2index"))
    lines = read_scientific("test.inter")[1:]
    return [[positions[id_of[item]] for item in line.split("\t")[1].split()] for line in lines]


def profile_rows(
    searcher: Searcher,
    means: np.ndarray,
    histories: list[list[int]],
) -> pa.Table:
    seen = [[searcher.ids[item] for item in sorted({*items})] for items in histories]
    weighted = [[{"item_id": item, "weight": 1.0} for item in items] for items in seen]
    return pa.table(
        {
            "embedding": pa.array(list(means)),
            "history": pa.array(weighted),
            "seen": pa.array(seen),
        }
    )


@pytest.mark.skipif(not SCIENTIFIC.is_dir(), reason=f"no real data at {SCIENTIFIC}")
def test_a_promise_of_98_percent_is_kept_on_real_titles_and_histories(tmp_path):
    """Every user's list against brute force, after calibration on a thousand of them."""
    searcher = scientific_searcher(tmp_path / "x")
    vectors = searcher.vectors
    histories = scientific_histories({item: n for n, item in enumerate(searcher.ids)})
    means = unit(np.stack([vectors[items].mean(axis=0) for items in histories]))
    users = np.random.default_rng(0).permutation(len(histories))[:1_000]
    sample = profile_rows(searcher, means, histories).take(pa.array(users))
    list_rules = ListRules(np.ones(len(searcher), np.int64))
    effort = recommend.calibrate(searcher, sample, list_rules, K, 0.98).effort
    assert effort is not None
    excluded = [np.unique(items) for items in histories]
    eligible = list_rules.eligible(0)
    top = retrieve(
        searcher,
        MeanQuery(means, None),
        excluded,
        eligible,
        K,
        effort,
    ).positions
    scores = means @ vectors.T
    for user, items in enumerate(excluded):
        scores[user, items] = -np.inf
    truth = np.argpartition(-scores, K, axis=1)[:, :K]
    hits = (top[:, :, None] == truth[:, None, :]).any(axis=2)
    assert (top >= 0).all()
    assert hits.mean() >= 0.98
