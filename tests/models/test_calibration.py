"""The cheapest search that keeps the promised recall."""

import numpy as np
import pyarrow as pa
import pytest
from small_indexes import EXACT, build_index, clustered, mean_recall, nearest, nothing, unit

from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.calibration import Calibration, cheapest_effort
from vlm4rec_spark.models.ranking.list_rules import ListRules
from vlm4rec_spark.models.ranking.top_k_lists import ListRequests, retrieve
from vlm4rec_spark.models.ranking.user_queries import MeanQuery
from vlm4rec_spark.stages.recommend import calibrate

ITEMS = 2_000
K = 10
ALL = ListRules(np.ones(ITEMS, np.int64))


def requests(vectors: np.ndarray, excluded: list[np.ndarray] | None = None) -> ListRequests:
    users = len(vectors)
    queries = MeanQuery(vectors, None)
    return ListRequests(queries, excluded or nothing(users), np.zeros(users, np.int64))


@pytest.mark.parametrize("promise", [0.6, 0.95])
def test_the_promise_holds_for_other_users(searcher, promise: float):
    queries = clustered(150, seed=11)
    sample = requests(queries, list(nearest(searcher, queries, 5)))
    calibration = cheapest_effort(searcher, sample, ALL, K, promise)
    assert calibration.effort is not None
    assert calibration.users == 150
    assert promise <= calibration.low <= calibration.recall <= 1
    queries = clustered(150, seed=12)
    users = requests(queries)
    eligible = np.ones(ITEMS, bool)
    effort = calibration.effort
    top = retrieve(searcher, users.queries, users.excluded, eligible, K, effort).positions
    assert mean_recall(top, nearest(searcher, queries, K)) >= promise - 0.03


def test_a_higher_promise_costs_more(searcher):
    sample = requests(clustered(200, seed=13))
    low, high = (
        cheapest_effort(searcher, sample, ALL, K, promise).effort for promise in (0.1, 0.95)
    )
    assert low == Effort(1, K)
    assert high is not None
    assert high.cost(searcher) > low.cost(searcher)


def test_search_is_exact_if_no_effort_keeps_the_promise(tmp_path):
    noise = unit(np.random.default_rng(14).standard_normal((72, 32)))
    index = build_index(tmp_path / "x", noise[:32])
    rules = ListRules(np.ones(32, np.int64))
    calibration = cheapest_effort(index, requests(noise[32:]), rules, 3, 1.0)
    assert calibration.effort is None
    assert calibration.recall == 1.0
    assert calibration.describe(6) == "exact"


# As the stage calibrates


def calibrate_stage(
    searcher: Searcher, vectors: np.ndarray, rules: ListRules, promise: float = 0.9
) -> Calibration:
    """Of profiles without history and exclusions."""
    history_type = pa.list_(pa.struct({"item_id": pa.string(), "weight": pa.float64()}))
    empty = [[]] * len(vectors)
    columns = {
        "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        "history": pa.array(empty, history_type),
        "seen": pa.array(empty, pa.list_(pa.string())),
    }
    return calibrate(searcher, pa.table(columns), rules, K, promise)


def test_the_stage_finds_the_same_effort(searcher):
    vectors = clustered(200, seed=13)
    expected = cheapest_effort(searcher, requests(vectors), ALL, K, 0.95).effort
    assert calibrate_stage(searcher, vectors, ALL, 0.95).effort == expected is not None


def test_search_is_exact_without_users_or_items(searcher):
    assert calibrate_stage(searcher, clustered(0, seed=15), ALL).effort is None
    no_items = ListRules(np.zeros(ITEMS, np.int64))
    assert calibrate_stage(searcher, clustered(3, seed=15), no_items).effort is None


def test_search_is_exact_in_an_exact_index(tmp_path):
    index = build_index(tmp_path / "x", clustered(20, seed=1), EXACT)
    rules = ListRules(np.ones(20, np.int64))
    assert calibrate_stage(index, clustered(1, seed=2), rules).effort is None
