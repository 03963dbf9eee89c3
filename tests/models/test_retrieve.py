"""The best eligible items of every user, exactly and by ScaNN, whatever the catalogue is like."""

import numpy as np
import pytest
from small_indexes import build_index, clustered, item_ids, mean_recall, nearest, nothing, unit

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.top_k import Candidates
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import MeanQuery
from vlm4rec_spark.stages.recommend import all_items_except

ITEMS = 2_000
DIMENSION = 32
K = 10


def best(
    searcher: Searcher,
    vectors: np.ndarray,
    effort: Effort | None,
    excluded: list[np.ndarray] | None = None,
    eligible: np.ndarray | None = None,
) -> Candidates:
    """K items of users with these query vectors. By default nothing is excluded."""
    if eligible is None:
        eligible = np.ones(len(searcher), bool)
    queries = MeanQuery(vectors, None)
    return retrieve(searcher, queries, excluded or nothing(len(vectors)), eligible, K, effort)


def test_identical_items_keep_their_order_whatever_the_last_digit(tmp_path, monkeypatch):
    vectors = np.repeat(clustered(1, seed=7), 100, axis=0)
    opened = build_index(tmp_path / "x", vectors, ann_min_items=1_000)
    scores = np.repeat(np.float32([0.9, 0.9000006]), 50)
    noisy = Candidates(np.arange(100)[None], scores[None])
    monkeypatch.setattr(Searcher, "score_all", lambda *_: noisy)
    assert best(opened, vectors[:1], None).positions.tolist() == [list(range(K))]


# Catalogues whose items a search finds hard to tell apart, or to divide


def duplicated(items: int) -> np.ndarray:
    return clustered(7, seed=17)[np.random.default_rng(17).integers(7, size=items)]


def skewed(items: int) -> np.ndarray:
    """Nineteen of twenty items are close together."""
    rng = np.random.default_rng(17)
    close = clustered(1, seed=17) + 0.02 * rng.standard_normal((items, DIMENSION))
    is_close = rng.random((items, 1)) < 0.95
    return unit(np.where(is_close, close, rng.standard_normal((items, DIMENSION))))


CATALOGUES = {
    "clustered": lambda items: clustered(items, seed=17),
    "equal": lambda items: np.repeat(clustered(1, seed=17), items, axis=0),
    "duplicated": duplicated,
    "skewed": skewed,
}


@pytest.mark.parametrize("items", [1, 15, 16, 1_000])
@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_every_query_gets_a_full_list(
    tmp_path,
    catalogue: str,
    items: int,
):
    vectors = CATALOGUES[catalogue](items)
    opened = build_index(tmp_path / "x", vectors, ann_min_items=1)
    assert opened.approximate is (items >= 16)
    queries = np.concatenate([clustered(20, seed=18), vectors[:10]])
    exact = nearest(opened, queries, K)
    length = exact.shape[1]

    def lists(effort: Effort | None) -> np.ndarray:
        top = best(opened, queries, effort).positions
        assert (top[:, length:] == -1).all()
        assert (top[:, :length] >= 0).all()
        return top[:, :length]

    assert lists(None).tolist() == exact.tolist()
    if opened.approximate:
        assert lists(Effort(opened.leaf_count, items)).tolist() == exact.tolist()
        # ScaNN's codes hardly tell close items apart, even if all leaves are searched.
        min_recall = 0.7 if catalogue == "skewed" else 0.99
        assert mean_recall(lists(Effort(opened.leaf_count, 16 * K)), exact) >= min_recall
        assert all(len(set(row)) == length for row in lists(Effort(1, K)).tolist())


# Queries that can't be answered


@pytest.fixture(params=[None, Effort(45, 100)], ids=["exact", "scann"])
def effort(request) -> Effort | None:
    return request.param


def two_lists(
    searcher: Searcher,
    vector: np.ndarray,
    effort: Effort | None,
) -> np.ndarray:
    """The lists of a sound query and of `vector`."""
    sound = clustered(1, seed=19)[0, : len(vector)]
    return best(searcher, np.stack([sound, vector]), effort).positions


def test_a_query_of_another_dimension_is_refused(searcher, effort):
    message = "The query vectors have 31 dimensions, the index has 32"
    with pytest.raises(RunError, match=message):
        two_lists(searcher, np.ones(31, np.float32), effort)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_refused(searcher, effort, number: float):
    vector = np.ones(32, np.float32)
    vector[-1] = number
    with pytest.raises(RunError, match="NaN or infinite"):
        two_lists(searcher, vector, effort)


