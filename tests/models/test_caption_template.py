"""Sentences from attributes, and attributes from sentences: one is the other's inverse."""

from __future__ import annotations

import itertools

import pytest

from vlm4rec_spark.models.captioning.caption_template import named, sentence, vocabulary

VALUES = {
    "kind": ["shirt", "casual shoes", "evening dress", "dress", "sports shoes"],
    "colour": ["blue", "navy blue", "orange"],
    "material": ["cotton"],
    "audience": ["men", "women", "men and women"],
    "use": ["sports", "everyday use", "casual wear"],
}


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"kind": "shirt"}, "A navy blue shirt for men, for everyday use."),
        ({"kind": "casual shoes"}, "Casual shoes in navy blue, for men, good for everyday use."),
        ({"kind": "dress"}, "For men, a navy blue dress, meant for everyday use."),
        ({"kind": "watch"}, "A watch in navy blue, for men, good for everyday use."),
        ({"kind": "kurta"}, "This is a navy blue kurta for men, made for everyday use."),
    ],
)
def test_each_kind_has_its_wording(attributes: dict[str, str], said: str) -> None:
    assert (
        sentence(attributes | {"colour": "navy blue", "audience": "men", "use": "everyday use"})
        == said
    )


def test_what_is_not_known_is_not_said() -> None:
    assert sentence({"kind": "dress"}) == "A dress."
    assert sentence({"kind": "dress", "colour": "", "pattern": "  "}) == "A dress."
    assert sentence({"colour": "orange"}) == "This is an orange product."
    assert sentence(
        {"kind": "dress", "pattern": "striped", "material": "cotton", "style": "rustic"}
    ) == ("A striped cotton dress, in a rustic style.")
    assert (
        sentence({"kind": "dress", "season": "summer\n and spring"})
        == "A dress, season summer and spring."
    )


def test_a_sentence_names_what_it_was_made_of() -> None:
    made = 0
    for values in itertools.product(*([None, *each] for each in VALUES.values())):
        attributes = {name: value for name, value in zip(VALUES, values, strict=True) if value}
        if attributes:
            assert named(sentence(attributes), VALUES) == attributes, sentence(attributes)
            made += 1
    assert made == 6 * 4 * 2 * 4 * 4 - 1


def test_the_longest_phrase_counts_and_its_words_are_used_up() -> None:
    values = {"kind": ["sports shoes", "dress"], "use": ["sports"], "colour": ["blue", "navy blue"]}
    assert named("Navy blue sports shoes.", values) == {
        "colour": "navy blue",
        "kind": "sports shoes",
    }
    assert named("Sports shoes for sports, not a dress.", values) == {
        "kind": "sports shoes",
        "use": "sports",
    }
    # Whole words only, and hyphens belong to them.
    assert named("A bluegreen address of t-shirts", values | {"top": ["shirts"]}) == {}
    assert named("", values) == {}


def test_the_vocabulary_holds_each_value_once() -> None:
    rows = [{"kind": "dress", "colour": "red"}, {"kind": "hat", "colour": ""}, {"kind": "dress"}]
    assert vocabulary(rows) == {"kind": ["dress", "hat"], "colour": ["red"]}
