"""The index artefact: exact and ScaNN against brute force, damage told apart from a good folder, and what recommend
makes of its candidates.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k import Candidates
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import MeanQuery
from vlm4rec_spark.stages.recommend import all_items_except, calibrate

ITEMS, DIMENSION, K = 2_000, 32, 10
IDS = [f"i{number:04d}" for number in range(ITEMS)]
NOBODY = np.empty(0, np.int64)
ALL = ListRules(np.ones(ITEMS, np.int64))


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit vectors around 40 fixed centres, as items of 40 kinds lie."""
    centres = np.random.default_rng(0).standard_normal((40, DIMENSION))
    rng = np.random.default_rng(seed)
    return unit(
        centres[rng.integers(40, size=count)] + 0.4 * rng.standard_normal((count, DIMENSION))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scann") / "v1"
    Searcher.build(path, "v1", IDS, clustered(ITEMS, seed=1), [""] * ITEMS, ann_min_items=16)
    return path


@pytest.fixture(scope="module")
def searcher(folder: Path) -> Searcher:
    return Searcher.open(folder)


def small(path: Path, **changes: object) -> Path:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    given = {
        "ids": ["a", "b", "ç/3"],
        "vectors": vectors,
        "texts": ["", "", ""],
        "ann_min_items": 16,
    } | changes
    Searcher.build(path, "small", **given)
    return path


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(
        np.mean(
            [
                len(set(f) & set(t)) / len(t)
                for f, t in zip(found.tolist(), truth.tolist(), strict=True)
            ]
        )
    )


def brute_force(queries: np.ndarray, k: int = K) -> np.ndarray:
    return np.argsort(-(queries @ clustered(ITEMS, seed=1).T), axis=1, kind="stable")[:, :k]


# Exact


def test_what_was_built_comes_back_from_the_folder(tmp_path: Path) -> None:
    opened = Searcher.open(small(tmp_path / "x"))
    assert (opened.index_id, len(opened), opened.approximate) == ("small", 3, False)
    assert opened.ids.tolist() == ["a", "b", "ç/3"]
    assert isinstance(opened.vectors.base, np.memmap)
    positions, scores = opened.score_all(np.array([[0.8, 0.6]], np.float32))
    assert positions.tolist() == [[0, 1, 2]]
    assert scores.round(6).tolist() == np.array([[0.8, 0.6, 0.96]], np.float32).tolist()


def test_positions_of_unknown_missing_and_repeated_ids(tmp_path: Path) -> None:
    found = Searcher.open(small(tmp_path / "x")).positions(["ç/3", "gone", "a", None, "a", ""])
    assert (found.tolist(), found.dtype) == ([2, -1, 0, -1, 0, -1], np.int64)
    assert Searcher.open(tmp_path / "x").positions([]).tolist() == []


def test_telling_words_are_rarest_first_without_short_and_stop_words(tmp_path: Path) -> None:
    texts = ["A red cup with the handle", "A red hat, RED as it is", "Rouge café no 5 red"]
    opened = Searcher.open(small(tmp_path / "x", texts=texts))
    assert [
        [opened.vocabulary[word].as_py() for word in row if word >= 0]
        for row in opened.words.tolist()
    ] == [["cup", "handle", "red"], ["hat", "red"], ["café", "rouge", "red"]]


@pytest.mark.parametrize(
    "vectors",
    [
        [[1, 0], [0, 0]],
        [[1, 0], [float("nan"), 1]],
        [[1, 0], [float("inf"), 0]],
        [[1, 0], [0, 1.1]],
    ],
    ids=["zero", "nan", "infinite", "unscaled"],
)
def test_bad_vectors_are_refused_and_leave_no_folder(
    tmp_path: Path, vectors: list[list[float]]
) -> None:
    with pytest.raises(
        RunError, match=r"1 of 2 embeddings are not unit vectors \(zero, .* such as that of 'b'\."
    ):
        small(tmp_path / "x", ids=["a", "b"], vectors=np.array(vectors, np.float32), texts=["", ""])
    assert not (tmp_path / "x").exists()


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no item has an embedding"):
        small(tmp_path / "x", ids=[], vectors=np.empty((0, 2), np.float32), texts=[])


# A folder that isn't whole


def rewrite_manifest(path: Path, change: Callable[[dict], dict]) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def tear_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-20])


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is incomplete"),
        (lambda path: (path / "manifest.json").unlink(), "is incomplete"),
        (tear_manifest, "is incomplete"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "is incomplete"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe{}"), "is incomplete"),
        (
            lambda path: rewrite_manifest(path, lambda was: was | {"format": 4}),
            "has format 4; this .* reads 3",
        ),
        (lambda path: (path / "vectors.npy").unlink(), "is damaged: vectors.npy"),
        (lambda path: flip_a_byte(path / "vectors.npy"), "is damaged: vectors.npy"),
        (lambda path: flip_a_byte(path / "ids.parquet"), "is damaged: ids.parquet"),
        (lambda path: (path / "vectors.npy").write_bytes(b""), "is damaged: vectors.npy"),
    ],
    ids=[
        "no folder",
        "no manifest",
        "torn manifest",
        "other json",
        "not text",
        "later format",
        "no vectors",
        "flipped vectors",
        "flipped ids",
        "empty vectors",
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = small(tmp_path / "x")
    damage(path)
    with pytest.raises(RunError, match=f"{message}.* Run the index stage again.$"):
        Searcher.open(path)


def test_damaged_scann_codes_are_refused(tmp_path: Path, folder: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    codes = max((copy / "scann").iterdir(), key=lambda file: file.stat().st_size)
    flip_a_byte(codes)
    with pytest.raises(RunError, match=f"is damaged: scann/{codes.name}"):
        Searcher.open(copy)


def test_a_build_that_dies_in_its_last_write_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(file: Path, text: str) -> None:
        file.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        small(tmp_path / "x")
    assert not (tmp_path / "x" / "manifest.json").exists()


# ScaNN


def test_below_the_size_search_is_exact_and_from_it_on_scann(tmp_path: Path) -> None:
    for count, ann_min_items, approximate in (
        (31, 32, False),
        (32, 32, True),
        (15, 1, False),
        (16, 1, True),
    ):
        path = tmp_path / f"{count}-{ann_min_items}"
        Searcher.build(
            path, "x", IDS[:count], clustered(count, seed=2), [""] * count, ann_min_items
        )
        assert Searcher.open(path).approximate is approximate


def test_all_leaves_find_what_brute_force_finds(searcher: Searcher) -> None:
    queries = clustered(200, seed=3)
    leaves = searcher.leaves
    assert leaves == 45
    found, scores = searcher.search(queries, Effort(leaves, 200))
    top = np.take_along_axis(found, np.argsort(-scores, axis=1)[:, :K], 1)
    assert recall(top, brute_force(queries)) >= 0.99


def test_more_effort_finds_more_and_little_effort_still_much(searcher: Searcher) -> None:
    queries = clustered(200, seed=3)
    shares = []
    for effort in (Effort(1, 20), Effort(4, 100), Effort(22, 200)):
        found, scores = searcher.search(queries, effort)
        order = np.argsort(-np.where(found < 0, -2, scores), axis=1)[:, :K]
        shares.append(recall(np.take_along_axis(found, order, 1), brute_force(queries)))
    assert 0.3 < shares[0] < shares[1] < shares[2]
    assert shares[2] >= 0.97


def test_scores_of_candidates_are_exact_cosines(searcher: Searcher) -> None:
    queries = clustered(20, seed=4)
    found, scores = searcher.search(queries, Effort(10, 50))
    truth = np.take_along_axis(queries @ clustered(ITEMS, seed=1).T, found, 1)
    np.testing.assert_allclose(scores[found >= 0], truth[found >= 0], atol=1e-6)


def test_a_short_answer_is_padded_with_minus_one_and_names_nobody_twice(searcher: Searcher) -> None:
    found, _ = searcher.search(clustered(50, seed=5), Effort(1, 1_500))
    assert found.shape == (50, 1_500)
    assert (found == -1).any(axis=1).all()
    for row in found.tolist():
        named = [position for position in row if position >= 0]
        assert len(named) == len(set(named)) > 0


def test_nobody_asks_and_nothing_is_found(searcher: Searcher) -> None:
    found, scores = searcher.search(clustered(1, seed=6)[:0], Effort(2, 30))
    assert found.shape == scores.shape == (0, 30)


def test_more_candidates_than_items_are_all_items(searcher: Searcher) -> None:
    found, _ = searcher.search(clustered(2, seed=6), Effort(45, 9_999))
    assert [sorted(row) for row in found.tolist()] == [list(range(ITEMS))] * 2


def means(queries: np.ndarray) -> MeanQuery:
    return MeanQuery(queries, [NOBODY] * len(queries))


def test_identical_items_are_all_found_smaller_id_first(tmp_path: Path) -> None:
    vectors = np.repeat(clustered(100, seed=7), 10, axis=0)
    Searcher.build(tmp_path / "x", "x", IDS[:1_000], vectors, [""] * 1_000, ann_min_items=16)
    opened = Searcher.open(tmp_path / "x")
    for effort in (None, Effort(opened.leaves, 150)):
        top, _ = retrieve(
            opened, means(vectors[[0, 500]]), [NOBODY] * 2, np.ones(1_000, bool), 10, effort
        )
        assert top.tolist() == [list(range(10)), list(range(500, 510))]


def shaped(shape: str, count: int) -> np.ndarray:
    """Unit vectors that a search may find hard to tell apart, or to divide."""
    rng, few = np.random.default_rng(17), clustered(7, seed=17)
    if shape == "clustered":
        return clustered(count, seed=17)
    if shape == "equal":
        return np.repeat(few[:1], count, axis=0)
    if shape == "duplicated":
        return few[rng.integers(7, size=count)]
    # Nineteen of twenty lie together.
    near = few[0] + 0.02 * rng.standard_normal((count, DIMENSION))
    return unit(
        np.where(rng.random((count, 1)) < 0.95, near, rng.standard_normal((count, DIMENSION)))
    )


@pytest.mark.parametrize("count", [1, 15, 16, 1_000])
@pytest.mark.parametrize("shape", ["clustered", "equal", "duplicated", "skewed"])
def test_every_query_is_answered_whatever_the_catalogue_is_like(
    tmp_path: Path, shape: str, count: int
) -> None:
    vectors, all_of_it = shaped(shape, count), np.ones(count, bool)
    Searcher.build(tmp_path / "x", "x", IDS[:count], vectors, [""] * count, ann_min_items=1)
    opened = Searcher.open(tmp_path / "x")
    assert opened.approximate is (count >= 16)
    queries = np.concatenate([clustered(20, seed=18), vectors[:10]])
    cosines = np.round(queries.astype(np.float64) @ vectors.astype(np.float64).T, 6)
    truth = np.argsort(-cosines, axis=1, kind="stable")[:, :K]

    def lists(effort: Effort | None) -> np.ndarray:
        top, _ = retrieve(opened, means(queries), [NOBODY] * len(queries), all_of_it, K, effort)
        assert (top[:, : len(truth[0])] >= 0).all()
        assert (top[:, len(truth[0]) :] == -1).all()
        return top[:, : len(truth[0])]

    assert lists(None).tolist() == truth.tolist()
    if opened.approximate:
        leaves = opened.leaves
        assert lists(Effort(leaves, count)).tolist() == truth.tolist()
        # Of what lies close together ScaNN's codes tell little apart, even in all leaves.
        assert recall(lists(Effort(leaves, 16 * K)), truth) >= (0.7 if shape == "skewed" else 0.99)
        assert all(len(set(row)) == len(row) for row in lists(Effort(1, K)).tolist())


@pytest.mark.parametrize("effort", [None, Effort(45, 100)], ids=["exact", "scann"])
def test_a_query_that_can_not_be_answered_is_named(
    searcher: Searcher, effort: Effort | None
) -> None:
    def ask(query: np.ndarray) -> np.ndarray:
        queries = np.stack([clustered(1, seed=19)[0, : len(query)], query])
        return retrieve(searcher, means(queries), [NOBODY] * 2, np.ones(ITEMS, bool), K, effort)[0]

    with pytest.raises(RunError, match="The query vectors have 31 dimensions, the index has 32"):
        ask(np.ones(31, np.float32))
    for wrong in (np.nan, np.inf):
        with pytest.raises(RunError, match="NaN or infinite"):
            ask(np.append(np.ones(31, np.float32), np.float32(wrong)))
    # All items are as far from nothing: the other query's list isn't harmed.
    answered = ask(np.zeros(32, np.float32))
    assert recall(answered[:1], brute_force(clustered(1, seed=19))) >= 0.9
    assert len(set(answered[1].tolist())) == K
    assert effort is not None or answered[1].tolist() == list(range(K))


# What recommend makes of the candidates


def test_lists_reach_k_whatever_a_user_has_seen(searcher: Searcher) -> None:
    rng = np.random.default_rng(8)
    queries = clustered(60, seed=8)
    # Everything near, everything but 4 and but 12 items, and unknown items besides.
    near = [np.append(row, -1) for row in brute_force(queries[:40], 400)]
    left = [np.sort(rng.permutation(ITEMS)[:count]) for count in [4] * 10 + [12] * 10]
    excluded = near + [np.setdiff1d(np.arange(ITEMS), items) for items in left]
    top, scores = retrieve(
        searcher, means(queries), excluded, np.ones(ITEMS, bool), K, Effort(1, 100)
    )
    assert (top[:40] >= 0).all()
    assert [np.isin(row[row >= 0], out).any() for row, out in zip(top, excluded, strict=True)] == [
        False
    ] * 60
    assert [sorted(row[row >= 0]) for row in top[40:50]] == [items.tolist() for items in left[:10]]
    assert ((top[50:] >= 0).sum(axis=1) == 10).all()
    assert (np.isnan(scores) == (top < 0)).all()


def test_withdrawn_items_are_never_recommended(searcher: Searcher) -> None:
    queries = clustered(30, seed=9)
    withdrawn = np.unique(brute_force(queries, 50))
    eligible = all_items_except(searcher, [IDS[item] for item in withdrawn] + ["gone"]).eligible(0)
    assert int(eligible.sum()) == ITEMS - len(withdrawn)
    top, _ = retrieve(searcher, means(queries), [NOBODY] * 30, eligible, K, Effort(1, 100))
    assert (top >= 0).all()
    assert not np.isin(top, withdrawn).any()


def test_exact_lists_do_not_depend_on_the_block(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, everything = clustered(50, seed=10), np.ones(ITEMS, bool)
    excluded = [np.arange(user) for user in range(50)]
    top, scores = retrieve(searcher, means(queries), excluded, everything, K, None)
    monkeypatch.setattr("vlm4rec_spark.models.ranking.user_queries._BLOCK_SCORES", 7 * ITEMS)
    again, scores_again = retrieve(searcher, means(queries), excluded, everything, K, None)
    assert (again.tolist(), scores_again.tolist()) == (top.tolist(), scores.tolist())


def test_the_last_digits_of_a_float32_score_decide_nothing(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, everything = clustered(50, seed=10), np.ones(ITEMS, bool)
    exact = [retrieve(searcher, means(queries), [NOBODY] * 50, everything, K, None)]
    asked = Searcher.score_all
    noise = np.random.default_rng(1)

    def blurred(self: Searcher, queries: np.ndarray, subset: np.ndarray | None) -> Candidates:
        positions, scores = asked(self, queries, subset)
        error = noise.uniform(-4e-7, 4e-7, scores.shape).astype(np.float32)
        return Candidates(positions, scores + error)

    monkeypatch.setattr(Searcher, "score_all", blurred)
    exact.append(retrieve(searcher, means(queries), [NOBODY] * 50, everything, K, None))
    assert exact[0][0].tolist() == exact[1][0].tolist()
    assert exact[0][1].tolist() == exact[1][1].tolist()


def test_a_list_does_not_depend_on_who_is_asked_for_beside(searcher: Searcher) -> None:
    """Else recall would hang on how users were divided, and the calibration's sample would tell of its own only."""
    queries, everything = clustered(200, seed=16), np.ones(ITEMS, bool)
    near = brute_force(queries, 400)
    few, many = (
        [row[:3] for row in near],
        [row[: 3 if user < 100 else 400] for user, row in enumerate(near)],
    )
    lists = [
        retrieve(searcher, means(queries), excluded, everything, K, Effort(2, K))[0][:100]
        for excluded in (few, many)
    ]
    # ScaNN's own scores have ties, of which one or the other is among the first so many.
    same = (lists[0] == lists[1]).all(axis=1)
    assert same.mean() > 0.9
    assert (
        recall(lists[0], brute_force(queries[:100], K + 3)[:, 3:]) < 0.95
    )  # more candidates would have found more


def sample(queries: np.ndarray, seen: list[list[str]]) -> pa.Table:
    history = pa.array(
        [[]] * len(queries), pa.list_(pa.struct({"item_id": pa.string(), "weight": pa.float64()}))
    )
    embedding = pa.array(queries.tolist(), pa.list_(pa.float32()))
    return pa.table(
        {"embedding": embedding, "history": history, "seen": pa.array(seen, pa.list_(pa.string()))}
    )


@pytest.mark.parametrize("promise", [0.6, 0.95])
def test_calibration_holds_its_promise_on_other_users(searcher: Searcher, promise: float) -> None:
    everything = np.ones(ITEMS, bool)
    seen = [[IDS[item] for item in row] for row in brute_force(clustered(150, seed=11), 5)]
    found = calibrate(searcher, sample(clustered(150, seed=11), seen), ALL, K, promise)
    assert found.effort is not None
    assert (found.users, promise <= found.low <= found.recall <= 1) == (150, True)
    queries = clustered(150, seed=12)
    top, _ = retrieve(searcher, means(queries), [NOBODY] * 150, everything, K, found.effort)
    assert recall(top, brute_force(queries)) >= promise - 0.03


def test_calibration_takes_the_cheapest_effort_that_is_enough(searcher: Searcher) -> None:
    table = sample(clustered(200, seed=13), [[]] * 200)
    low, high = (calibrate(searcher, table, ALL, K, promise).effort for promise in (0.1, 0.95))
    assert low == Effort(1, K)
    assert high is not None
    assert high.cost(searcher) > low.cost(searcher)


def test_a_damaged_index_is_built_again_and_a_sound_one_left_alone(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32()))
    columns = {
        "item_id": ["a", "b"],
        "embedding": vectors,
        "content_sha256": ["-", "-"],
        "text": ["", ""],
    }
    rows = pa.table(columns)
    folder = build_index(rows, "title", "test", tmp_path, 16)
    before = (folder / "vectors.npy").stat().st_mtime_ns
    assert build_index(rows, "title", "test", tmp_path, 16) == folder
    assert (folder / "vectors.npy").stat().st_mtime_ns == before
    (folder / "vectors.npy").write_bytes(b"damage")
    assert build_index(rows, "title", "test", tmp_path, 16) == folder
    assert Searcher.open(folder).vectors.tolist() == [[1, 0], [0, 1]]


def test_a_promise_that_no_effort_holds_means_exact_search(tmp_path: Path) -> None:
    noise = unit(np.random.default_rng(14).standard_normal((72, DIMENSION)))
    Searcher.build(tmp_path / "x", "x", IDS[:32], noise[:32], [""] * 32, ann_min_items=16)
    found = calibrate(
        Searcher.open(tmp_path / "x"),
        sample(noise[32:], [[]] * 40),
        ListRules(np.ones(32, int)),
        3,
        1.0,
    )
    assert (found.effort, found.recall, found.describe(6)) == (None, 1.0, "exact")


def test_nothing_to_calibrate_means_exact_search(tmp_path: Path, searcher: Searcher) -> None:
    assert calibrate(searcher, sample(clustered(0, seed=15), []), ALL, K, 0.9).effort is None
    withdrawn = np.zeros(ITEMS, int)
    assert (
        calibrate(
            searcher, sample(clustered(3, seed=15), [[]] * 3), ListRules(withdrawn), K, 0.9
        ).effort
        is None
    )
    exact = Searcher.open(small(tmp_path / "x"))
    queries = np.array([[1, 0]], np.float32)
    assert (
        calibrate(exact, sample(queries, [[]]), ListRules(np.ones(3, np.int64)), K, 0.9).effort
        is None
    )
