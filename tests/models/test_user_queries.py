"""Tastes against brute force: exactly, by ScaNN, blended with co-occurrence, and the reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Effort, IndexArrays, Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.top_k import Candidates, flat_exclusions, top_k
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import (
    MaxSimilarityQuery,
    MeanQuery,
    MultiInterestQuery,
    Queries,
    nearest_history_items,
)

ITEMS, DIMENSION, K = 300, 12, 10
NO_MORE = np.zeros(30, np.int64)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    folder, ids = tmp_path_factory.mktemp("index") / "tastes", [f"i{n:03d}" for n in range(ITEMS)]
    vectors = unit(np.random.default_rng(5).standard_normal((ITEMS, DIMENSION)))
    Searcher.build(folder, "tastes", ids, vectors, [""] * ITEMS, ann_min_items=16)
    return Searcher.open(folder)


def bare(ids: str, vectors: np.ndarray) -> Searcher:
    """An item for each letter, without words, searched exactly."""
    words, none = np.empty((len(ids), 0), np.int32), pa.array([], pa.string())
    arrays = IndexArrays(pa.array(list(ids)), vectors, words, none, np.arange(len(ids)))
    return Searcher(Path(), {}, arrays)


def drawn(users: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Histories of up to 20 items, the first of none at all, and weights of which the heaviest is 1."""
    rng = np.random.default_rng(6)
    positions = [
        rng.permutation(ITEMS)[: rng.integers(1, 21) if user else 0].astype(np.int64)
        for user in range(users)
    ]
    weights = [rng.random(len(mine)) + 0.05 for mine in positions]
    return positions, [(mine / mine.max(initial=0.01)).astype(np.float32) for mine in weights]


def lists(found: Candidates, seen: list[np.ndarray]) -> tuple[list, np.ndarray]:
    top, scores = top_k(*found, flat_exclusions(seen, ITEMS), np.ones(ITEMS, bool), K)
    return top.tolist(), scores


def test_an_item_scores_its_highest_weighted_similarity(searcher: Searcher) -> None:
    positions, weights = drawn(30)
    asked = MaxSimilarityQuery(positions, weights)
    top, scores = lists(asked.score_all(searcher), positions)
    for user in range(1, 30):
        history = list(zip(positions[user], weights[user], strict=True))
        similar = [
            max(float(weight * (searcher.vectors[item] @ vector)) for item, weight in history)
            for vector in searcher.vectors
        ]
        best = sorted(
            (-round(one, 6), item)
            for item, one in enumerate(similar)
            if item not in positions[user]
        )[:K]
        np.testing.assert_allclose(scores[user], [-score for score, _ in best], rtol=0, atol=2e-6)
        assert (
            len({*top[user]} & {item for _, item in best}) >= K - 1
        )  # two may be alike to six digits


def test_scann_at_its_hardest_gives_the_exact_lists(searcher: Searcher) -> None:
    positions, weights = drawn(30)
    asked = MaxSimilarityQuery(positions, weights)
    top, scores = lists(asked.score_all(searcher), positions)
    found, approximate = lists(
        asked.search(searcher, Effort(searcher.leaves, ITEMS), NO_MORE), positions
    )
    assert found == top
    assert top[0] == [-1] * K  # no history, no list
    np.testing.assert_allclose(approximate, scores, rtol=0, atol=2e-6)


