"""The caption audit's metrics by hand; captioners that don't look at the photo are exposed."""

import numpy as np
import pytest
from hostile_photos import encoded
from PIL import Image

from vlm4rec_spark.evaluation import caption_metrics
from vlm4rec_spark.evaluation.caption_metrics import (
    Figure,
    Miss,
    agreement,
    derangement,
    distinct,
    drift,
    mean,
    ranks,
    retrieval,
    spread,
)
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.perturbations import blank_photo, perturbed

COLORS = ("red", "navy blue", "blue", "green")


def values(figures: list[Figure]) -> dict[str, float | None]:
    return {figure.metric: figure.value for figure in figures}


@pytest.mark.parametrize("n", [2, 3, 40])
def test_a_derangement_maps_no_index_to_itself(n: int):
    successors = derangement(n, 0)
    assert sorted(successors) == list(range(n))
    assert not (successors == np.arange(n)).any()


def test_a_derangement_depends_on_the_seed():
    first = derangement(40, 0)
    assert (first == derangement(40, 0)).all()
    assert (first != derangement(40, 1)).any()


def test_a_mean_of_few_gives_no_number():
    assert mean("x", [1.0] * 29, 0) == Figure("x", None, 29)
    assert mean("x", [1.0] * 30, 0, k=7) == Figure("x", 1.0, 30, 1.0, 1.0, 7)
    assert distinct("x", 3, 29).value is None
    assert distinct("x", 12, 40) == Figure("x", 0.3, 40)


def catalogue() -> tuple[list[str], list[dict[str, str | None]]]:
    """40 items, 10 of each color; the captions of eight green ones say red."""
    captions = []
    rows: list[dict[str, str | None]] = []
    for n in range(40):
        color = COLORS[n % 4]
        named = "red" if color == "green" and n >= 8 else color
        captions.append(f"A {named} mug, number {n}.")
        rows.append(
            {
                "colour": color.upper(),
                "code": f"K{n}",
                "kind": "mug",
                "season": None,
                "size": "9 cm" if n % 2 else "8 cm",
            }
        )
    return captions, rows


def test_agreement_is_the_share_whose_caption_names_the_catalogues_value():
    figures, misses = agreement(*catalogue(), seed=0)
    # One kind, a code per item, and sizes that no caption names: these tell nothing.
    names = [figure.metric for figure in figures]
    assert names == ["agreement/colour", "agreement_shuffled/colour"]
    colour = figures[0]
    # The navy blue ones aren't blue ones: the longest phrase counts.
    assert colour.value == pytest.approx(32 / 40)
    assert colour.items == 40
    assert colour.low < colour.value < colour.high  # type: ignore[operator]
    assert misses == [Miss(index, "colour", "green") for index in range(11, 40, 4)]


def test_shuffled_captions_agree_by_chance():
    rows = [{"colour": COLORS[n % 4]} for n in range(400)]
    captions = [f"A {row['colour']} mug." for row in rows]
    metrics = values(agreement(captions, rows, seed=0)[0])
    assert metrics["agreement/colour"] == 1
    assert metrics["agreement_shuffled/colour"] == pytest.approx(0.25, abs=0.06)


def test_captions_that_name_everything_are_no_better_than_shuffled_ones():
    rows = [{"colour": COLORS[n % 4]} for n in range(400)]
    captions = ["It may be red, green, blue or navy blue."] * 400
    figures, misses = agreement(captions, rows, seed=0)
    assert values(figures) == {"agreement/colour": 1, "agreement_shuffled/colour": 1}
    assert misses == []


def test_an_attribute_of_few_items_gives_no_number():
    captions, rows = catalogue()
    assert agreement(captions[:29], rows[:29], 0) == ([], [])
    fewer = [row if n < 29 else {} for n, row in enumerate(rows)]
    assert agreement(captions, fewer, 0) == ([], [])


