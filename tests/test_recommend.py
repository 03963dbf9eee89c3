"""Recommend: exact search equals brute force, ScaNN keeps the promises, reasons are the nearest history items."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from vlm4rec_spark.models.encoding.text_encoder import load_embedder
from vlm4rec_spark.models.index import neighbors
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.neighbors import Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.history import HISTORY
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import MeanQuery
from vlm4rec_spark.spark import neighbors_file
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import popularity, recommend
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

ITEMS, USERS, DIMENSION, K = 400, 60, 16, 10
WITHDRAWN = [f"i{n:03d}" for n in range(0, ITEMS - 1, 7)]
COLOURS = ("red", "green", "blue", "black")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@dataclass
class World:
    """Random items (the last two alike) and users, as numpy has them and as Spark does."""

    ids: list[str]
    vectors: np.ndarray
    seen: dict[str, list[str]]
    queries: dict[str, np.ndarray]
    profiles: DataFrame
    exact: Path
    scann: Path

    def brute_force(self, user: str, withdrawn: list[str]) -> list[tuple[str, float]]:
        out = {*self.seen[user], *withdrawn}
        scores = self.vectors @ self.queries[user]
        best = sorted(
            (-round(float(score), 6), item)
            for item, score in zip(self.ids, scores, strict=True)
            if item not in out
        )
        return [(item, -score) for score, item in best[:K]]


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    rng = np.random.default_rng(11)
    ids = [f"i{n:03d}" for n in range(ITEMS)]
    vectors = unit(rng.standard_normal((ITEMS, DIMENSION)))
    vectors[-1] = vectors[-2]
    table = pa.table(
        {
            "item_id": ids,
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
            "content_sha256": ["-"] * ITEMS,
            "text": [f"A {COLOURS[n % 4]} thing, nr{n}." for n in range(ITEMS)],
        }
    )
    folder = tmp_path_factory.mktemp("index")
    rows, seen, queries = [], {}, {}
    for n in range(USERS):
        user = f"u{n:02d}"
        # u00 has seen all but three items; u01 is drawn to the two items that are alike.
        history = [ids[i] for i in rng.permutation(ITEMS)[: ITEMS - 3 if n == 0 else 1 + n % 40]]
        history = ids[100:102] if n == 1 else history
        query = vectors[-1] if n == 1 else unit(rng.standard_normal(DIMENSION))
        seen[user], queries[user] = sorted(history), query
        rows.append(
            (
                user,
                "caption",
                [(item, 1.0) for item in history[:5]],
                seen[user],
                query.tolist(),
                1,
                datetime(2025, 1, 1),
            )
        )
    rows.append(("nobody", "caption", [("gone", 1.0)], ["gone"], None, 1, datetime(2025, 1, 1)))
    profiles = spark.createDataFrame(rows, schemas.PROFILES.schema).repartition(3).persist()
    exact = build_index(table, "caption", "test", folder, ann_min_items=10**6)
    return World(
        ids,
        vectors,
        seen,
        queries,
        profiles,
        exact,
        build_index(table, "caption", "test", folder, 16),
    )


def lists(
    world: World, opener: Callable[[], Searcher], withdrawn: list[str], effort: Effort | None
) -> dict[str, list[dict]]:
    offer = recommend.without(opener(), withdrawn)
    rows = recommend.recommend(world.profiles, opener, offer, K, effort).collect()
    return {row["user_id"]: [item.asDict() for item in row["items"]] for row in rows}


def test_exact_search_equals_brute_force(spark: SparkSession, world: World) -> None:
    found = lists(world, ship(spark, world.exact, 1.0, Searcher.open), WITHDRAWN, None)
    assert set(found) == set(world.queries)  # a profile without a vector gets no list
    for user, items in found.items():
        expected = world.brute_force(user, WITHDRAWN)
        assert [item["item_id"] for item in items] == [item for item, _ in expected]
        assert [item["score"] for item in items] == pytest.approx(
            [score for _, score in expected], abs=2e-6
        )
    assert len(found["u00"]) <= 3
    assert {len(items) for user, items in found.items() if user != "u00"} == {K}
    # Equal scores: the smaller id first.
    assert [item["item_id"] for item in found["u01"]][:2] == ["i398", "i399"]


def test_max_similarity_equals_brute_force_and_says_which_item_it_was(
    spark: SparkSession, world: World
) -> None:
    place = {item: n for n, item in enumerate(world.ids)}
    weights = {f"u{n:02d}": [0.9**later * 3.0 for later in range(5)] for n in range(USERS)}
    weighted = [
        (
            row["user_id"],
            row["representation"],
            [
                (item["item_id"], weight)
                for item, weight in zip(
                    row["history"], weights.get(row["user_id"], [1.0]), strict=False
                )
            ],
            row["seen"],
            row["embedding"],
            row["events"],
            row["last_event_at"],
        )
        for row in world.profiles.collect()
    ]
    profiles = spark.createDataFrame(weighted, schemas.PROFILES.schema)
    opener = ship(spark, world.exact, 1.0, Searcher.open)
    offer, matching = recommend.without(opener(), WITHDRAWN), recommend.Matching("max_similarity")
    rows = recommend.recommend(profiles, opener, offer, K, None, matching).collect()
    found = {row["user_id"]: row["items"] for row in rows}
    assert set(found) == set(world.queries)
    for user, _, history, seen, *_ in weighted:
        if user not in found:
            continue
        mine = world.vectors[[place[item] for item, _ in history]]
        similar = (world.vectors @ mine.T) * [weight / 3.0 for _, weight in history]
        out = {*seen, *WITHDRAWN}
        best = sorted(
            (-round(float(row.max()), 6), item)
            for row, item in zip(similar, world.ids, strict=True)
            if item not in out
        )[:K]
        assert [item["score"] for item in found[user]] == pytest.approx(
            [-score for score, _ in best], abs=2e-6
        )
        for item in found[user]:
            row = similar[place[item["item_id"]]]
            reason = [name for name, _ in history].index(item["because_item_id"])
            assert row[reason] == pytest.approx(row.max(), abs=2e-6)


def test_neighbours_searched_once_give_the_lists_of_searching(
    spark: SparkSession, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 96 items and one Spark job for every two of them; deep enough for most users, not for u00."""
    monkeypatch.setattr(neighbors_file, "_BLOCK_ITEMS", 96)
    effort, searcher = Effort(4, 20), Searcher.open(world.scann)
    seen = pa.table(
        {"seen": list(world.seen.values()), "history": [items[:5] for items in world.seen.values()]}
    )
    depth = neighbors.needed_depth(effort.candidates, seen, ITEMS)
    assert (
        depth == 64
    )  # 20 candidates and the 37 items that nine of ten users haven't seen more than
    assert neighbors.needed_depth(effort.candidates, seen, 50) == 50
    assert neighbors.pays_off(seen, 100, ITEMS)
    assert not neighbors.pays_off(seen, USERS, ITEMS)
    monkeypatch.setattr(neighbors_file, "_DRIVER_BYTES", 2 * 96 * 8 * depth)
    opener = ship(spark, world.scann, 1.0, Searcher.open)
    (tmp_path / "old").mkdir()
    os.utime(tmp_path / "old", (time.time() - 90_000,) * 2)
    folder = neighbors_file.build(spark, searcher, opener, Effort(effort.leaves, depth), tmp_path)
    assert list(tmp_path.iterdir()) == [folder]

    found = Neighbors.open(folder)
    positions, cosines = searcher.search(searcher.vectors, Effort(effort.leaves, depth))
    assert found.positions.tolist() == positions.tolist()
    there = positions >= 0
    assert not there.all()
    assert found.cosines[there].tolist() == cosines.astype(np.float32)[there].tolist()
    opens = ship(spark, folder, 1.0, Neighbors.open)
    profiles, offer = world.profiles.repartition(1), recommend.without(searcher, WITHDRAWN)
    with_it, without = (
        recommend.recommend(profiles, opener, offer, K, effort, matching).collect()
        for matching in (
            recommend.Matching("max_similarity", neighbors=opens),
            recommend.Matching("max_similarity"),
        )
    )
    assert len(with_it) == USERS
    assert with_it == without

    # A sound folder is left as it is, a damaged one made again.
    manifest = (folder / "manifest.json").stat()
    assert (
        neighbors_file.build(spark, searcher, opener, Effort(effort.leaves, depth), tmp_path)
        == folder
    )
    assert (folder / "manifest.json").stat() == manifest
    (folder / "cosines.npy").write_bytes(b"damage")
    assert (
        neighbors_file.build(spark, searcher, opener, Effort(effort.leaves, depth), tmp_path)
        == folder
    )
    assert Neighbors.open(folder).positions.tolist() == positions.tolist()


