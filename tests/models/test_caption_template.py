"""Captions from attributes and attributes from captions: each is the other's inverse."""

import itertools

import pytest

from vlm4rec_spark.models.captioning.caption_template import (
    attribute_values,
    caption_from_attributes,
    extract_attributes,
)

VALUES = {
    "kind": ["shirt", "casual shoes", "evening dress", "dress", "sports shoes"],
    "colour": ["blue", "navy blue", "orange"],
    "material": ["cotton"],
    "audience": ["men", "women", "men and women"],
    "use": ["sports", "everyday use", "casual wear"],
}


@pytest.mark.parametrize(
    ("kind", "caption"),
    [
        ("shirt", "A navy blue shirt for men, for everyday use."),
        ("casual shoes", "Casual shoes in navy blue, for men, good for everyday use."),
        ("dress", "For men, a navy blue dress, meant for everyday use."),
        ("watch", "A watch in navy blue, for men, good for everyday use."),
        ("kurta", "This is a navy blue kurta for men, made for everyday use."),
    ],
)
def test_the_kind_decides_the_wording(kind: str, caption: str):
    attributes = {"kind": kind, "colour": "navy blue", "audience": "men", "use": "everyday use"}
    assert caption_from_attributes(attributes) == caption


@pytest.mark.parametrize(
    ("attributes", "caption"),
    [
        ({"kind": "dress"}, "A dress."),
        ({"kind": "dress", "colour": "", "pattern": "  "}, "A dress."),
        ({"colour": "orange"}, "This is an orange product."),
        (
            {"kind": "dress", "pattern": "striped", "material": "cotton", "style": "rustic"},
            "A striped cotton dress, in a rustic style.",
        ),
        ({"kind": "dress", "season": "summer\n and spring"}, "A dress, season summer and spring."),
    ],
)
def test_missing_attributes_are_left_out(attributes: dict[str, str], caption: str):
    assert caption_from_attributes(attributes) == caption


def test_a_caption_gives_its_attributes_back():
    choices = itertools.product(*([None, *values] for values in VALUES.values()))
    products = [
        {name: value for name, value in zip(VALUES, choice, strict=True) if value}
        for choice in choices
    ]
    products.remove({})
    assert len(products) == 6 * 4 * 2 * 4 * 4 - 1
    for attributes in products:
        caption = caption_from_attributes(attributes)
        assert extract_attributes(caption, VALUES) == attributes, caption


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("Navy blue sports shoes.", {"colour": "navy blue", "kind": "sports shoes"}),
        ("Sports shoes for sports, not a dress.", {"kind": "sports shoes", "use": "sports"}),
        # Whole words only. A hyphen is part of a word.
        ("A bluegreen address of t-shirts", {}),
        ("", {}),
    ],
)
def test_the_longest_phrase_wins_and_uses_up_its_words(text: str, attributes: dict[str, str]):
    values = {
        "kind": ["sports shoes", "dress"],
        "use": ["sports"],
        "colour": ["blue", "navy blue"],
        "top": ["shirts"],
    }
    assert extract_attributes(text, values) == attributes


def test_attribute_values_are_distinct_and_sorted():
    rows = [{"kind": "dress", "colour": "red"}, {"kind": "hat", "colour": ""}, {"kind": "dress"}]
    assert attribute_values(rows) == {"kind": ["dress", "hat"], "colour": ["red"]}