def test_a_query_of_zeros_does_not_harm_the_other_list(searcher, effort):
    lists = two_lists(searcher, np.zeros(32, np.float32), effort)
    assert mean_recall(lists[:1], nearest(searcher, clustered(1, seed=19), K)) >= 0.9
    assert len(set(lists[1].tolist())) == K
    if effort is None:
        assert lists[1].tolist() == list(range(K))


# Exclusions, eligible items, and independence of other users


def test_lists_reach_k_whatever_a_user_has_seen(searcher):
    rng = np.random.default_rng(8)
    queries = clustered(60, seed=8)
    # The nearest 400 items and an unknown one; all but 4 items; all but 12 items.
    excluded = [np.append(row, -1) for row in nearest(searcher, queries[:40], 400)]
    few_left = [np.sort(rng.permutation(ITEMS)[:count]) for count in [4] * 10 + [12] * 10]
    excluded += [np.setdiff1d(np.arange(ITEMS), items) for items in few_left]
    top, scores = best(searcher, queries, Effort(1, 100), excluded)
    assert (top[:40] >= 0).all()
    for row, left in zip(top[40:50], few_left, strict=False):
        assert sorted(row[row >= 0]) == left.tolist()
    assert (top[50:] >= 0).all()
    assert (np.isnan(scores) == (top < 0)).all()
    for row, user_excluded in zip(top, excluded, strict=True):
        assert not np.isin(row[row >= 0], user_excluded).any()


def test_withdrawn_items_are_never_recommended(searcher):
    queries = clustered(30, seed=9)
    withdrawn = np.unique(nearest(searcher, queries, 50))
    ids = [item_ids(ITEMS)[item] for item in withdrawn]
    eligible = all_items_except(searcher, [*ids, "gone"]).eligible(0)
    assert int(eligible.sum()) == ITEMS - len(withdrawn)
    top = best(searcher, queries, Effort(1, 100), eligible=eligible).positions
    assert (top >= 0).all()
    assert not np.isin(top, withdrawn).any()


def assert_equal(first: Candidates, second: Candidates) -> None:
    assert first.positions.tolist() == second.positions.tolist()
    assert first.scores.tolist() == second.scores.tolist()


def test_exact_lists_do_not_depend_on_the_block(searcher, monkeypatch):
    queries = clustered(50, seed=10)
    excluded = [np.arange(user) for user in range(50)]
    lists = best(searcher, queries, None, excluded)
    module = "vlm4rec_spark.models.ranking.user_queries"
    monkeypatch.setattr(f"{module}._BLOCK_SCORES", 7 * ITEMS)
    assert_equal(best(searcher, queries, None, excluded), lists)


def test_the_last_digits_of_a_float32_score_decide_nothing(searcher, monkeypatch):
    queries = clustered(50, seed=10)
    exact = best(searcher, queries, None)
    score_all = Searcher.score_all
    rng = np.random.default_rng(1)

    def score_roughly(
        self: Searcher,
        queries: np.ndarray,
        subset: np.ndarray | None,
    ) -> Candidates:
        positions, scores = score_all(self, queries, subset)
        error = rng.uniform(-4e-7, 4e-7, scores.shape).astype(np.float32)
        return Candidates(positions, scores + error)

    monkeypatch.setattr(Searcher, "score_all", score_roughly)
    assert_equal(best(searcher, queries, None), exact)


def test_a_list_does_not_depend_on_the_other_users(searcher):
    """Else recall would depend on how users are divided, and a sample's recall would mislead."""
    queries = clustered(200, seed=16)
    seen = list(nearest(searcher, queries, 400))
    short = [items[:3] for items in seen]
    effort = Effort(2, K)
    lists = best(searcher, queries, effort, short).positions[:100]
    others = best(searcher, queries, effort, short[:100] + seen[100:]).positions[:100]
    # ScaNN's own scores have ties, and it cuts off one or the other.
    assert (lists == others).all(axis=1).mean() > 0.9
    unseen = nearest(searcher, queries[:100], K + 3)[:, 3:]
    assert mean_recall(lists, unseen) < 0.95  # more candidates would have found more