def test_a_depth_of_k_and_what_is_seen_is_enough(searcher: Searcher) -> None:
    """The right neighbours in the place of ScaNN's, no more of them than the docstring says."""
    positions, weights = drawn(30)
    asked = MaxSimilarityQuery(positions, weights)
    top, _ = lists(asked.score_all(searcher), positions)
    depth = K + max(map(len, positions))

    class Nearest(Searcher):
        def search(self, queries: np.ndarray, effort: Effort) -> Candidates:
            scores = queries @ self.vectors.T
            nearest = np.argsort(-scores, axis=1, kind="stable")[:, : effort.candidates]
            return Candidates(nearest, np.take_along_axis(scores, nearest, 1))

    exact = Nearest.open(searcher.folder)
    found, _ = lists(asked.search(exact, Effort(1, depth), NO_MORE), positions)
    assert found == top
    shallow, _ = lists(asked.search(exact, Effort(1, K // 2), NO_MORE), positions)
    assert shallow != top


def test_one_item_of_weight_one_is_a_mean_of_one(searcher: Searcher) -> None:
    positions = [np.array([item]) for item in range(20)]
    means: Queries = MeanQuery(searcher.vectors[:20], positions)
    histories: Queries = MaxSimilarityQuery(positions, [np.ones(1, np.float32)] * 20)
    for tastes in (means, histories):
        assert len(tastes.take(np.array([3, 5]))) == 2
    assert (
        lists(means.score_all(searcher), positions)[0]
        == lists(histories.score_all(searcher), positions)[0]
    )
    assert means.max_users_per_block(ITEMS) == histories.max_users_per_block(ITEMS)


def test_long_histories_are_scored_fewer_at_a_time() -> None:
    long = MaxSimilarityQuery([np.arange(100)] * 3, [np.ones(100, np.float32)] * 3)
    short = MaxSimilarityQuery([np.arange(1)] * 3, [np.ones(1, np.float32)] * 3)
    assert long.max_users_per_block(10_000) == short.max_users_per_block(10_000) // 100
    assert (
        MaxSimilarityQuery(
            [np.array([], np.int64)], [np.array([], np.float32)]
        ).max_users_per_block(2**30)
        == 1
    )


def test_nearest_names_the_history_item_and_of_equals_the_first(searcher: Searcher) -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [0, 1]], np.float32)
    small = bare("abcde", vectors)
    histories, items = (
        [np.array([1, 0, 4]), np.array([], int), np.array([2])],
        np.array([[2, 3, 1]] * 2 + [[0, -1, 2]]),
    )
    none = [[-1, -1, -1], [2, -1, 2]]
    assert nearest_history_items(histories, None, small, items).tolist() == [[1, 0, 1], *none]
    # A tenth of the weight, and (1, 0) is nearer to all but its opposite.
    weights = [np.array([0.1, 1, 0.1]), np.array([]), np.ones(1)]
    assert nearest_history_items(histories, weights, small, items).tolist() == [[0, 0, 1], *none]


def test_tastes_are_the_means_of_alike_items(searcher: Searcher) -> None:
    """Two bundles of near twins and a loner make three tastes, each as heavy as its heaviest item."""
    rng = np.random.default_rng(9)
    centres = unit(np.eye(3, DIMENSION))
    vectors = unit(
        np.repeat(centres, [3, 2, 1], axis=0) + 0.02 * rng.standard_normal((6, DIMENSION))
    )
    small = bare("abcdef", vectors)
    history, weights = np.array([3, 0, 5, 1, 4, 2]), np.array([0.2, 1.0, 0.4, 0.9, 0.5, 0.1])
    made = MultiInterestQuery.from_histories(
        [history, history[:0]], [weights, weights[:0]], small, 3
    )
    heavy = dict(zip(history.tolist(), weights.tolist(), strict=True))
    groups = [(3, 4), (0, 1, 2), (5,)]  # in the order of their first items
    expected = unit(
        np.stack([sum(heavy[item] * vectors[item] for item in group) for group in groups])
    )
    np.testing.assert_allclose(made._vectors[0], expected, atol=1e-6)
    assert made._weights[0].tolist() == pytest.approx([0.5, 1.0, 0.4])
    positions, scores = made.score_all(small)
    np.testing.assert_allclose(
        scores[0], ((vectors @ expected.T) * [0.5, 1.0, 0.4]).max(axis=1), atol=1e-6
    )
    assert positions[1].tolist() == [-1] * 6
    np.testing.assert_allclose(
        made.take(np.array([0])).scores(small, positions[:1])[0], scores[0], atol=1e-6
    )


def test_as_many_tastes_as_items_are_the_history_itself_and_one_is_the_mean(
    searcher: Searcher,
) -> None:
    positions, weights = drawn(30)
    whole: Queries = MaxSimilarityQuery(positions, weights)
    many: Queries = MultiInterestQuery.from_histories(positions, weights, searcher, 20)
    assert (
        lists(many.score_all(searcher), positions)[0]
        == lists(whole.score_all(searcher), positions)[0]
    )
    found, _ = lists(many.search(searcher, Effort(searcher.leaves, ITEMS), NO_MORE), positions)
    assert found == lists(many.score_all(searcher), positions)[0]
    one = MultiInterestQuery.from_histories(positions[1:], weights[1:], searcher, 1)
    totals = [
        heavy @ searcher.vectors[mine]
        for mine, heavy in zip(positions[1:], weights[1:], strict=True)
    ]
    mean: Queries = MeanQuery(unit(np.stack(totals)), positions[1:])
    assert (
        lists(one.score_all(searcher), positions[1:])[0]
        == lists(mean.score_all(searcher), positions[1:])[0]
    )
    because, by = many.take(np.array([3, 5])).explain(searcher, np.array([[7], [-1]]))
    assert because[0, 0] in positions[3]
    assert (because[1, 0], by.any()) == (-1, False)


# With co-occurrence


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[ItemItemScores, np.ndarray]:
    """Some eight companions of each item but the last ten, and the same as a matrix."""
    rng, dense = np.random.default_rng(7), np.zeros((ITEMS, ITEMS))
    for item in range(ITEMS - 10):
        dense[item, rng.permutation(ITEMS)[: rng.integers(1, 16)]] = rng.random() + 0.01
    first, second = np.nonzero(dense)
    folder = tmp_path_factory.mktemp("together") / "v1"
    ItemItemScores.build(
        folder, "tastes", ITEMS, first, second, dense[first, second].astype(np.float32)
    )
    return ItemItemScores.open(folder), dense


def blended(
    together: ItemItemScores, share: float, users: int = 30
) -> tuple[BlendedQuery, list[np.ndarray], list[np.ndarray]]:
    positions, weights = drawn(users)
    positions[1] = np.arange(ITEMS - 3, ITEMS)  # items without companions
    weights[1] = np.ones(3, np.float32)
    return (
        BlendedQuery(MaxSimilarityQuery(positions, weights), together, share, positions, weights),
        positions,
        weights,
    )


def test_companions_come_back_strongest_first(together: tuple[ItemItemScores, np.ndarray]) -> None:
    found, dense = together
    assert found.positions.shape == found.strengths.shape
    for item in (0, 17, ITEMS - 1):
        there = found.positions[item] >= 0
        near, strong = found.positions[item][there], found.strengths[item][there]
        assert {*near.tolist()} == {*np.flatnonzero(dense[item]).tolist()}
        np.testing.assert_allclose(strong, dense[item][near], rtol=1e-6)
        assert (np.diff(strong) <= 0).all()


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_blend_is_the_sum_of_its_parts(
    searcher: Searcher, together: tuple[ItemItemScores, np.ndarray], share: float
) -> None:
    asked, positions, weights = blended(together[0], share)
    top, scores = lists(asked.score_all(searcher), positions)
    vectors = searcher.vectors.astype(np.float64)
    for user in range(30):
        mine, heavy = positions[user], weights[user].astype(np.float64)
        found = heavy @ together[1][mine] if len(mine) else np.zeros(ITEMS)
        found = found / found.max() if found.any() else found
        content = (vectors @ vectors[mine].T * heavy).max(axis=1) if len(mine) else np.zeros(ITEMS)
        expected = share * found + (1 - share) * content
        out = {*mine.tolist(), *(np.flatnonzero(found == 0).tolist() if share == 1 else ())}
        best = sorted(
            (-round(one, 6), item) for item, one in enumerate(expected) if item not in out
        )
        best = best[:K] if len(mine) else []
        np.testing.assert_allclose(
            scores[user][: len(best)], [-one for one, _ in best], rtol=0, atol=3e-6
        )
        assert top[user][len(best) :] == [-1] * (K - len(best))
    assert top[1] == (
        [-1] * K
        if share == 1
        else lists(MaxSimilarityQuery(positions, weights).score_all(searcher), positions)[0][1]
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_part_of_the_items_is_scored_as_among_all(
    searcher: Searcher, together: tuple[ItemItemScores, np.ndarray], share: float
) -> None:
    """Each list over a seventh of the items, means, histories and blends: best of that part, whatever the others."""
    asked, positions, weights = blended(together[0], share)
    means = MeanQuery(
        unit(np.stack([searcher.vectors[mine].sum(axis=0) + 1e-3 for mine in positions])), positions
    )
    eligible = np.arange(ITEMS) % 7 == 3
    kinds: list[Queries] = [asked] if share else [means, MaxSimilarityQuery(positions, weights)]
    for tastes in kinds:
        whole, all_scores = tastes.score_all(searcher)
        expected = top_k(whole, all_scores, flat_exclusions(positions, ITEMS), eligible, K)
        part = tastes.score_all(searcher, np.flatnonzero(eligible))
        found = top_k(*part, flat_exclusions(positions, ITEMS), eligible, K)
        assert found[0].tolist() == expected[0].tolist()
        np.testing.assert_allclose(found[1], expected[1], atol=2e-6)
        assert (expected[0] >= 0).any()
        for effort in (None, Effort(searcher.leaves, ITEMS)):
            top, _ = retrieve(searcher, tastes, positions, eligible, K, effort)
            assert top.tolist() == expected[0].tolist()
            nothing, _ = retrieve(searcher, tastes, positions, np.zeros(ITEMS, bool), K, effort)
            assert (nothing < 0).all()


def test_a_blend_by_scann_gives_the_exact_lists(
    searcher: Searcher, together: tuple[ItemItemScores, np.ndarray]
) -> None:
    asked, positions, _ = blended(together[0], 0.4)
    top, scores = lists(asked.score_all(searcher), positions)
    found, approximate = lists(
        asked.search(searcher, Effort(searcher.leaves, ITEMS), NO_MORE), positions
    )
    assert found == top
    np.testing.assert_allclose(approximate, scores, rtol=0, atol=2e-6)
    assert lists(asked.take(np.array([4, 9])).score_all(searcher), [positions[4], positions[9]])[
        0
    ] == [top[4], top[9]]


def test_a_blend_says_which_part_spoke_and_for_which_item(
    searcher: Searcher, together: tuple[ItemItemScores, np.ndarray]
) -> None:
    asked, positions, weights = blended(together[0], 0.5)
    top, _ = lists(asked.score_all(searcher), positions)
    spoke = set()
    every_because, every_by = asked.explain(searcher, np.array(top))
    for user in range(2, 30):
        mine = positions[user]
        for item, reason, found in zip(top[user], every_because[user], every_by[user], strict=True):
            speaks = (
                together[1][mine, item]
                if found
                else searcher.vectors[mine] @ searcher.vectors[item]
            )
            adds = weights[user] * speaks
            assert adds[mine.tolist().index(reason)] == pytest.approx(adds.max(), abs=2e-6)
            assert not found or together[1][mine, item].any()
            spoke.add(bool(found))
    assert spoke == {True, False}


def test_damaged_companions_are_refused(tmp_path: Path) -> None:
    one = np.array([0]), np.array([1]), np.array([0.5], np.float32)
    ItemItemScores.build(tmp_path / "x", "v", 2, *one)
    (tmp_path / "x" / "strengths.npy").write_bytes(b"")
    with pytest.raises(
        RunError,
        match=r"The cooccurrence folder .* is damaged: strengths\.npy .* Run the recommend",
    ):
        ItemItemScores.open(tmp_path / "x")