def test_misses_are_spread_over_attributes_and_items():
    of_a = [Miss(index, "a", "x") for index in range(3)]
    of_b = [Miss(0, "b", "y"), Miss(3, "b", "y")]
    assert spread([*of_a, *of_b], 3) == [of_a[0], of_a[1], of_b[1]]


def test_drift_counts_texts_that_have_changed():
    before = ["A red mug."] * 40
    now = ["A red mug."] * 30 + ["A crimson mug."] * 10
    cosines = np.array([1.0] * 30 + [0.6] * 10)
    metrics = values(drift(before, now, cosines, seed=0))
    assert metrics == {"drift_changed": 0.25, "drift_cosine": pytest.approx(0.9)}
    assert drift([], [], np.zeros(0), 0) == []
    few = values(drift(before[:5], now[:5], np.ones(5), 0))
    assert few["drift_changed"] is None


def test_ranks_by_hand_with_ties_at_the_mean_of_the_tied():
    captions = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1], [0, 1], [0, 1]], np.float32)
    queries = np.array([[1, 0], [0.8, 0.6], [1, 0], [0, 0]], np.float32)
    query_ranks = ranks(queries, captions, np.array([1, 0, 4, 2]))
    # Two of 1.0 share the ranks 1 and 2. One of .96 comes before two of .8.
    # Three of 0 share 4, 5 and 6. Six share 1 to 6.
    assert query_ranks.tolist() == [1.5, 2.5, 5, 3.5]


def self_retrieval(vectors: np.ndarray) -> dict[str, float | None]:
    own_ranks = ranks(vectors, vectors, np.arange(len(vectors)))
    return values(retrieval(own_ranks, len(vectors), seed=0))


def test_one_caption_for_all_fails_every_check():
    captions = ["A nice thing."] * 40
    vectors = np.tile(np.float32([0.6, 0.8]), (40, 1))
    assert distinct("distinct_share", len(set(captions)), 40).value == 1 / 40
    blank = values(
        caption_metrics.blank(
            captions,
            vectors,
            captions[0],
            vectors[0],
            seed=0,
        )
    )
    assert blank["blank_equal"] == 1
    assert blank["blank_cosine"] == blank["pair_cosine"] == pytest.approx(1)
    metrics = self_retrieval(vectors)
    assert metrics["self_median_rank"] == metrics["self_median_rank_chance"] == 20.5
    assert metrics["self_rank_1"] == metrics["self_rank_10"] == 0


def test_captions_of_their_own_are_found_first():
    vectors = np.eye(40, dtype=np.float32)
    metrics = self_retrieval(vectors)
    assert metrics["self_rank_1"] == metrics["self_rank_10"] == metrics["self_median_rank"] == 1
    assert metrics["self_rank_1_chance"] == 1 / 40
    assert metrics["self_rank_10_chance"] == 10 / 40
    captions = [f"Thing {n}." for n in range(40)]
    nothing = np.zeros(40, np.float32)
    blank = caption_metrics.blank(
        captions,
        vectors,
        "A grey wall.",
        nothing,
        0,
    )
    assert [figure.value for figure in blank] == [0, 0, 0]
    assert retrieval(np.zeros(0), 40, seed=0) == []


def test_a_perturbed_photo_is_mirrored_without_its_margins():
    photo = Image.new("RGB", (200, 100), "white")
    photo.paste("red", (0, 0, 100, 100))
    mirrored = decode(perturbed(encoded(photo, "PNG"), 672), 672)
    assert mirrored.size == (188, 94)
    pixels = np.asarray(mirrored)
    left = pixels[47, 20]
    right = pixels[47, 168]
    assert left.min() > 240
    assert right[0] > 240
    assert right[1:].max() < 20


def test_a_blank_photo_is_grey_and_can_be_decoded():
    grey = np.asarray(decode(blank_photo(), 672), int)
    assert 8 < grey.max() - grey.min() < 40
    assert np.ptp(grey, axis=(1, 2)).max() == 0
