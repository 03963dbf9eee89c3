"""The JSON of a structured prompt: what is taken, what is refused, and the text that it becomes."""

from __future__ import annotations

import pytest

from vlm4rec_spark.models.captioning import attributes, caption_checks
from vlm4rec_spark.models.captioning.attributes import Attributes, AttributesError, parse

BOOT = '{"kind": "ankle boot", "colour": "black", "material": "leather", "use": "walking"}'


@pytest.mark.parametrize(
    "answer",
    [
        BOOT,
        f"```json\n{BOOT}\n```",
        f"Here it is: {BOOT} I hope that this helps!",
        '{"kind": " ankle\\n boot. ", "colour": "black", "material": ["leather", null], "use": "walking", "size": 43}',
        '{"use": "walking", "colour": "black", "kind": "ankle boot", "material": "leather", "style": "unknown", '
        '"pattern": "N/A", "occasion": null}',
    ],
)
def test_an_object_is_taken_whatever_stands_around_it(answer: str) -> None:
    found = parse(answer)
    assert found == Attributes(kind="ankle boot", colour="black", material="leather", use="walking")
    assert list(found.known.items()) == [
        ("kind", "ankle boot"),
        ("colour", "black"),
        ("material", "leather"),
        ("use", "walking"),
    ]
    assert found.text == "ankle boot, black, leather, walking."


def test_a_value_is_a_phrase() -> None:
    found = parse(f'{{"kind": "shoe", "colour": ["red", "blue"], "style": "{"very " * 100}"}}')
    assert found.colour == "red, blue"
    assert found.style == ("very " * 20).rstrip()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "no JSON object: "),
        ("A red shoe.", "no JSON object: A red shoe."),
        (
            '{"kind": "shoe", "colour": "dark',
            'the JSON ends early (see caption.model.max_new_tokens): {"kind": "sh',
        ),
        ("{kind: shoe}", "Invalid JSON: key must be a string"),
        ('{"colour": "red"}', "kind: Field required: "),
        ('{"kind": "unknown"}', "kind: it is empty: "),
        (
            '{"kind": "shoe", "colour": {"r": 1}}',
            "colour: Value error, a text, or a list of texts, was asked for: ",
        ),
        ('{"kind": 3}', "kind: Value error, a text"),
        ("{} and {}", "Invalid JSON: trailing characters"),
        ('{"kind":' * 5_000 + "}" * 5_000, "Invalid JSON: recursion limit exceeded"),
    ],
)
def test_what_is_no_such_object_is_refused_and_says_why(answer: str, why: str) -> None:
    with pytest.raises(AttributesError) as refused:
        parse(answer)
    assert str(refused.value).startswith(why)
    assert len(str(refused.value)) < 400


def test_the_prompts_words_and_the_schema_name_the_same_attributes() -> None:
    assert (
        list(attributes.SCHEMA["properties"])
        == attributes.SCHEMA["required"]
        == list(Attributes.model_fields)
    )
    assert attributes.NAMED.startswith('"kind" (what it is), "colour" (its main colours), ')
    full = dict.fromkeys(Attributes.model_fields, "x")
    assert Attributes(**full).text == "x, x, x, x, x, x, x."


def test_an_answer_in_json_is_judged_by_its_text_and_another_by_what_it_is() -> None:
    known = {"kind": "ankle boot", "colour": "black", "material": "leather", "use": "walking"}
    assert caption_checks.structured(BOOT, "Say it.") == (
        "ankle boot, black, leather, walking.",
        known,
        None,
    )
    answers = {
        '{"kind": "boot"}': "too_short",
        "I'm sorry, I can't help with that.": "refusal",
        "": "empty_caption",
        "Say it in JSON, please.": "echo",
        '{"kind": ': "too_short",
        "A pair of boots of black leather": "bad_attributes",
    }
    faults = {
        answer: caption_checks.structured(answer, "Say it in JSON, please.")[2]
        for answer in answers
    }
    assert {answer: fault and fault[0] for answer, fault in faults.items()} == answers
