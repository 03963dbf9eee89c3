"""Versions of the index that rest on an earlier one: searched as if built anew, with the words' weights of the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Effort, Searcher

ITEMS, DIMENSION, K = 2_000, 32, 10


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def vectors_of(items: np.ndarray, seed: int = 1) -> np.ndarray:
    """The item's own unit vector, whatever others there are, near one of 40 centres."""
    centres = np.random.default_rng(0).standard_normal((40, DIMENSION))
    drawn = np.stack(
        [np.random.default_rng((seed, int(item))).standard_normal(DIMENSION) for item in items]
    )
    return unit(centres[items % 40] + 0.4 * drawn)


def rows(items: np.ndarray, vectors: np.ndarray, text: str = "") -> pa.Table:
    ids = [f"i{item:05d}" for item in items]
    return pa.table(
        {
            "item_id": ids,
            "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
            "content_sha256": [f"{text}{item}" for item in ids],
            "text": [f"thing {text} {item}" for item in ids],
        }
    )


def built(
    folder: Path,
    items: np.ndarray,
    vectors: np.ndarray,
    base: Searcher | None = None,
    share: float = 0.1,
    ann_min_items: int = 16,
) -> Searcher:
    made = build_index(rows(items, vectors), "caption", "test", folder, ann_min_items, base, share)
    return Searcher.open(made)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    items = np.arange(0, 2 * ITEMS, 2)
    return built(tmp_path_factory.mktemp("index"), items, vectors_of(items))


def later(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Forty items gone, eighty come between the others, and twenty with another vector."""
    rng = np.random.default_rng(seed)
    gone = rng.permutation(ITEMS)[:40] * 2
    came = rng.permutation(ITEMS)[:80] * 2 + 1
    items = np.sort(np.concatenate([np.setdiff1d(np.arange(0, 2 * ITEMS, 2), gone), came]))
    vectors = vectors_of(items)
    changed = rng.permutation(len(items))[:20]
    vectors[changed] = vectors_of(items[changed], seed=2)
    return items, vectors


def test_items_that_came_and_changed_are_found_and_those_that_went_are_not(first: Searcher) -> None:
    items, vectors = later(3)
    second = built(first.folder.parent, items, vectors, first)
    assert (second.base, second.leaves) == (first.index_id, first.leaves)
    assert 95 <= len(second.delta) <= 100
    queries = vectors_of(np.arange(200), seed=5)
    truth = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :K]
    found, scores = second.search(queries, Effort(second.leaves, 400))
    top = np.take_along_axis(
        found, np.argsort(-np.where(found >= 0, scores, -9), axis=1, kind="stable")[:, :K], 1
    )
    shares = [
        len({*mine} & {*theirs}) / K
        for mine, theirs in zip(top.tolist(), truth.tolist(), strict=True)
    ]
    assert np.mean(shares) > 0.999
    there = found >= 0
    assert np.allclose(
        scores[there], np.einsum("qd,qcd->qc", queries, vectors[found])[there], atol=1e-6
    )
    assert all(len({*row}) == len(row) for row in (mine[mine >= 0].tolist() for mine in found))
    # What a smaller search finds are the first of a larger one's, whoever is asked for beside.
    few, _ = second.search(queries, Effort(second.leaves, 50))
    assert few.tolist() == found[:, :50].tolist()
    few, _ = second.search(queries[7:8], Effort(second.leaves, 50))
    assert few[0].tolist() == found[7, :50].tolist()


def test_a_version_that_rests_on_one_that_rests_on_a_base(first: Searcher) -> None:
    """The way there makes no difference: two nights or one, killed between them or not."""
    folder = first.folder.parent
    items, vectors = later(3)
    second = built(folder, items, vectors, first)
    last = (
        np.append(items[30:], 9_999),
        np.append(vectors[30:], vectors_of(np.array([9_999])), axis=0),
    )
    third = built(folder, *last, second)
    assert third.base == first.index_id != second.index_id != third.index_id
    assert third.index_id == built(folder, *last, first).index_id
    assert built(folder, *last, third).index_id == third.index_id
    # An item that went and is back as it was is searched beside the codes, and found.
    items = np.arange(0, 2 * ITEMS, 2)
    back = built(folder, items, vectors_of(items), second)
    queries = vectors_of(items)[back.delta]
    found, _ = back.search(queries, Effort(1, 5))
    assert [
        row[row >= 0][0] for row in found
    ] == back.delta.tolist()  # before it may stand its code, which is gone


def test_too_much_news_another_dimension_or_size_builds_anew(
    first: Searcher, tmp_path: Path
) -> None:
    items, vectors = later(3)
    assert not first.can_be_base([f"i{item:05d}" for item in items], vectors, 16, 0.05)
    assert built(tmp_path, items, vectors, first, share=0.05).base != first.index_id
    assert built(tmp_path, items, unit(vectors[:, :16]), first).base != first.index_id
    assert built(tmp_path, items, vectors, first, ann_min_items=10**6).base != first.index_id
    exact = built(tmp_path, items, vectors, ann_min_items=10**6)
    more = built(tmp_path, items[:-1], vectors[:-1], exact, ann_min_items=10**6)
    assert (more.base, more.approximate) == (exact.index_id, False)


def test_words_keep_the_weights_of_the_base(tmp_path: Path) -> None:
    """red is rarer than blue at first and not afterwards; a word that the base doesn't know is the rarest."""
    vectors = np.eye(5, dtype=np.float32)
    Searcher.build(
        tmp_path / "1", "1", list("abc"), vectors[:3], ["red shoe", "blue shoe", "blue shoe"], 99
    )
    base = Searcher.open(tmp_path / "1")
    texts = ["red shoe", "red shoe", "red shoe linen", "red blue linen cork", "shoe"]
    Searcher.build(tmp_path / "2", "2", list("abcde"), vectors, texts, 99, base)
    Searcher.build(tmp_path / "new", "new", list("abcde"), vectors, texts, 99)

    def words(folder: str) -> list[list[str]]:
        opened = Searcher.open(tmp_path / folder)
        return [
            [opened.vocabulary[word].as_py() for word in row if word >= 0]
            for row in opened.words.tolist()
        ]

    assert words("2")[2:4] == [["linen", "red", "shoe"], ["cork", "linen", "red", "blue"]]
    assert words("new")[3] == ["blue", "cork", "linen", "red"]
    again = Searcher.open(tmp_path / "2")
    Searcher.build(
        tmp_path / "3", "3", list("ab"), vectors[:2], ["red cork", "blue shoe"], 99, again
    )
    assert words("3") == [["cork", "red"], ["blue", "shoe"]]
    assert Searcher.open(tmp_path / "3").base == "1"
