"""Neighbours kept in a folder: the same lists as by searching, however deep they are, and no other index's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.neighbors import NeighborBlock, Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.top_k import Candidates
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import MaxSimilarityQuery, Queries

ITEMS, DIMENSION, USERS, K = 10_000, 32, 40, 10
"""With fewer items or dimensions ScaNN may search other leaves for two queries than for twenty."""
EFFORT = Effort(2, 20)


def index(folder: Path, seed: int) -> Searcher:
    vectors = np.random.default_rng(seed).standard_normal((ITEMS, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    Searcher.build(
        folder,
        folder.name,
        [f"i{n:04d}" for n in range(ITEMS)],
        vectors,
        [""] * ITEMS,
        ann_min_items=16,
    )
    return Searcher.open(folder)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return index(tmp_path_factory.mktemp("index") / "ours", 5)


@pytest.fixture
def made(searcher: Searcher, tmp_path: Path) -> Callable[..., Neighbors]:
    """Neighbours as deep as is asked for, written in parts of 4,000 items and opened again."""

    def make(depth: int) -> Neighbors:
        Neighbors.write(
            tmp_path / "near", searcher, Effort(EFFORT.leaves, depth), parts(searcher, depth)
        )
        return Neighbors.open(tmp_path / "near")

    return make


def parts(searcher: Searcher, depth: int) -> Iterator[NeighborBlock]:
    for first in (8_000, 0, 4_000):
        some = searcher.vectors[first : first + 4_000]
        yield NeighborBlock(first, *searcher.search(some, Effort(EFFORT.leaves, depth)))


def world() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Histories of up to 20 items, weights of which the heaviest is 1, and exclusions: of most the history, of some two
    hundred items besides, of one all but three. The first user has no history."""
    rng = np.random.default_rng(6)
    positions = [
        rng.permutation(ITEMS)[: rng.integers(1, 21) if user else 0].astype(np.int64)
        for user in range(USERS)
    ]
    weights = [rng.random(len(mine)) + 0.05 for mine in positions]
    weights = [(mine / mine.max(initial=0.01)).astype(np.float32) for mine in weights]
    excluded = [
        np.union1d(mine, rng.permutation(ITEMS)[:200]) if user % 7 == 3 else mine
        for user, mine in enumerate(positions)
    ]
    excluded[5] = np.arange(3, ITEMS)
    return positions, weights, excluded


class Counting(Searcher):
    """Counts the vectors that are searched."""

    searched = 0

    def search(self, queries: np.ndarray, effort: Effort) -> Candidates:
        self.searched += len(queries)
        return super().search(queries, effort)


def lists(
    searcher: Searcher, asked: Queries, excluded: list[np.ndarray], effort: Effort = EFFORT
) -> tuple[list, list]:
    top, scores = retrieve(searcher, asked, excluded, np.ones(ITEMS, bool), K, effort)
    return top.tolist(), np.nan_to_num(scores, nan=-9).tolist()


@pytest.mark.parametrize("depth", [1, 21, 32, 64, 500])
def test_lists_are_those_of_searching(
    searcher: Searcher, made: Callable[..., Neighbors], depth: int
) -> None:
    positions, weights, excluded = world()
    known = made(depth)
    assert known.depth == depth
    expected = lists(searcher, MaxSimilarityQuery(positions, weights), excluded)
    assert expected[0][0] == [-1] * K
    once = Counting.open(searcher.folder)
    asked = MaxSimilarityQuery(positions, weights, known)
    assert lists(once, asked, excluded) == expected
    needed = [EFFORT.candidates + len(mine) for mine in excluded]
    far = [mine for mine, most in zip(positions, needed, strict=True) if most > known.depth]
    assert once.searched == len(np.unique(np.concatenate([np.empty(0, np.int64), *far])))
    for user in (3, 5, 8):  # whoever is asked for beside
        alone = lists(searcher, asked.take(np.array([user])), [excluded[user]])
        assert alone == ([expected[0][user]], [expected[1][user]])


