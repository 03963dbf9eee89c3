"""Stored neighbors: the same lists as by searching, however deep, and no other index's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from small_indexes import build_index, nothing, random_histories, unit

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index.item_item_scores import ItemItemScores
from vlm4rec_spark.models.index.neighbors import NeighborBlock, Neighbors
from vlm4rec_spark.models.index.searcher import Effort, Searcher
from vlm4rec_spark.models.ranking.blend import BlendedQuery
from vlm4rec_spark.models.ranking.top_k import Candidates
from vlm4rec_spark.models.ranking.top_k_lists import retrieve
from vlm4rec_spark.models.ranking.user_queries import MaxSimilarityQuery, Queries

ITEMS = 10_000
DIMENSION = 32
"""With fewer items or dimensions ScaNN may search other leaves for two queries than for twenty."""
USERS = 40
K = 10
EFFORT = Effort(2, 20)
BLOCK_ITEMS = 4_000

MakeNeighbors = Callable[[int], Neighbors]


class Lists(NamedTuple):
    items: list[list[int]]
    scores: list[list[float]]


class Users(NamedTuple):
    """Histories with weights, and exclusions.

    Most users' exclusions are their history. Some have two hundred more, and one has all items but
    three. The first user has no history.
    """

    histories: list[np.ndarray]
    weights: list[np.ndarray]
    excluded: list[np.ndarray]

    def queries(self, neighbors: Neighbors | None = None) -> MaxSimilarityQuery:
        return MaxSimilarityQuery(self.histories, self.weights, neighbors)


def random_index(folder: Path, seed: int) -> Searcher:
    return build_index(folder, unit(np.random.default_rng(seed).normal(size=(ITEMS, DIMENSION))))


@pytest.fixture(scope="module")
def searcher(tmp_path_factory) -> Searcher:
    return random_index(tmp_path_factory.mktemp("index") / "v1", 5)


@pytest.fixture
def counting(searcher: Searcher) -> CountingSearcher:
    return CountingSearcher.open(searcher.folder)


@pytest.fixture
def make_neighbors(searcher: Searcher, tmp_path) -> MakeNeighbors:
    """Writes neighbors of a given depth in blocks, and opens them."""

    def make(depth: int) -> Neighbors:
        effort = Effort(EFFORT.leaves, depth)
        Neighbors.write(tmp_path / "neighbors", searcher, effort, search_blocks(searcher, effort))
        return Neighbors.open(tmp_path / "neighbors")

    return make


def search_blocks(searcher: Searcher, effort: Effort) -> Iterator[NeighborBlock]:
    for first in (8_000, 0, 4_000):
        vectors = searcher.vectors[first : first + BLOCK_ITEMS]
        yield NeighborBlock(first, *searcher.search(vectors, effort))


@pytest.fixture
def users() -> Users:
    histories, weights = random_histories(ITEMS, USERS)
    rng = np.random.default_rng(7)
    excluded = list(histories)
    for user in range(3, USERS, 7):
        excluded[user] = np.union1d(histories[user], rng.permutation(ITEMS)[:200])
    excluded[5] = np.arange(3, ITEMS)
    return Users(histories, weights, excluded)


class CountingSearcher(Searcher):
    """Counts the vectors that are searched."""

    searched = 0

    def search(
        self,
        queries: np.ndarray,
        effort: Effort,
    ) -> Candidates:
        self.searched += len(queries)
        return super().search(queries, effort)


def lists(
    searcher: Searcher, queries: Queries, excluded: list[np.ndarray], effort: Effort = EFFORT
) -> Lists:
    top = retrieve(searcher, queries, excluded, np.ones(ITEMS, bool), K, effort)
    scores = np.nan_to_num(top.scores, nan=-9)
    return Lists(top.positions.tolist(), scores.tolist())


@pytest.mark.parametrize("depth", [1, 21, 32, 64, 500])
def test_lists_are_those_of_searching(
    searcher,
    counting,
    make_neighbors,
    users,
    depth: int,
):
    excluded = users.excluded
    neighbors = make_neighbors(depth)
    assert neighbors.depth == depth
    expected = lists(searcher, users.queries(), excluded)
    assert expected.items[0] == [-1] * K
    queries = users.queries(neighbors)
    assert lists(counting, queries, excluded) == expected
    depths = [EFFORT.candidates + len(positions) for positions in excluded]
    too_deep = [users.histories[user] for user in range(USERS) if depths[user] > depth]
    searched_items = np.unique(np.concatenate([*nothing(1), *too_deep]))
    assert counting.searched == len(searched_items)
    for user in (3, 5, 8):  # a list doesn't depend on the other users
        alone = lists(searcher, queries.take(np.array([user])), [excluded[user]])
        assert alone == Lists([expected.items[user]], [expected.scores[user]])


def test_nothing_is_searched_if_the_neighbors_are_deep_enough(
    searcher, counting, make_neighbors, users
):
    histories = users.histories
    queries = users.queries(make_neighbors(EFFORT.candidates + 20))
    lists(counting, queries, histories)
    assert counting.searched == 0
    # Other leaves have other neighbors: these are searched.
    harder = Effort(EFFORT.leaves + 1, EFFORT.candidates)
    expected = lists(searcher, users.queries(), histories, harder)
    assert lists(counting, queries, histories, harder) == expected
    assert counting.searched > 0


def test_an_item_is_its_own_neighbor(searcher, make_neighbors):
    neighbors = make_neighbors(400)
    is_own = neighbors.positions == np.arange(ITEMS)[:, None]
    own = np.flatnonzero(is_own.any(axis=1))
    assert len(own) > ITEMS / 2
    # Without exclusions the history's items are on the lists, best of all.
    histories = [own[:1], own[1::-1]]
    weights = [np.ones(1, np.float32), np.array([0.4, 1], np.float32)]
    effort = Effort(EFFORT.leaves, 300)
    users = Users(histories, weights, nothing(2))
    stored = lists(searcher, users.queries(neighbors), users.excluded, effort)
    assert stored == lists(searcher, users.queries(), users.excluded, effort)
    assert [items[0] for items in stored.items] == [own[0]] * 2


def test_a_short_answer_is_padded(searcher, make_neighbors):
    neighbors = make_neighbors(400)
    filled = neighbors.positions >= 0
    assert not filled[:, -1].any()
    rows, columns = np.nonzero(filled)
    vectors = searcher.vectors[neighbors.positions[rows, columns]]
    cosines = (searcher.vectors[rows] * vectors).sum(axis=1)
    np.testing.assert_allclose(neighbors.cosines[rows, columns], cosines, atol=1e-6)


@pytest.mark.parametrize("depth", [32, 500])
def test_a_blend_is_the_same_with_stored_neighbors(
    searcher, make_neighbors, users, tmp_path, depth: int
):
    rng = np.random.default_rng(8)
    first, second = np.divmod(np.unique(rng.integers(0, ITEMS**2, 20 * ITEMS)), ITEMS)
    strengths = rng.random(len(first)).astype(np.float32)
    ItemItemScores.build(tmp_path / "item_item", "v1", ITEMS, first, second, strengths)
    item_item = ItemItemScores.open(tmp_path / "item_item")
    stored, searched = (
        BlendedQuery(users.queries(neighbors), item_item, 0.4, users.histories, users.weights)
        for neighbors in (make_neighbors(depth), None)
    )
    expected = lists(searcher, searched, users.excluded)
    assert lists(searcher, stored, users.excluded) == expected


def test_neighbors_of_another_index_are_refused(make_neighbors, users, tmp_path):
    queries = users.queries(make_neighbors(8))
    message = r"neighbours are those of index v1, not of v2\. Run the recommend"
    with pytest.raises(RunError, match=message):
        lists(random_index(tmp_path / "v2", 6), queries, users.excluded)


def test_a_torn_or_damaged_folder_is_refused_by_name(make_neighbors, tmp_path):
    make_neighbors(8)
    folder = tmp_path / "neighbors"
    manifest_file = folder / "manifest.json"
    cosines_file = folder / "cosines.npy"

    def assert_refused(reason: str) -> None:
        message = f"The neighbours folder {folder} {reason}.* Run the recommend stage again"
        with pytest.raises(RunError, match=message):
            Neighbors.open(folder)

    manifest = json.loads(manifest_file.read_text())
    manifest_file.write_text(json.dumps(manifest | {"format": 0}))
    assert_refused("has format 0; this release reads 1")
    manifest_file.write_text(json.dumps(manifest))
    cosines_file.write_bytes(cosines_file.read_bytes()[:-4])
    assert_refused("is damaged: cosines.npy")
    manifest_file.unlink()
    assert_refused("is incomplete")
