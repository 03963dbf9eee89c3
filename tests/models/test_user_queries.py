"""Queries against brute force: exact, by ScaNN, blended with item-item scores; and the reasons."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_allclose
from small_indexes import Histories, build_index, random_histories, unit

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.top_k import Candidates, flat_exclusions, top_k
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import (
    MaxSimilarityQuery,
    MeanQuery,
    MultiTasteQuery,
    Queries,
    explain_by_content,
)

ITEMS = 300
DIMENSION = 12
USERS = 30
K = 10
ALL_ELIGIBLE = np.ones(ITEMS, bool)
EMPTY_LIST = [-1] * K


@pytest.fixture(scope="module")
def searcher(tmp_path_factory) -> Searcher:
    vectors = unit(np.random.default_rng(5).standard_normal((ITEMS, DIMENSION)))
    return build_index(tmp_path_factory.mktemp("index") / "x", vectors)


@pytest.fixture(scope="module")
def hardest(searcher: Searcher) -> Effort:
    """The effort that misses nothing."""
    return Effort(searcher.leaf_count, ITEMS)


@pytest.fixture
def histories() -> Histories:
    return random_histories(ITEMS, USERS)


@pytest.fixture
def queries(histories: Histories) -> MaxSimilarityQuery:
    return MaxSimilarityQuery(*histories)


def lists(candidates: Candidates, seen: list[np.ndarray]) -> list[list[int]]:
    return ranked(candidates, seen).positions.tolist()


def ranked(candidates: Candidates, seen: list[np.ndarray]) -> Candidates:
    return top_k(*candidates, flat_exclusions(seen, ITEMS), ALL_ELIGIBLE, K)


def search(
    queries: Queries,
    searcher: Searcher,
    effort: Effort,
) -> Candidates:
    depths = np.full(len(queries), effort.candidates)
    return queries.search(searcher, effort.leaves, depths)


def best_unseen(scores: np.ndarray, seen: np.ndarray) -> tuple[list[float], list[int]]:
    """The K highest scores and their items, ties by position."""
    pairs = [(-round(float(score), 6), item) for item, score in enumerate(scores)]
    best = sorted(pair for pair in pairs if pair[1] not in seen)[:K]
    return [-score for score, _ in best], [item for _, item in best]


def test_an_item_scores_its_highest_weighted_similarity(searcher, histories, queries):
    top = ranked(queries.score_all(searcher), histories.positions)
    assert top.positions[0].tolist() == EMPTY_LIST  # no history, no list
    for user in range(1, USERS):
        history = histories.positions[user]
        cosines = searcher.vectors @ searcher.vectors[history].T
        scores = (cosines * histories.weights[user]).max(axis=1)
        expected_scores, expected_items = best_unseen(scores, history)
        assert_allclose(top.scores[user], expected_scores, rtol=0, atol=2e-6)
        # Two items may have equal scores up to six digits.
        assert len({*top.positions[user].tolist()} & {*expected_items}) >= K - 1


class NearestSearcher(Searcher):
    """Finds the right neighbors instead of ScaNN's."""

    def search(
        self,
        queries: np.ndarray,
        effort: Effort,
    ) -> Candidates:
        scores = queries @ self.vectors.T
        nearest = np.argsort(-scores, axis=1, kind="stable")[:, : effort.candidates]
        return Candidates(nearest, np.take_along_axis(scores, nearest, 1))