def test_every_reason_is_the_nearest_history_item_and_its_shared_words(
    spark: SparkSession, world: World
) -> None:
    found = lists(world, ship(spark, world.exact, 1.0, Searcher.open), [], None)
    place = {item: n for n, item in enumerate(world.ids)}
    history = {
        row["user_id"]: [item["item_id"] for item in row["history"]]
        for row in world.profiles.collect()
    }
    checked = 0
    for user, items in found.items():
        for item in items:
            similar = (
                world.vectors[[place[h] for h in history[user]]]
                @ world.vectors[place[item["item_id"]]]
            )
            reason = item["because_item_id"]
            assert similar[history[user].index(reason)] >= similar.max() - 2e-6
            colours = COLOURS[place[item["item_id"]] % 4], COLOURS[place[reason] % 4]
            assert item["because_terms"] == (
                [colours[0], "thing"] if colours[0] == colours[1] else ["thing"]
            )
            checked += 1
    assert checked >= K * (USERS - 1)


def test_scann_keeps_the_promises_and_repeats_itself(spark: SparkSession, world: World) -> None:
    opener = ship(spark, world.scann, 1.0, Searcher.open)
    assert Searcher.open(world.scann).approximate
    found = lists(world, opener, WITHDRAWN, Effort(leaves=10, candidates=60))
    assert lists(world, opener, WITHDRAWN, Effort(leaves=10, candidates=60)) == found
    hits = 0
    for user, items in found.items():
        names, scores = [item["item_id"] for item in items], [item["score"] for item in items]
        expected = [item for item, _ in world.brute_force(user, WITHDRAWN)]
        assert len(set(names)) == len(names) == len(expected)
        assert not {*names} & {*world.seen[user], *WITHDRAWN}
        assert sorted(
            zip(scores, names, strict=True), key=lambda pair: (-pair[0], pair[1])
        ) == list(zip(scores, names, strict=True))
        hits += len({*names} & {*expected})
    assert hits / (K * USERS) > 0.6


