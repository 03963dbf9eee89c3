"""The index: exact search and ScaNN against brute force, and damaged folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from small_indexes import (
    build_index,
    clustered,
    index_rows,
    mean_recall,
    nearest,
    search_top_k,
    words_of,
)

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.index import build
from vlm4rec_spark.models.index.searcher import Effort, Searcher

ITEMS = 2_000
K = 10


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(200, seed=3)


@pytest.fixture(scope="module")
def exact_lists(searcher: Searcher, queries: np.ndarray) -> np.ndarray:
    return nearest(searcher, queries, K)


def build_small(folder: Path, **changes: object) -> Path:
    """An exact index of three items."""
    arguments = {
        "ids": ["a", "b", "ç/3"],
        "vectors": np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32),
        "texts": ["", "", ""],
        "ann_min_items": 16,
    }
    Searcher.build(folder, "small", **arguments | changes)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def small(tmp_path) -> Path:
    return build_small(tmp_path / "x")


# Exact


def test_the_index_comes_back_from_the_folder(small):
    opened = Searcher.open(small)
    assert opened.index_id == "small"
    assert len(opened) == 3
    assert not opened.approximate
    assert opened.ids.tolist() == opened.arrow_ids.to_pylist() == ["a", "b", "ç/3"]
    assert isinstance(opened.vectors.base, np.memmap)
    positions, scores = opened.score_all(np.array([[0.8, 0.6]], np.float32))
    assert positions.tolist() == [[0, 1, 2]]
    assert_allclose(scores, [[0.8, 0.6, 0.96]], atol=1e-6)


def test_positions_of_unknown_missing_and_repeated_ids(small):
    opened = Searcher.open(small)
    positions = opened.positions(["ç/3", "gone", "a", None, "a", ""])  # type: ignore[list-item]
    assert positions.tolist() == [2, -1, 0, -1, 0, -1]
    assert positions.dtype == np.int64
    assert opened.positions([]).tolist() == []


def test_telling_words_are_rarest_first_without_short_and_stop_words(tmp_path):
    texts = ["A red cup with the handle", "A red hat, RED as it is", "Rouge café no 5 red"]
    opened = Searcher.open(build_small(tmp_path / "x", texts=texts))
    assert words_of(opened) == [["cup", "handle", "red"], ["hat", "red"], ["café", "rouge", "red"]]


@pytest.mark.parametrize(
    "bad_vector",
    [[0, 0], [np.nan, 1], [np.inf, 0], [0, 1.1]],
    ids=["zero", "nan", "infinite", "unscaled"],
)
def test_bad_vectors_are_refused_and_leave_no_folder(tmp_path, bad_vector: list[float]):
    vectors = np.array([[1, 0], bad_vector], np.float32)
    message = r"1 of 2 embeddings are not unit vectors \(zero, .* such as that of 'b'\."
    with pytest.raises(RunError, match=message):
        build_small(tmp_path / "x", ids=["a", "b"], vectors=vectors, texts=["", ""])
    assert not (tmp_path / "x").exists()


def test_an_index_of_nothing_is_refused(tmp_path):
    with pytest.raises(RunError, match="no item has an embedding"):
        build_small(tmp_path / "x", ids=[], vectors=np.empty((0, 2), np.float32), texts=[])


# Damaged folders


def change_format(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 4}))


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(RunError, match=f"{message}.* Run the index stage again.$"):
        Searcher.open(folder)


@pytest.mark.parametrize(
    "manifest",
    [b'{"format": 3, "index', b"[1]", b"\xff\xfe{}"],
    ids=["torn", "other json", "not text"],
)
def test_a_folder_without_a_sound_manifest_is_refused(small, manifest: bytes):
    (small / "manifest.json").write_bytes(manifest)
    assert_refused(small, "is incomplete")
    (small / "manifest.json").unlink()
    assert_refused(small, "is incomplete")
    assert_refused(small / "gone", "is incomplete")


def test_a_folder_of_a_later_format_is_refused(small):
    change_format(small)
    assert_refused(small, "has format 4; this .* reads 3")


@pytest.mark.parametrize("name", ["vectors.npy", "ids.parquet"])
@pytest.mark.parametrize("damage", [Path.unlink, flip_a_byte, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_refused(small, name: str, damage: Callable[[Path], object]):
    damage(small / name)
    assert_refused(small, f"is damaged: {name}")


def test_damaged_scann_codes_are_refused(tmp_path, searcher):
    copy = shutil.copytree(searcher.folder, tmp_path / "copy")
    codes = max((copy / "scann").iterdir(), key=lambda file: file.stat().st_size)
    flip_a_byte(codes)
    assert_refused(copy, f"is damaged: scann/{codes.name}")


def test_a_build_that_dies_in_its_last_write_leaves_no_manifest(tmp_path, monkeypatch):
    def write_half(file: Path, text: str) -> None:
        file.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space left"):
        build_small(tmp_path / "x")
    assert not (tmp_path / "x" / "manifest.json").exists()


def test_a_damaged_index_is_built_again_and_a_sound_one_reused(tmp_path):
    rows = index_rows(["a", "b"], np.eye(2, dtype=np.float32))
    folder = build.build_index(rows, "title", "test", tmp_path, 16)
    vectors_file = folder / "vectors.npy"
    built_at = vectors_file.stat().st_mtime_ns
    assert build.build_index(rows, "title", "test", tmp_path, 16) == folder
    assert vectors_file.stat().st_mtime_ns == built_at
    vectors_file.write_bytes(b"damage")
    assert build.build_index(rows, "title", "test", tmp_path, 16) == folder
    assert Searcher.open(folder).vectors.tolist() == [[1, 0], [0, 1]]


# ScaNN


@pytest.mark.parametrize(
    ("items", "ann_min_items", "approximate"),
    [(31, 32, False), (32, 32, True), (15, 1, False), (16, 1, True)],
)
def test_large_catalogues_get_an_approximate_index(
    tmp_path, items: int, ann_min_items: int, approximate: bool
):
    opened = build_index(tmp_path / "x", clustered(items, seed=2), ann_min_items)
    assert opened.approximate is approximate


def test_more_effort_finds_more(searcher, queries, exact_lists):
    assert searcher.leaf_count == 45
    efforts = (Effort(2, 20), Effort(4, 100), Effort(30, 200), Effort(45, 200))
    recalls = [
        mean_recall(search_top_k(searcher, queries, effort, K), exact_lists) for effort in efforts
    ]
    assert 0.3 < recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] >= 0.97
    assert recalls[3] >= 0.99


def test_many_threads_find_what_one_finds(searcher, queries, monkeypatch):
    """One is Spark's setting for its workers, and the tests' own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    by_one = search_top_k(searcher, queries, Effort(10, 100), K)
    monkeypatch.delenv("OMP_NUM_THREADS")
    by_many = search_top_k(searcher, queries, Effort(10, 100), K)
    assert mean_recall(by_many, by_one) >= 0.99


def test_scores_of_candidates_are_exact_cosines(searcher):
    queries = clustered(20, seed=4)
    positions, scores = searcher.search(queries, Effort(10, 50))
    cosines = np.take_along_axis(queries @ clustered(ITEMS, seed=1).T, positions, 1)
    is_item = positions >= 0
    assert_allclose(scores[is_item], cosines[is_item], atol=1e-6)


def test_a_short_answer_is_padded_and_has_each_item_once(searcher):
    # One leaf may be empty, in some of ScaNN's trees.
    positions = searcher.search(clustered(50, seed=5), Effort(3, 1_500)).positions
    assert positions.shape == (50, 1_500)
    assert (positions == -1).any(axis=1).all()
    for row in positions:
        items = row[row >= 0].tolist()
        assert len(items) == len(set(items)) > 0


def test_no_queries_have_no_candidates(searcher):
    positions, scores = searcher.search(clustered(1, seed=6)[:0], Effort(2, 30))
    assert positions.shape == scores.shape == (0, 30)


def test_more_candidates_than_items_are_all_items(searcher):
    positions = searcher.search(clustered(2, seed=6), Effort(45, 9_999)).positions
    assert [sorted(row) for row in positions.tolist()] == [list(range(ITEMS))] * 2
