"""Index versions on a base: searched as if built anew, with the base's word weights."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from small_indexes import index_rows, mean_recall, search_top_k, unit, words_of

from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Effort, Searcher

ITEMS = 2_000
DIMENSION = 32
K = 10


class Catalogue(NamedTuple):
    """Numbers of the items, ascending, and their vectors."""

    items: np.ndarray
    vectors: np.ndarray


def vectors_of(items: np.ndarray, seed: int = 1) -> np.ndarray:
    """Unit vectors near one of 40 centers. An item's vector doesn't depend on the other items."""
    centers = np.random.default_rng(0).standard_normal((40, DIMENSION))
    rngs = [np.random.default_rng((seed, int(item))) for item in items]
    noise = np.stack([rng.standard_normal(DIMENSION) for rng in rngs])
    return unit(centers[items % 40] + 0.4 * noise)


def ids_of(items: np.ndarray) -> list[str]:
    return [f"i{item:05d}" for item in items]


def build(
    folder: Path,
    catalogue: Catalogue,
    base: Searcher | None = None,
    rebuild_threshold: float = 0.1,
    ann_min_items: int = 16,
) -> Searcher:
    rows = index_rows(ids_of(catalogue.items), catalogue.vectors)
    return Searcher.open(
        build_index(rows, "caption", "test", folder, ann_min_items, base, rebuild_threshold)
    )


@pytest.fixture(scope="module")
def first_catalogue() -> Catalogue:
    items = np.arange(0, 2 * ITEMS, 2)
    return Catalogue(items, vectors_of(items))


@pytest.fixture(scope="module")
def first(tmp_path_factory, first_catalogue: Catalogue) -> Searcher:
    return build(tmp_path_factory.mktemp("index"), first_catalogue)


@pytest.fixture(scope="module")
def second_catalogue(first_catalogue: Catalogue) -> Catalogue:
    """Forty items are removed, eighty come between the others, and twenty change their vector."""
    rng = np.random.default_rng(3)
    removed = rng.permutation(ITEMS)[:40] * 2
    added = rng.permutation(ITEMS)[:80] * 2 + 1
    unchanged = np.setdiff1d(first_catalogue.items, removed)
    items = np.sort(np.concatenate([unchanged, added]))
    vectors = vectors_of(items)
    changed = rng.permutation(len(items))[:20]
    vectors[changed] = vectors_of(items[changed], seed=2)
    return Catalogue(items, vectors)


@pytest.fixture(scope="module")
def second(first: Searcher, second_catalogue: Catalogue) -> Searcher:
    return build(first.folder.parent, second_catalogue, first)


def test_a_search_finds_added_and_changed_items_but_no_removed_ones(
    first, second, second_catalogue
):
    assert second.base == first.index_id
    assert second.leaf_count == first.leaf_count
    assert 95 <= len(second.delta) <= 100
    queries = vectors_of(np.arange(200), seed=5)
    all_cosines = queries @ second_catalogue.vectors.T
    exact = np.argsort(-all_cosines, axis=1, kind="stable")[:, :K]
    effort = Effort(second.leaf_count, 400)
    positions, cosines = second.search(queries, effort)
    is_item = positions >= 0
    top = search_top_k(second, queries, effort, K)
    assert mean_recall(top, exact) > 0.999
    expected = np.take_along_axis(all_cosines, positions, 1)
    assert np.allclose(cosines[is_item], expected[is_item], atol=1e-6)
    for row in positions:
        items = row[row >= 0].tolist()
        assert len({*items}) == len(items)


def test_a_smaller_search_finds_the_first_of_a_larger_one(second):
    queries = vectors_of(np.arange(200), seed=5)
    larger = second.search(queries, Effort(second.leaf_count, 400)).positions
    smaller = second.search(queries, Effort(second.leaf_count, 50)).positions
    assert smaller.tolist() == larger[:, :50].tolist()
    alone = second.search(queries[7:8], Effort(second.leaf_count, 50)).positions
    assert alone[0].tolist() == larger[7, :50].tolist()


def test_a_third_version_does_not_depend_on_the_second(first, second, second_catalogue):
    """Two nights or one, killed between them or not."""
    folder = first.folder.parent
    new_item = np.array([9_999])
    items = np.append(second_catalogue.items[30:], new_item)
    vectors = np.append(second_catalogue.vectors[30:], vectors_of(new_item), axis=0)
    catalogue = Catalogue(items, vectors)
    third = build(folder, catalogue, second)
    assert third.base == first.index_id != second.index_id != third.index_id
    assert third.index_id == build(folder, catalogue, first).index_id
    assert build(folder, catalogue, third).index_id == third.index_id


def test_an_item_that_comes_back_is_found(first, second, first_catalogue):
    """It is in the delta, though it is as it was."""
    third = build(first.folder.parent, first_catalogue, second)
    queries = first_catalogue.vectors[third.delta]
    # By exact scores. The search's own order is that of approximate ones.
    best = search_top_k(third, queries, Effort(1, 5), 1)
    assert best[:, 0].tolist() == third.delta.tolist()


def test_many_changes_another_dimension_or_size_build_anew(first, second_catalogue, tmp_path):
    items, vectors = second_catalogue
    assert not first.can_be_base(ids_of(items), vectors, 16, 0.05)
    shorter = Catalogue(items, unit(vectors[:, :16]))
    for rebuilt in (
        build(tmp_path, second_catalogue, first, rebuild_threshold=0.05),
        build(tmp_path, shorter, first),
        build(tmp_path, second_catalogue, first, ann_min_items=10**6),
    ):
        assert rebuilt.base != first.index_id


def test_an_exact_index_can_be_a_base(second_catalogue, tmp_path):
    exact = build(tmp_path, second_catalogue, ann_min_items=10**6)
    fewer = Catalogue(*(column[:-1] for column in second_catalogue))
    version = build(tmp_path, fewer, exact, ann_min_items=10**6)
    assert version.base == exact.index_id
    assert not version.approximate


class Words(NamedTuple):
    """A version with these texts, and the words of each item, rarest first."""

    searcher: Searcher
    words: list[list[str]]


def build_words(
    folder: Path,
    texts: list[str],
    base: Searcher | None = None,
) -> Words:
    ids = [f"i{number}" for number in range(len(texts))]
    vectors = np.eye(len(texts), 5, dtype=np.float32)
    Searcher.build(folder, folder.name, ids, vectors, texts, 99, base)
    searcher = Searcher.open(folder)
    return Words(searcher, words_of(searcher))


def test_words_keep_the_weights_of_the_base(tmp_path):
    """red is rarer than blue in the base only. A word that the base lacks is the rarest."""
    base = build_words(tmp_path / "1", ["red shoe", "blue shoe", "blue shoe"]).searcher
    texts = ["red shoe", "red shoe", "red shoe linen", "red blue linen cork", "shoe"]
    second = build_words(tmp_path / "2", texts, base)
    assert second.words[2] == ["linen", "red", "shoe"]
    assert second.words[3] == ["cork", "linen", "red", "blue"]
    rebuilt = build_words(tmp_path / "rebuilt", texts)
    assert rebuilt.words[3] == ["blue", "cork", "linen", "red"]
    third = build_words(tmp_path / "3", ["red cork", "blue shoe"], second.searcher)
    assert third.words == [["cork", "red"], ["blue", "shoe"]]
    assert third.searcher.base == "1"