def test_k_candidates_and_the_exclusions_are_enough(searcher, histories, queries):
    exact = lists(queries.score_all(searcher), histories.positions)
    nearest = NearestSearcher.open(searcher.folder)
    enough = Effort(1, K + max(map(len, histories.positions)))
    too_few = Effort(1, K // 2)
    assert lists(search(queries, nearest, enough), histories.positions) == exact
    assert lists(search(queries, nearest, too_few), histories.positions) != exact


def test_one_item_of_weight_one_is_a_mean_of_one(searcher):
    positions = [np.array([item]) for item in range(20)]
    means: Queries = MeanQuery(searcher.vectors[:20], positions)
    single: Queries = MaxSimilarityQuery(positions, [np.ones(1, np.float32)] * 20)
    for queries in (means, single):
        assert len(queries.take(np.array([3, 5]))) == 2
    mean_lists = lists(means.score_all(searcher), positions)
    assert mean_lists == lists(single.score_all(searcher), positions)
    assert means.max_users_per_block(ITEMS) == single.max_users_per_block(ITEMS)


def test_long_histories_are_scored_fewer_at_a_time():
    def users_per_block(length: int, items: int) -> int:
        weights = np.ones(length, np.float32)
        return MaxSimilarityQuery([np.arange(length)] * 3, [weights] * 3).max_users_per_block(items)

    assert users_per_block(100, 10_000) == users_per_block(1, 10_000) // 100
    assert users_per_block(0, 2**30) == 1


@pytest.mark.parametrize(
    ("weights", "first_user"),
    [
        (None, [1, 0, 1]),
        # A tenth of the weight: (1, 0) is nearer to all items but its opposite.
        ([np.array([0.1, 1, 0.1]), np.array([]), np.ones(1)], [0, 0, 1]),
    ],
)
def test_the_nearest_history_item_is_the_first_of_equals(
    tmp_path, weights: list[np.ndarray] | None, first_user: list[int]
):
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6], [0, 1]], np.float32)
    histories = [np.array([1, 0, 4]), np.array([], int), np.array([2])]
    items = np.array([[2, 3, 1], [2, 3, 1], [0, -1, 2]])
    index = build_index(tmp_path / "small", vectors)
    nearest = explain_by_content(histories, weights, index, items)
    assert nearest.history_items.tolist() == [first_user, [-1, -1, -1], [2, -1, 2]]


# Tastes


class Groups(NamedTuple):
    """Queries of a history of two groups of near twins and a single item, and of an empty one.

    tastes, weights: those that the first user should have, in the order of their first items.
    """

    index: Searcher
    queries: MultiTasteQuery
    tastes: np.ndarray
    weights: list[float]


@pytest.fixture
def groups(tmp_path) -> Groups:
    centers = np.repeat(np.eye(3, DIMENSION), [3, 2, 1], axis=0)
    noise = 0.02 * np.random.default_rng(9).standard_normal((6, DIMENSION))
    vectors = unit(centers + noise)
    index = build_index(tmp_path / "small", vectors)
    history = np.array([3, 0, 5, 1, 4, 2])
    weights = np.array([0.2, 1.0, 0.4, 0.9, 0.5, 0.1])
    histories = [history, history[:0]]
    queries = MultiTasteQuery.from_histories(histories, [weights, weights[:0]], index, 3)
    by_item = weights[np.argsort(history)]
    sums = [by_item[group] @ vectors[group] for group in ([3, 4], [0, 1, 2], [5])]
    return Groups(index, queries, unit(np.stack(sums)), [0.5, 1.0, 0.4])


def test_tastes_are_the_means_of_similar_items(groups):
    vectors = groups.queries.vectors[groups.queries.rows[0]]
    assert_allclose(vectors, groups.tastes, atol=1e-6)
    assert groups.queries.weights[0].tolist() == pytest.approx(groups.weights)


def test_an_item_scores_its_best_taste(groups):
    positions, scores = groups.queries.score_all(groups.index)
    cosines = groups.index.vectors @ groups.tastes.T
    expected = (cosines * groups.weights).max(axis=1)
    assert_allclose(scores[0], expected, atol=1e-6)
    assert positions[1].tolist() == [-1] * 6
    first_user = groups.queries.take(np.array([0]))
    exact = first_user.scores(groups.index, positions[:1])
    assert_allclose(exact[0], scores[0], atol=1e-6)


