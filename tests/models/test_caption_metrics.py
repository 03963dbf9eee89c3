"""The caption audit's figures worked out by hand, and captioners that don't look at the photo shown up by them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vlm4rec_spark.evaluation import caption_metrics
from vlm4rec_spark.evaluation.caption_metrics import Figure, Miss
from vlm4rec_spark.models.photos.decode import decode
from vlm4rec_spark.models.photos.perturbations import blank_photo, perturbed

COLOURS = ("red", "navy blue", "blue", "green")


def value(figures: list[Figure], metric: str) -> float | None:
    (figure,) = (figure for figure in figures if figure.metric == metric)
    return figure.value


@pytest.mark.parametrize("n", [2, 3, 40])
def test_a_derangement_gives_everybody_another_and_leaves_nobody_out(n: int) -> None:
    others = caption_metrics.derangement(n, 0)
    assert sorted(others) == list(range(n))
    assert not (others == np.arange(n)).any()
    assert (caption_metrics.derangement(40, 0) == caption_metrics.derangement(40, 0)).all()
    assert (caption_metrics.derangement(40, 0) != caption_metrics.derangement(40, 1)).any()


def test_a_mean_of_few_gives_no_number() -> None:
    assert caption_metrics.mean("x", [1.0] * 29, 0) == Figure("x", None, 29)
    assert caption_metrics.mean("x", [1.0] * 30, 0, k=7) == Figure("x", 1.0, 30, 1.0, 1.0, 7)
    assert caption_metrics.distinct("x", 3, 29).value is None
    assert caption_metrics.distinct("x", 12, 40) == Figure("x", 0.3, 40)


def catalogue() -> tuple[list[str], list[dict[str, str | None]]]:
    """40 items, 10 of each colour; the captions of eight green ones say red."""
    colours = [COLOURS[n % 4] for n in range(40)]
    seen = ["red" if n % 4 == 3 and n >= 8 else colour for n, colour in enumerate(colours)]
    rows: list[dict[str, str | None]] = [
        {
            "colour": colour.upper(),
            "code": f"K{n}",
            "kind": "mug",
            "season": None,
            "size": "9 cm" if n % 2 else "8 cm",
        }
        for n, colour in enumerate(colours)
    ]
    return [
        f"A {colour} mug, {number} of {seen.count(colour)}." for number, colour in enumerate(seen)
    ], rows


def test_agreement_is_the_share_whose_caption_names_the_catalogues_value() -> None:
    figures, misses = caption_metrics.agreement(*catalogue(), seed=0)
    # One kind, as many codes as items and sizes that no caption names: nothing can be said of them.
    assert [figure.metric for figure in figures] == [
        "agreement/colour",
        "agreement_shuffled/colour",
    ]
    # The navy blue ones aren't blue ones: the longest phrase counts.
    assert (figures[0].value, figures[0].items) == (pytest.approx(32 / 40), 40)
    assert figures[0].low < figures[0].value < figures[0].high  # type: ignore[operator]
    assert misses == [Miss(place, "colour", "green") for place in range(11, 40, 4)]


def test_shuffled_captions_agree_as_chance_would_have_it_and_so_do_captions_that_name_everything() -> (
    None
):
    rows = [{"colour": COLOURS[n % 4]} for n in range(400)]
    right = [f"A {row['colour']} mug." for row in rows]
    found, _ = caption_metrics.agreement(right, rows, seed=0)
    assert value(found, "agreement/colour") == 1
    assert value(found, "agreement_shuffled/colour") == pytest.approx(0.25, abs=0.06)
    found, misses = caption_metrics.agreement(
        ["It may be red, green, blue or navy blue."] * 400, rows, seed=0
    )
    assert (
        value(found, "agreement/colour"),
        value(found, "agreement_shuffled/colour"),
        misses,
    ) == (1, 1, [])


def test_an_attribute_of_few_items_gives_no_number() -> None:
    captions, rows = catalogue()
    assert caption_metrics.agreement(captions[:29], rows[:29], 0) == ([], [])
    fewer = [row if n < 29 else {} for n, row in enumerate(rows)]
    assert caption_metrics.agreement(captions, fewer, 0) == ([], [])


def test_misses_are_spread_over_attributes_and_items() -> None:
    found = [
        Miss(0, "a", "x"),
        Miss(1, "a", "x"),
        Miss(2, "a", "x"),
        Miss(0, "b", "y"),
        Miss(3, "b", "y"),
    ]
    assert caption_metrics.spread(found, 3) == [
        Miss(0, "a", "x"),
        Miss(1, "a", "x"),
        Miss(3, "b", "y"),
    ]


def test_drift_counts_texts_that_have_changed() -> None:
    before, now = ["A red mug."] * 40, ["A red mug."] * 30 + ["A crimson mug."] * 10
    found = caption_metrics.drift(before, now, np.array([1.0] * 30 + [0.6] * 10), seed=0)
    assert (value(found, "drift_changed"), value(found, "drift_cosine")) == (
        0.25,
        pytest.approx(0.9),
    )
    assert caption_metrics.drift([], [], np.zeros(0), 0) == []
    assert value(caption_metrics.drift(before[:5], now[:5], np.ones(5), 0), "drift_changed") is None


def test_ranks_by_hand_with_ties_at_the_mean_of_the_tied() -> None:
    known = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1], [0, 1], [0, 1]], np.float32)
    said = np.array([[1, 0], [0.8, 0.6], [1, 0], [0, 0]], np.float32)
    # Two of 1.0 share the ranks 1 and 2; .96 is before two of .8; three of 0 share 4, 5 and 6; six share 1 to 6.
    assert caption_metrics.ranks(said, known, np.array([1, 0, 4, 2])).tolist() == [1.5, 2.5, 5, 3.5]


def test_one_caption_for_all_is_shown_up_by_every_figure() -> None:
    captions, vectors = ["A nice thing."] * 40, np.tile(np.float32([0.6, 0.8]), (40, 1))
    assert caption_metrics.distinct("distinct_share", len(set(captions)), 40).value == 1 / 40
    found = caption_metrics.blank(captions, vectors, "A nice thing.", vectors[0], seed=0)
    assert value(found, "blank_equal") == 1
    assert value(found, "blank_cosine") == value(found, "pair_cosine") == pytest.approx(1)
    found = caption_metrics.retrieval(
        caption_metrics.ranks(vectors, vectors, np.arange(40)), 40, seed=0
    )
    assert value(found, "self_median_rank") == value(found, "self_median_rank_chance") == 20.5
    assert value(found, "self_rank_1") == value(found, "self_rank_10") == 0


def test_captions_of_their_own_are_found_first() -> None:
    vectors = np.eye(40, dtype=np.float32)
    found = caption_metrics.retrieval(
        caption_metrics.ranks(vectors, vectors, np.arange(40)), 40, seed=0
    )
    assert [value(found, name) for name in ("self_rank_1", "self_rank_10", "self_median_rank")] == [
        1,
        1,
        1,
    ]
    assert value(found, "self_rank_1_chance") == 1 / 40
    assert value(found, "self_rank_10_chance") == 10 / 40
    found = caption_metrics.blank(
        [f"Thing {n}." for n in range(40)], vectors, "A grey wall.", np.zeros(40, np.float32), 0
    )
    assert [figure.value for figure in found] == [0, 0, 0]
    assert caption_metrics.retrieval(np.zeros(0), 40, seed=0) == []


def test_a_photo_taken_again_is_mirrored_without_its_margins_and_one_of_nothing_can_be_shown() -> (
    None
):
    photo = Image.new("RGB", (200, 100), "white")
    photo.paste("red", (0, 0, 100, 100))
    out = io.BytesIO()
    photo.save(out, "PNG")
    again = decode(perturbed(out.getvalue(), 672), 672)
    assert again.size == (188, 94)
    left, right = (again.getpixel((x, 47)) for x in (20, 168))
    assert min(left) > 240 and right[0] > 240 and max(right[1:]) < 20  # type: ignore[arg-type,type-var,index]
    grey = np.asarray(decode(blank_photo(), 672), int)
    assert 8 < grey.max() - grey.min() < 40
    assert np.ptp(grey, axis=(1, 2)).max() == 0