def test_calibration_measures_what_it_says(world: World) -> None:
    searcher = Searcher.open(world.scann)
    sample = (
        world.profiles.where("embedding IS NOT NULL")
        .select("embedding", "history", "seen")
        .toArrow()
    )
    offer = recommend.without(searcher, WITHDRAWN)
    assert offer.eligible(0).sum() == ITEMS - len(WITHDRAWN)
    easy = recommend.calibrate(searcher, sample, offer, K, promise=0.5)
    assert easy.effort is not None
    assert 0.5 <= easy.low <= easy.recall <= 1
    assert easy.users == USERS
    hard = recommend.calibrate(searcher, sample, offer, K, promise=0.9)
    assert hard.effort is None or (hard.effort.leaves > easy.effort.leaves and hard.low >= 0.9)
    # No promise above what approximate search gave: exact it is.
    assert recommend.calibrate(searcher, sample, offer, K, promise=1.1).effort is None
    assert (
        recommend.calibrate(Searcher.open(world.exact), sample, offer, K, promise=0.9).effort
        is None
    )
    other = recommend.calibrate(
        searcher, sample, offer, K, 0.5, recommend.Matching("max_similarity")
    )
    assert other.effort is not None
    assert other.recall != easy.recall  # it was measured on these lists and not on those


def test_what_is_popular_in_a_segment_leans_on_all_where_the_segment_is_small(
    spark: SparkSession,
) -> None:
    met = {
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
        (f"{user}{item}", user, item, "view", datetime(2025, 1, 1), datetime(2025, 1, 1).date())
        for user, items in met.items()
        for item in items * 2
    ]
    log = spark.createDataFrame(events, schemas.INTERACTIONS.schema)
    items = spark.createDataFrame([(item,) for item in "ABCDEXZ"], "item_id STRING")
    users = spark.createDataFrame(
        [(user, "club", None, None, None) for user in ("d", "e", "met", "club")]
        + [("unsaid", None, None, None, None)],
        schemas.USERS.schema,
    )
    counted = popularity.counts(log, items, users).persist()
    rows = {
        (row["segment"], row["item_id"]): (row["users"], row["of"]) for row in counted.collect()
    }
    # Seven users have met something that there is: four of them A, three D; three are of the club.
    assert rows["", "A"] == (4, 7)
    assert rows["", "D"] == (3, 7)
    assert rows["club", "D"] == (3, 3)
    assert rows["club", "E"] == (2, 3)
    assert ("club", "A") not in rows
    offered = items.where("item_id <> 'X'")
    best = {
        (row["segment"], row["item_id"]): row["share"]
        for row in popularity.best(counted, offered).collect()
    }
    assert best["", "A"] == pytest.approx(4 / 7)
    assert best["club", "D"] == pytest.approx((3 + 20 * 3 / 7) / 23)
    assert best["club", "A"] == pytest.approx((0 + 20 * 4 / 7) / 23)
    assert {segment for segment, _ in best} == {"", "club"}
    assert {item for _, item in best} == {*"ABCDE"}