def test_as_many_tastes_as_items_are_the_history_itself(searcher, histories, queries, hardest):
    seen = histories.positions
    tastes: Queries = MultiTasteQuery.from_histories(*histories, searcher, 20)
    exact = lists(tastes.score_all(searcher), seen)
    assert exact == lists(queries.score_all(searcher), seen)
    assert lists(search(tastes, searcher, hardest), seen) == exact
    reasons = tastes.take(np.array([3, 5])).explain(searcher, np.array([[7], [-1]]))
    assert reasons.history_items[0, 0] in histories.positions[3]
    assert reasons.history_items[1, 0] == -1
    assert not reasons.by_item_item.any()


def test_one_taste_is_the_mean(searcher, histories):
    seen = histories.positions[1:]
    weights = histories.weights[1:]
    one = MultiTasteQuery.from_histories(seen, weights, searcher, 1)
    users = zip(seen, weights, strict=True)
    totals = [user_weights @ searcher.vectors[history] for history, user_weights in users]
    mean = MeanQuery(unit(np.stack(totals)), seen)
    assert lists(one.score_all(searcher), seen) == lists(mean.score_all(searcher), seen)


# Item-item scores


class Pairs(NamedTuple):
    """Item-item scores, and the same as a matrix (items, items)."""

    scores: ItemItemScores
    matrix: np.ndarray


class Blend(NamedTuple):
    queries: BlendedQuery
    positions: list[np.ndarray]
    weights: list[np.ndarray]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Pairs:
    """About eight neighbors of each item but the last ten."""
    rng = np.random.default_rng(7)
    matrix = np.zeros((ITEMS, ITEMS))
    for item in range(ITEMS - 10):
        neighbors = rng.permutation(ITEMS)[: rng.integers(1, 16)]
        matrix[item, neighbors] = rng.random() + 0.01
    first, second = np.nonzero(matrix)
    strengths = matrix[first, second].astype(np.float32)
    folder = tmp_path_factory.mktemp("pairs") / "v1"
    ItemItemScores.build(folder, "x", ITEMS, first, second, strengths)
    return Pairs(ItemItemScores.open(folder), matrix)


def blend(pairs: Pairs, share: float) -> Blend:
    positions, weights = random_histories(ITEMS, USERS)
    positions[1] = np.arange(ITEMS - 3, ITEMS)  # items without neighbors
    weights[1] = np.ones(3, np.float32)
    content = MaxSimilarityQuery(positions, weights)
    queries = BlendedQuery(content, pairs.scores, share, positions, weights)
    return Blend(queries, positions, weights)


@pytest.mark.parametrize("item", [0, 17, ITEMS - 1])
def test_item_item_scores_come_back_strongest_first(pairs, item: int):
    positions = pairs.scores.positions[item]
    filled = positions >= 0
    neighbors = positions[filled]
    strengths = pairs.scores.strengths[item][filled]
    assert {*neighbors.tolist()} == {*np.flatnonzero(pairs.matrix[item]).tolist()}
    assert_allclose(strengths, pairs.matrix[item][neighbors], rtol=1e-6)
    assert (np.diff(strengths) <= 0).all()


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_blend_is_the_sum_of_its_parts(
    searcher,
    pairs,
    share: float,
):
    queries, histories, all_weights = blend(pairs, share)
    top = ranked(queries.score_all(searcher), histories)
    vectors = searcher.vectors.astype(np.float64)
    assert top.positions[0].tolist() == EMPTY_LIST
    for user in range(1, USERS):
        history = histories[user]
        weights = all_weights[user].astype(np.float64)
        item_item = weights @ pairs.matrix[history]
        item_item = item_item / item_item.max(initial=1e-300)
        content = (vectors @ vectors[history].T * weights).max(axis=1)
        barred = history
        if share == 1:
            barred = np.union1d(history, np.flatnonzero(item_item == 0))
        scores, _ = best_unseen(share * item_item + (1 - share) * content, barred)
        length = len(scores)
        assert_allclose(top.scores[user, :length], scores, rtol=0, atol=3e-6)
        assert top.positions[user, length:].tolist() == [-1] * (K - length)


