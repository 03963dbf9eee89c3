"""Metrics computed by hand, and what the intervals and p-values over users promise."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from vlm4rec_spark.evaluation.inference import (
    SAMPLES,
    bootstrap_interval,
    holm,
    interval,
    paired_p_values,
    resampled_means,
)
from vlm4rec_spark.evaluation.metrics import (
    ACCURACY,
    aggregate_diversity,
    beyond_accuracy,
    hit_mask,
    per_user,
)

ITEMS = "abcdeqxyz"
LISTS = ["abc", "de", "", "xayz"]
RELEVANT = ["ca", "q", "a", "azbcd"]
HITS = [
    [True, False, True],
    [False, False, False],
    [False, False, False],
    [False, True, False],
]


def paired_p_value(
    arm: np.ndarray,
    control: np.ndarray,
) -> float:
    return float(paired_p_values((arm - control)[:, None], seed=0)[0])


def positions(lists: list[str], length: int) -> np.ndarray:
    top = np.full((len(lists), length), -1)
    for user, items in enumerate(lists):
        for rank, item in enumerate(items[:length]):
            top[user, rank] = ITEMS.index(item)
    return top


def codes(relevant: list[str]) -> np.ndarray:
    return np.array(
        sorted(
            user * len(ITEMS) + ITEMS.index(item)
            for user, items in enumerate(relevant)
            for item in items
        )
    )


def test_hits_mark_relevant_ranks_and_short_lists_miss_at_their_end():
    top = positions(LISTS, 3)
    assert hit_mask(top, codes(RELEVANT), len(ITEMS)).tolist() == HITS
    assert not hit_mask(top, codes([]), len(ITEMS)).any()


def test_recall_ndcg_and_hit_rate_by_hand():
    values = per_user(np.array(HITS), np.array([2, 1, 1, 5]), 3)
    assert tuple(values) == ACCURACY
    assert values["recall"].tolist() == [1.0, 0.0, 0.0, 0.2]
    assert values["hit_rate"].tolist() == [1.0, 0.0, 0.0, 1.0]
    # Discounts at ranks 1, 2, 3 are 1, .63093 and .5. The first user has (1 + .5) / (1 + .63093).
    # The last one's ideal list is cut at k = 3: .63093 / (1 + .63093 + .5).
    assert values["ndcg"].round(5).tolist() == [0.91972, 0.0, 0.0, 0.29608]


def test_the_interval_is_the_textbooks_for_a_mean():
    values = np.random.default_rng(0).normal(0.4, 0.1, 400)
    low, high = bootstrap_interval(values, seed=1)
    mean = values.mean()
    error = 1.96 * 0.1 / 20
    assert low < mean < high
    assert low == pytest.approx(mean - error, abs=0.0015)
    assert high == pytest.approx(mean + error, abs=0.0015)


def test_nineteen_of_twenty_intervals_hold_the_true_mean():
    samples = np.random.default_rng(2).random((150, 60))
    intervals = [bootstrap_interval(sample, seed=3) for sample in samples]
    covered = [low <= 0.5 <= high for low, high in intervals]
    assert 0.89 <= np.mean(covered) <= 0.99


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(4).random(50)
    first = bootstrap_interval(values, seed=5)
    assert first == bootstrap_interval(values, seed=5)
    assert first != bootstrap_interval(values, seed=6)


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_interval(np.full(30, 0.25), seed=0) == (0.25, 0.25)


def test_a_clear_difference_has_a_small_p_value():
    rng = np.random.default_rng(7)
    control = rng.random(200)
    arm = control + rng.normal(0.1, 0.1, 200)
    assert paired_p_value(arm, control) == pytest.approx(1 / 2_001)


def test_no_difference_has_a_p_value_of_one():
    values = np.random.default_rng(8).random(200)
    assert paired_p_value(values, values) == 1.0
    balanced = np.tile([0.1, -0.1], 100)
    assert paired_p_value(values + balanced, values) == 1.0


def test_pairs_count_not_the_spread_between_users():
    control = np.random.default_rng(9).normal(0, 100, 200)
    assert paired_p_value(control + 0.01, control) < 0.001
    assert paired_p_value(control, control + 0.01) < 0.001


def test_four_users_that_all_differ_alike_have_a_p_value_of_one_eighth():
    # Of the 16 ways to sign four equal differences, 2 are as large.
    p_value = paired_p_value(np.ones(4), np.zeros(4))
    assert p_value == pytest.approx(0.125, abs=0.02)


def test_p_values_of_noise_are_evenly_spread():
    differences = np.random.default_rng(10).normal(0, 1, (200, 25))
    p_values = np.array([paired_p_value(row, np.zeros(25)) for row in differences])
    assert np.mean(p_values < 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_a_resample_is_of_users_and_the_same_for_every_column():
    values = np.random.default_rng(11).random((40, 1))
    large_only = np.where(values > 0.5, values, np.nan)
    means = resampled_means(np.hstack([values, values + 1, large_only]), seed=12)
    assert means.shape == (SAMPLES, 3)
    assert_allclose(means[:, 1] - means[:, 0], 1)
    # A user without a value isn't counted as 0.
    assert interval(means)[:, 2].min() > 0.5


def test_columns_are_tested_one_by_one():
    differences = np.random.default_rng(13).normal(0.1, 1, (300, 3))
    single = [paired_p_value(column, np.zeros(300)) for column in differences.T]
    assert paired_p_values(differences, seed=0).tolist() == single


def test_holm_by_hand():
    # .01 of four, .02 of three, .03 of two, and the last no less than the one before it.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_beyond_accuracy_by_hand():
    vectors = np.array(
        [
            [1, 0],
            [0, 1],
            [0.6, 0.8],
            [0.999, np.sqrt(1 - 0.999**2)],
        ],
        np.float32,
    )
    top = np.array([[0, 1, 2], [0, 3, -1], [2, -1, -1], [-1, -1, -1]])
    values = beyond_accuracy(
        top,
        vectors,
        np.array([8, 4, 0, 1]),
        8,
    )
    # Of 8 users all, half, none (counted as half a user) and one know the items: 0, 1, 4, 3 bits.
    assert_allclose(values["novelty"], [5 / 3, 1.5, 4, np.nan])
    distances = [(1 + 0.4 + 0.2) / 3, 0.001, np.nan, np.nan]
    assert_allclose(values["intra_list_distance"], distances, atol=1e-6)
    assert_allclose(values["near_duplicate_share"], [0, 0.5, np.nan, np.nan])


def test_coverage_and_gini_by_hand():
    every_item_once = np.array([[0, 1], [2, 3]])
    assert aggregate_diversity(every_item_once, 4) == {"coverage": 1.0, "gini": 0.0}
    one_item = np.array([[0], [0], [0]])
    assert aggregate_diversity(one_item, 4) == {"coverage": 0.25, "gini": 0.75}
    empty = np.array([[-1, -1]])
    assert aggregate_diversity(empty, 4) == {"coverage": 0.0, "gini": 0.0}