def test_nothing_is_searched_where_the_neighbours_do(
    searcher: Searcher, made: Callable[..., Neighbors]
) -> None:
    positions, weights, _ = world()
    once = Counting.open(searcher.folder)
    known = made(EFFORT.candidates + 20)
    lists(once, MaxSimilarityQuery(positions, weights, known), positions)
    assert once.searched == 0
    # Other leaves find others: these are searched.
    harder = Effort(EFFORT.leaves + 1, EFFORT.candidates)
    expected = lists(searcher, MaxSimilarityQuery(positions, weights), positions, harder)
    assert lists(once, MaxSimilarityQuery(positions, weights, known), positions, harder) == expected
    assert once.searched > 0


def test_an_item_is_its_own_neighbour_and_a_short_answer_is_padded(
    searcher: Searcher, made: Callable[..., Neighbors]
) -> None:
    known = made(400)
    own = np.flatnonzero((known.positions == np.arange(ITEMS)[:, None]).any(axis=1))
    assert len(own) > ITEMS / 2
    there = known.positions >= 0
    assert not there[:, -1].any()
    rows, columns = np.nonzero(there)
    cosines = (searcher.vectors[rows] * searcher.vectors[known.positions[rows, columns]]).sum(
        axis=1
    )
    np.testing.assert_allclose(known.cosines[rows, columns], cosines, atol=1e-6)
    # Nobody has seen anything: the history's items are on the lists, best of all.
    positions, weights = [own[:1], own[1::-1]], [np.ones(1, np.float32), np.float32([0.4, 1])]
    nobody = [np.empty(0, np.int64)] * 2
    found = lists(
        searcher, MaxSimilarityQuery(positions, weights, known), nobody, Effort(EFFORT.leaves, 300)
    )
    assert found == lists(
        searcher, MaxSimilarityQuery(positions, weights), nobody, Effort(EFFORT.leaves, 300)
    )
    assert [row[0] for row in found[0]] == [own[0]] * 2


@pytest.mark.parametrize("depth", [32, 500])
def test_a_blend_is_the_same_over_neighbours(
    searcher: Searcher, made: Callable[..., Neighbors], tmp_path: Path, depth: int
) -> None:
    positions, weights, excluded = world()
    rng = np.random.default_rng(8)
    first, second = np.divmod(np.unique(rng.integers(0, ITEMS**2, 20 * ITEMS)), ITEMS)
    strengths = rng.random(len(first)).astype(np.float32)
    ItemItemScores.build(tmp_path / "together", "ours", ITEMS, first, second, strengths)
    together = ItemItemScores.open(tmp_path / "together")
    bare, known = (
        MaxSimilarityQuery(positions, weights),
        MaxSimilarityQuery(positions, weights, made(depth)),
    )
    with_it, without = (
        BlendedQuery(content, together, 0.4, positions, weights) for content in (known, bare)
    )
    assert lists(searcher, with_it, excluded) == lists(searcher, without, excluded)


def test_a_torn_damaged_or_foreign_folder_is_refused_by_name(
    searcher: Searcher, made: Callable[..., Neighbors], tmp_path: Path
) -> None:
    positions, weights, excluded = world()
    known, folder = made(8), tmp_path / "near"
    other = index(tmp_path / "theirs", 6)
    with pytest.raises(
        RunError, match=r"neighbours are those of index ours, not of theirs\. Run the recommend"
    ):
        lists(other, MaxSimilarityQuery(positions, weights, known), excluded)

    def refused(words: str) -> None:
        with pytest.raises(
            RunError,
            match=f"The neighbours folder {folder} {words}.* Run the recommend stage again",
        ):
            Neighbors.open(folder)

    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    refused("has format 0; this release reads 1")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "cosines.npy").write_bytes((folder / "cosines.npy").read_bytes()[:-4])
    refused("is damaged: cosines.npy")
    (folder / "manifest.json").unlink()
    refused("is incomplete")
