"""Candidates and exclusions to the final list, against a plain Python reference and against literal rows."""

from __future__ import annotations

import numpy as np
import pytest

from vlm4rec_spark.models.ranking.top_k import flat_exclusions, top_k

NAN = float("nan")


def reference(
    positions: np.ndarray,
    scores: np.ndarray,
    excluded: list[np.ndarray],
    eligible: np.ndarray,
    k: int,
) -> tuple[list[list[int]], list[list[float]]]:
    tops, bests = [], []
    for found, score, out in zip(positions.tolist(), scores.tolist(), excluded, strict=True):
        rows = [
            (p, s)
            for p, s in zip(found, score, strict=True)
            if p >= 0 and eligible[p] and p not in out.tolist()
        ]
        rows = sorted(rows, key=lambda row: (-row[1], row[0]))[:k]
        rows += [(-1, NAN)] * (k - len(rows))
        tops.append([p for p, _ in rows])
        bests.append([s for _, s in rows])
    return tops, bests


def test_equals_the_reference() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        users, items, k = rng.integers(1, 7), rng.integers(1, 30), int(rng.integers(1, 40))
        width = rng.integers(1, items + 1)
        positions = np.stack([rng.permutation(items)[:width] for _ in range(users)]).astype(
            np.int64
        )
        positions[rng.random(positions.shape) < 0.15] = -1
        # Quarters, from -1 to 1: many ties, many negative scores.
        scores = np.where(positions < 0, NAN, rng.integers(-4, 5, positions.shape) / 4).astype(
            np.float32
        )
        excluded = [rng.integers(-1, items, rng.integers(0, items + 1)) for _ in range(users)]
        eligible = rng.random(items) < rng.choice([0.2, 0.9, 1.0])
        top, best = top_k(positions, scores, flat_exclusions(excluded, items), eligible, k)
        expected_top, expected_best = reference(positions, scores, excluded, eligible, k)
        assert top.tolist() == expected_top, seed
        np.testing.assert_array_equal(best, expected_best)


def test_best_first_and_ties_go_to_the_smaller_id() -> None:
    positions, scores = np.array([[3, 0, 2, 1]]), np.array([[0.5, -0.25, 0.5, 0.75]])
    top, best = top_k(positions, scores, flat_exclusions([np.array([1])], 4), np.ones(4, bool), 3)
    assert top.tolist() == [[2, 3, 0]]
    assert best.tolist() == [[0.5, 0.5, -0.25]]


def test_a_difference_past_six_digits_is_a_tie() -> None:
    scores = np.array([[0.300_000_1, 0.300_000_4, 0.300_002]])
    top, best = top_k(np.array([[0, 1, 2]]), scores, np.empty(0, np.int64), np.ones(3, bool), 3)
    assert top.tolist() == [[2, 0, 1]]
    assert best.tolist() == [[0.300002, 0.3, 0.3]]


def test_a_negative_score_stands_before_an_excluded_positive_one() -> None:
    exclusions = flat_exclusions([np.array([0])], 3)
    top, _ = top_k(
        np.array([[0, 1, 2]]), np.array([[0.9, -0.9, -1.0]]), exclusions, np.ones(3, bool), 2
    )
    assert top.tolist() == [[1, 2]]


def test_everything_excluded_or_ineligible_leaves_an_empty_list() -> None:
    positions, scores = np.array([[0, 1], [0, 1]]), np.ones((2, 2))
    exclusions = flat_exclusions([np.array([0, 1]), np.array([1])], 2)
    top, best = top_k(positions, scores, exclusions, np.array([False, True]), 3)
    assert top.tolist() == [[-1, -1, -1]] * 2
    assert np.isnan(best).all()


def test_one_users_exclusions_are_not_the_next_ones() -> None:
    positions, scores = np.array([[0, 1, 2]] * 3), np.array([[0.3, 0.2, 0.1]] * 3)
    exclusions = flat_exclusions([np.array([2]), np.array([], int), np.array([0])], 3)
    assert top_k(positions, scores, exclusions, np.ones(3, bool), 2)[0].tolist() == [
        [0, 1],
        [0, 1],
        [1, 2],
    ]


def test_scores_keep_their_order_in_a_catalogue_of_millions() -> None:
    positions, scores = np.array([[2_999_999, 0, 7]]), np.array([[1.0, -1.0, 0.999_999]])
    top, best = top_k(positions, scores, np.empty(0, np.int64), np.ones(3_000_000, bool), 3)
    assert top.tolist() == [[2_999_999, 7, 0]]
    assert best.tolist() == [[1.0, 0.999999, -1.0]]


def test_flat_exclusions_are_sorted_codes_without_repeats_and_unknown_items() -> None:
    codes = flat_exclusions([np.array([4, 2, 4, -1]), np.array([], np.int64), np.array([0, 9])], 10)
    assert codes.tolist() == [2, 4, 20, 29]
    assert codes.dtype == np.int64


@pytest.mark.parametrize("excluded", [[], [np.array([], np.int64)] * 3, [np.array([-1, -1])]])
def test_flat_exclusions_of_nothing(excluded: list[np.ndarray]) -> None:
    assert flat_exclusions(excluded, 10).tolist() == []
