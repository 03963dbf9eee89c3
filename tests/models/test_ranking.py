"""The k best candidates without exclusions, against a plain Python reference and literal rows."""

from __future__ import annotations

import numpy as np
import pytest

from vlm4rec_spark.models.ranking.top_k import Candidates, flat_exclusions, top_k

NAN = float("nan")
NO_EXCLUSIONS = np.empty(0, np.int64)


def reference(
    candidates: Candidates,
    excluded: list[np.ndarray],
    eligible: np.ndarray,
    k: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """Positions and scores."""
    tops = []
    for user, positions in enumerate(candidates.positions.tolist()):
        barred = {-1, *excluded[user].tolist(), *np.flatnonzero(~eligible).tolist()}
        pairs = zip(positions, candidates.scores[user].tolist(), strict=True)
        rows = [pair for pair in pairs if pair[0] not in barred]
        rows = sorted(rows, key=lambda row: (-row[1], row[0]))[:k]
        tops.append(rows + [(-1, NAN)] * (k - len(rows)))
    positions = [[position for position, _ in rows] for rows in tops]
    scores = [[score for _, score in rows] for rows in tops]
    return positions, scores


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    users = rng.integers(1, 7)
    items = rng.integers(1, 30)
    k = int(rng.integers(1, 40))
    width = rng.integers(1, items + 1)
    positions = np.stack([rng.permutation(items)[:width] for _ in range(users)]).astype(np.int64)
    positions[rng.random(positions.shape) < 0.15] = -1
    # Quarters, from -1 to 1: many ties, many negative scores.
    quarters = rng.integers(-4, 5, positions.shape) / 4
    candidates = Candidates(positions, np.where(positions < 0, NAN, quarters).astype(np.float32))
    excluded = [rng.integers(-1, items, rng.integers(0, items + 1)) for _ in range(users)]
    eligible = rng.random(items) < rng.choice([0.2, 0.9, 1.0])
    exclusions = flat_exclusions(excluded, items)
    top = top_k(*candidates, exclusions, eligible, k)
    expected_positions, expected_scores = reference(candidates, excluded, eligible, k)
    assert top.positions.tolist() == expected_positions
    np.testing.assert_array_equal(top.scores, expected_scores)


def test_best_first_and_ties_go_to_the_smaller_id() -> None:
    positions = np.array([[3, 0, 2, 1]])
    scores = np.array([[0.5, -0.25, 0.5, 0.75]])
    exclusions = flat_exclusions([np.array([1])], 4)
    top = top_k(positions, scores, exclusions, np.ones(4, bool), 3)
    assert top.positions.tolist() == [[2, 3, 0]]
    assert top.scores.tolist() == [[0.5, 0.5, -0.25]]


def test_a_difference_past_six_digits_is_a_tie() -> None:
    positions = np.array([[0, 1, 2]])
    scores = np.array([[0.300_000_1, 0.300_000_4, 0.300_002]])
    top = top_k(positions, scores, NO_EXCLUSIONS, np.ones(3, bool), 3)
    assert top.positions.tolist() == [[2, 0, 1]]
    assert top.scores.tolist() == [[0.300002, 0.3, 0.3]]


def test_a_negative_score_ranks_before_an_excluded_positive_one() -> None:
    positions = np.array([[0, 1, 2]])
    scores = np.array([[0.9, -0.9, -1.0]])
    exclusions = flat_exclusions([np.array([0])], 3)
    top = top_k(positions, scores, exclusions, np.ones(3, bool), 2)
    assert top.positions.tolist() == [[1, 2]]


def test_everything_excluded_or_ineligible_leaves_an_empty_list() -> None:
    positions = np.array([[0, 1], [0, 1]])
    exclusions = flat_exclusions([np.array([0, 1]), np.array([1])], 2)
    top = top_k(positions, np.ones((2, 2)), exclusions, np.array([False, True]), 3)
    assert top.positions.tolist() == [[-1, -1, -1]] * 2
    assert np.isnan(top.scores).all()


def test_exclusions_hold_for_their_user_only() -> None:
    positions = np.array([[0, 1, 2]] * 3)
    scores = np.array([[0.3, 0.2, 0.1]] * 3)
    exclusions = flat_exclusions([np.array([2]), np.array([], int), np.array([0])], 3)
    top = top_k(positions, scores, exclusions, np.ones(3, bool), 2)
    assert top.positions.tolist() == [[0, 1], [0, 1], [1, 2]]


def test_scores_keep_their_order_in_a_catalogue_of_millions() -> None:
    positions = np.array([[2_999_999, 0, 7]])
    scores = np.array([[1.0, -1.0, 0.999_999]])
    top = top_k(positions, scores, NO_EXCLUSIONS, np.ones(3_000_000, bool), 3)
    assert top.positions.tolist() == [[2_999_999, 7, 0]]
    assert top.scores.tolist() == [[1.0, 0.999999, -1.0]]


def test_flat_exclusions_are_sorted_codes_without_repeats_and_unknown_items() -> None:
    excluded = [np.array([4, 2, 4, -1]), np.array([], np.int64), np.array([0, 9])]
    codes = flat_exclusions(excluded, 10)
    assert codes.tolist() == [2, 4, 20, 29]
    assert codes.dtype == np.int64


@pytest.mark.parametrize("excluded", [[], [np.array([], np.int64)] * 3, [np.array([-1, -1])]])
def test_flat_exclusions_of_nothing(excluded: list[np.ndarray]) -> None:
    assert flat_exclusions(excluded, 10).tolist() == []