def test_popular_lists_are_new_to_their_users_and_keep_the_rules(
    spark: SparkSession, world: World
) -> None:
    searcher = Searcher.open(world.exact)
    table = pa.table(
        {
            "segment": ["", "", "", "club", "club", "club"],
            "item_id": ["i005", "i009", "lost", "i009", "i005", "i007"],
            "share": [0.5, 0.25, 0.9, 0.75, 0.5, 0.25],
        }
    )
    placed = popularity.placed(table, 0, searcher) | popularity.placed(table.slice(4), 2, searcher)
    waiting = spark.createDataFrame(
        [
            ("all", None, 0, []),
            ("club", "club", 0, ["i009"]),
            ("other", "x", 0, ["i005"]),
            ("ruled", "club", 2, []),
        ],
        "user_id STRING, segment STRING, rules BIGINT, seen ARRAY<STRING>",
    )
    offer, opener = (
        ListRules(np.full(ITEMS, 3), caps=[(np.zeros(ITEMS, int), 2)]),
        partial(Searcher.open, world.exact),
    )
    rows = recommend.recommend(
        waiting, opener, offer, 3, None, popularity.ByPopularity(placed)
    ).collect()
    assert {
        row["user_id"]: [(item["item_id"], item["score"]) for item in row["items"]] for row in rows
    } == {
        "all": [("i005", 0.5), ("i009", 0.25)],
        "club": [("i005", 0.5), ("i007", 0.25)],
        "other": [("i009", 0.25)],
        "ruled": [("i005", 0.5), ("i007", 0.25)],
    }
    items = [item for row in rows for item in row["items"]]
    assert {(item["source"], item["because_item_id"]) for item in items} == {("popular", None)}


SCIENTIFIC = Path(__file__).resolve().parents[2] / "shared" / "data" / "scientific"


@pytest.mark.skipif(not SCIENTIFIC.is_dir(), reason=f"no real data at {SCIENTIFIC}")
def test_a_promise_of_98_percent_is_kept_on_real_titles_and_histories(tmp_path: Path) -> None:
    """Everybody's list against brute force, where a thousand users were calibrated on."""
    rows = dict(
        line.split("\t", 1) for line in (SCIENTIFIC / "Scientific.text").read_text().splitlines()
    )
    rows.pop("item_id:token")
    place = {item: n for n, item in enumerate(sorted(rows))}
    vectors = load_embedder("minilm", "main").embed(
        [" ".join(rows[item].split()[:40]) for item in place]
    )
    Searcher.build(tmp_path / "x", "x", list(place), vectors, [""] * len(place), 16)
    searcher = Searcher.open(tmp_path / "x")
    index_of = dict(
        line.split()[::-1]
        for line in (SCIENTIFIC / "Scientific.item2index").read_text().splitlines()
    )
    lines = (SCIENTIFIC / "Scientific.test.inter").read_text().splitlines()[1:]
    met = [[place[index_of[item]] for item in line.split("\t")[1].split()] for line in lines]
    means = unit(np.stack([vectors[items].mean(axis=0) for items in met]))
    names = [[searcher.ids[item] for item in sorted({*items})] for items in met]
    history = pa.array(
        [[{"item_id": name, "weight": 1.0} for name in each] for each in names], HISTORY
    )
    everybody = pa.table(
        {"embedding": pa.array(list(means)), "history": history, "seen": pa.array(names)}
    )
    chosen = np.random.default_rng(0).permutation(len(met))
    sample = everybody.take(pa.array(chosen[:1_000]))
    measured = recommend.calibrate(
        searcher, sample, ListRules(np.ones(len(place), np.int64)), K, 0.98
    )
    assert measured.effort is not None
    excluded = [np.unique(items) for items in met]
    found, _ = retrieve(
        searcher, MeanQuery(means, None), excluded, np.ones(len(place), bool), K, measured.effort
    )
    scores = means @ vectors.T
    for user, items in enumerate(excluded):
        scores[user, items] = -np.inf
    truth = np.argpartition(-scores, K, axis=1)[:, :K]
    both = zip(found.tolist(), truth.tolist(), strict=True)
    recall = np.mean([len({*mine} & {*theirs}) / K for mine, theirs in both])
    assert (found >= 0).all()
    assert recall >= 0.98
