"""The k best candidates without exclusions, against a plain Python reference and literal rows."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from vlm4rec_spark.models.ranking.top_k import Candidates, flat_exclusions, top_k

NAN = float("nan")


def reference(
    candidates: Candidates,
    excluded: list[np.ndarray],
    eligible: np.ndarray,
    k: int,
) -> Candidates:
    tops = []
    for user, positions in enumerate(candidates.positions.tolist()):
        barred = {-1, *excluded[user].tolist(), *np.flatnonzero(~eligible).tolist()}
        pairs = zip(positions, candidates.scores[user].tolist(), strict=True)
        rows = [pair for pair in pairs if pair[0] not in barred]
        rows = sorted(rows, key=lambda row: (-row[1], row[0]))[:k]
        tops.append(rows + [(-1, NAN)] * (k - len(rows)))
    return Candidates(*np.moveaxis(np.array(tops), -1, 0))


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_reference(seed: int):
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
    top = top_k(*candidates, flat_exclusions(excluded, items), eligible, k)
    expected = reference(candidates, excluded, eligible, k)
    assert_array_equal(top.positions, expected.positions)
    assert_array_equal(top.scores, expected.scores)


class Case(NamedTuple):
    """One user's candidates, what he has seen, and his list in full."""

    positions: list[int]
    scores: list[float]
    seen: list[int]
    best_items: list[int]
    best_scores: list[float]


CASES = {
    "best first, ties by the smaller id": Case(
        [3, 0, 2, 1],
        [0.5, -0.25, 0.5, 0.75],
        [1],
        [2, 3, 0],
        [0.5, 0.5, -0.25],
    ),
    "a difference past six digits is a tie": Case(
        [0, 1, 2],
        [0.300_000_1, 0.300_000_4, 0.300_002],
        [],
        [2, 0, 1],
        [0.300_002, 0.3, 0.3],
    ),
    "a negative score before an excluded positive one": Case(
        [0, 1, 2],
        [0.9, -0.9, -1.0],
        [0],
        [1, 2],
        [-0.9, -1.0],
    ),
    "the order of scores in a catalogue of millions": Case(
        [2_999_999, 0, 7],
        [1.0, -1.0, 0.999_999],
        [],
        [2_999_999, 7, 0],
        [1.0, 0.999_999, -1.0],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_list_of_one_user(case: Case):
    items = max(case.positions) + 1
    exclusions = flat_exclusions([np.array(case.seen, int)], items)
    top = top_k(
        np.array([case.positions]),
        np.array([case.scores]),
        exclusions,
        np.ones(items, bool),
        len(case.best_items),
    )
    assert top.positions.tolist() == [case.best_items]
    assert top.scores.tolist() == [case.best_scores]


def test_everything_excluded_or_ineligible_leaves_an_empty_list():
    positions = np.array([[0, 1], [0, 1]])
    exclusions = flat_exclusions([np.array([0, 1]), np.array([1])], 2)
    top = top_k(positions, np.ones((2, 2)), exclusions, np.array([False, True]), 3)
    assert top.positions.tolist() == [[-1, -1, -1]] * 2
    assert np.isnan(top.scores).all()


def test_exclusions_hold_for_their_user_only():
    positions = np.array([[0, 1, 2]] * 3)
    scores = np.array([[0.3, 0.2, 0.1]] * 3)
    exclusions = flat_exclusions([np.array([2]), np.array([], int), np.array([0])], 3)
    top = top_k(positions, scores, exclusions, np.ones(3, bool), 2)
    assert top.positions.tolist() == [[0, 1], [0, 1], [1, 2]]


def test_flat_exclusions_are_sorted_codes_without_repeats_and_unknown_items():
    excluded = [np.array([4, 2, 4, -1]), np.array([], np.int64), np.array([0, 9])]
    codes = flat_exclusions(excluded, 10)
    assert codes.tolist() == [2, 4, 20, 29]
    assert codes.dtype == np.int64


@pytest.mark.parametrize("excluded", [[], [np.array([], np.int64)] * 3, [np.array([-1, -1])]])
def test_flat_exclusions_of_nothing(excluded: list[np.ndarray]):
    assert flat_exclusions(excluded, 10).tolist() == []