def test_without_item_item_scores_the_content_decides(searcher, pairs):
    queries, histories, weights = blend(pairs, 0.4)
    content = MaxSimilarityQuery(histories, weights)
    content_lists = lists(content.score_all(searcher), histories)
    assert lists(queries.score_all(searcher), histories)[1] == content_lists[1]
    only_item_item = blend(pairs, 1.0).queries
    assert lists(only_item_item.score_all(searcher), histories)[1] == EMPTY_LIST


@pytest.fixture(params=["mean", "max_similarity", "blend", "item_item"])
def any_queries(
    request,
    searcher: Searcher,
    pairs: Pairs,
) -> Queries:
    """Queries of each kind, of the histories of `blend`."""
    queries, histories, weights = blend(pairs, 1.0 if request.param == "item_item" else 0.4)
    if request.param == "mean":
        sums = [searcher.vectors[history].sum(axis=0) + 1e-3 for history in histories]
        return MeanQuery(unit(np.stack(sums)), histories)
    if request.param == "max_similarity":
        return MaxSimilarityQuery(histories, weights)
    return queries


def test_a_subset_is_scored_as_among_all_items(searcher, pairs, any_queries, hardest):
    """Lists of a seventh of the items are the best of that part."""
    histories = blend(pairs, 0.4).positions
    eligible = np.arange(ITEMS) % 7 == 3
    exclusions = flat_exclusions(histories, ITEMS)
    expected = top_k(*any_queries.score_all(searcher), exclusions, eligible, K)
    subset = any_queries.score_all(searcher, np.flatnonzero(eligible))
    top = top_k(*subset, exclusions, eligible, K)
    assert top.positions.tolist() == expected.positions.tolist()
    assert_allclose(top.scores, expected.scores, atol=2e-6)
    assert (expected.positions >= 0).any()
    for effort in (None, hardest):
        retrieved = retrieve(searcher, any_queries, histories, eligible, K, effort)
        assert retrieved.positions.tolist() == expected.positions.tolist()
        nothing = retrieve(searcher, any_queries, histories, ~ALL_ELIGIBLE, K, effort)
        assert (nothing.positions < 0).all()


def test_scann_at_its_hardest_gives_the_exact_lists(searcher, pairs, any_queries, hardest):
    histories = blend(pairs, 0.4).positions
    exact = ranked(any_queries.score_all(searcher), histories)
    searched = ranked(search(any_queries, searcher, hardest), histories)
    assert searched.positions.tolist() == exact.positions.tolist()
    assert_allclose(searched.scores, exact.scores, rtol=0, atol=2e-6)
    two = np.array([4, 9])
    two_lists = lists(any_queries.take(two).score_all(searcher), [histories[4], histories[9]])
    assert two_lists == exact.positions[two].tolist()


def test_a_blend_names_the_part_and_the_history_item(searcher, pairs):
    queries, histories, weights = blend(pairs, 0.5)
    top = np.array(lists(queries.score_all(searcher), histories))
    reasons = queries.explain(searcher, top)
    for user in range(2, USERS):
        history = histories[user]
        for rank, item in enumerate(top[user].tolist()):
            strengths = searcher.vectors[history] @ searcher.vectors[item]
            if reasons.by_item_item[user, rank]:
                strengths = pairs.matrix[history, item]
                assert strengths.any()
            added = weights[user] * strengths
            index = history.tolist().index(reasons.history_items[user, rank])
            assert added[index] == pytest.approx(added.max(), abs=2e-6)
    assert {*reasons.by_item_item[2:].ravel().tolist()} == {True, False}


def test_damaged_item_item_scores_are_refused(tmp_path):
    folder = tmp_path / "x"
    strengths = np.array([0.5], np.float32)
    ItemItemScores.build(folder, "v", 2, np.array([0]), np.array([1]), strengths)
    (folder / "strengths.npy").write_bytes(b"")
    message = r"cooccurrence folder .* is damaged: strengths\.npy .* Run the recommend"
    with pytest.raises(RunError, match=message):
        ItemItemScores.open(folder)
