"""Metrics computed by hand, and what the intervals and p-values over users promise."""

from __future__ import annotations

import numpy as np
import pytest

from vlm4rec_spark.evaluation.inference import (
    SAMPLES,
    bootstrap_interval,
    ends,
    holm,
    paired_p_value,
    paired_p_values,
    resampled,
)
from vlm4rec_spark.evaluation.metrics import ACCURACY, beyond_accuracy, hits, per_user, together

ITEMS = "abcdeqxyz"
LISTS = [["a", "b", "c"], ["d", "e"], [], ["x", "a", "y", "z"]]
WANTED = [["c", "a"], ["q"], ["a"], ["a", "z", "b", "c", "d"]]
FOUND = [[True, False, True], [False] * 3, [False] * 3, [False, True, False]]


def placed(lists: list[list[str]], length: int) -> np.ndarray:
    return np.array(
        [[*(ITEMS.index(item) for item in row), *[-1] * length][:length] for row in lists]
    )


def codes(wanted: list[list[str]]) -> np.ndarray:
    return np.array(
        sorted(
            user * len(ITEMS) + ITEMS.index(item) for user, row in enumerate(wanted) for item in row
        )
    )


def test_hits_mark_relevant_ranks_and_short_lists_miss_at_their_end() -> None:
    assert hits(placed(LISTS, 3), codes(WANTED), len(ITEMS)).tolist() == FOUND
    assert not hits(placed(LISTS, 3), codes([]), len(ITEMS)).any()


def test_recall_ndcg_and_hit_rate_by_hand() -> None:
    values = per_user(np.array(FOUND), np.array([2, 1, 1, 5]), 3)
    assert tuple(values) == ACCURACY
    assert values["recall"].tolist() == [1.0, 0.0, 0.0, 0.2]
    assert values["hit_rate"].tolist() == [1.0, 0.0, 0.0, 1.0]
    # Discounts at ranks 1, 2, 3 are 1, .63093 and .5: the first user has (1 + .5) / (1 + .63093); the last one's ideal
    # list is cut at k = 3, .63093 / (1 + .63093 + .5).
    assert values["ndcg"].round(5).tolist() == [0.91972, 0.0, 0.0, 0.29608]


def test_a_perfect_list_scores_one() -> None:
    found = hits(placed([["a", "b"], ["c", "x"]], 2), codes([["b", "a", "q"], ["c"]]), len(ITEMS))
    values = per_user(found, np.array([3, 1]), 2)
    assert values["ndcg"].tolist() == [1.0, 1.0]
    assert values["recall"].round(6).tolist() == [0.666667, 1.0]


def test_an_earlier_hit_is_worth_more() -> None:
    ndcg = per_user(np.eye(4, dtype=bool), np.ones(4, int), 4)["ndcg"]
    assert ndcg.round(5).tolist() == [1.0, 0.63093, 0.5, 0.43068]


def test_the_interval_is_the_textbooks_for_a_mean() -> None:
    values = np.random.default_rng(0).normal(0.4, 0.1, 400)
    low, high = bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * 0.1 / 20, values.mean() + 1.96 * 0.1 / 20), abs=0.0015
    )


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    samples = np.random.default_rng(2).random((150, 60))
    intervals = [bootstrap_interval(sample, seed=3) for sample in samples]
    assert 0.89 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(4).random(50)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_equal_values_have_an_interval_without_width() -> None:
    assert bootstrap_interval(np.full(30, 0.25), seed=0) == (0.25, 0.25)


def test_a_clear_difference_has_a_small_p_value() -> None:
    rng = np.random.default_rng(7)
    control = rng.random(200)
    assert paired_p_value(control + rng.normal(0.1, 0.1, 200), control, seed=0) == pytest.approx(
        1 / 2_001
    )


def test_no_difference_has_a_p_value_of_one() -> None:
    values = np.random.default_rng(8).random(200)
    assert paired_p_value(values, values, seed=0) == 1.0
    half = np.tile([0.1, -0.1], 100)
    assert paired_p_value(values + half, values, seed=0) == 1.0


def test_pairs_count_not_the_spread_between_users() -> None:
    control = np.random.default_rng(9).normal(0, 100, 200)
    assert paired_p_value(control + 0.01, control, seed=0) < 0.001
    assert paired_p_value(control, control + 0.01, seed=0) < 0.001


def test_four_users_that_all_differ_alike_have_a_p_value_of_one_eighth() -> None:
    # Of the 16 ways to sign four equal differences, 2 are as large.
    assert paired_p_value(np.ones(4), np.zeros(4), seed=0) == pytest.approx(0.125, abs=0.02)


def test_p_values_of_noise_are_evenly_spread() -> None:
    differences = np.random.default_rng(10).normal(0, 1, (200, 25))
    p_values = [paired_p_value(row, np.zeros(25), seed=0) for row in differences]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_a_resample_is_of_users_and_the_same_for_every_column() -> None:
    values = np.random.default_rng(11).random((40, 1))
    means = resampled(
        np.hstack([values, values + 1, np.where(values > 0.5, values, np.nan)]), seed=12
    )
    assert means.shape == (SAMPLES, 3)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1)
    assert ends(means)[:, 2].min() > 0.5  # who has no value isn't counted as 0


def test_columns_are_tested_one_by_one() -> None:
    differences = np.random.default_rng(13).normal(0.1, 1, (300, 3))
    one_by_one = [paired_p_value(column, np.zeros(300), seed=0) for column in differences.T]
    assert paired_p_values(differences, seed=0).tolist() == one_by_one


def test_holm_by_hand() -> None:
    # .01 of four, .02 of three, .03 of two, and the last no less than the one before it.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_beyond_accuracy_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.999, np.sqrt(1 - 0.999**2)]], np.float32)
    top = np.array([[0, 1, 2], [0, 3, -1], [2, -1, -1], [-1, -1, -1]])
    told = beyond_accuracy(top, vectors, np.array([8, 4, 0, 1]), 8)
    # Of 8 users all, half, none (counted as half a one) and one know the items: 0, 1, 4 and 3 bits.
    np.testing.assert_allclose(told["novelty"], [5 / 3, 1.5, 4, np.nan])
    np.testing.assert_allclose(
        told["intra_list_distance"], [(1 + 0.4 + 0.2) / 3, 0.001, np.nan, np.nan], atol=1e-6
    )
    np.testing.assert_allclose(told["near_duplicate_share"], [0, 0.5, np.nan, np.nan])


def test_coverage_and_gini_by_hand() -> None:
    assert together(np.array([[0, 1], [2, 3]]), 4) == {"coverage": 1.0, "gini": 0.0}
    assert together(np.array([[0], [0], [0]]), 4) == {"coverage": 0.25, "gini": 0.75}
    assert together(np.array([[-1, -1]]), 4) == {"coverage": 0.0, "gini": 0.0}
