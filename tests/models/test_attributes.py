"""The JSON of a structured prompt: what is accepted, what is refused, and its text."""

import json

import pytest

from vlm4rec_spark.models.captioning import attributes
from vlm4rec_spark.models.captioning.attributes import Attributes, AttributesError, parse
from vlm4rec_spark.models.captioning.caption_checks import check_structured

BOOT = '{"kind": "ankle boot", "colour": "black", "material": "leather", "use": "walking"}'
BOOT_ATTRIBUTES = json.loads(BOOT)


@pytest.mark.parametrize(
    "answer",
    [
        BOOT,
        f"```json\n{BOOT}\n```",
        f"Here it is: {BOOT} I hope that this helps!",
        '{"kind": " ankle\\n boot. ", "colour": "black", "material": ["leather", null], '
        '"use": "walking", "size": 43}',
        '{"use": "walking", "colour": "black", "kind": "ankle boot", "material": "leather", '
        '"style": "unknown", "pattern": "N/A", "occasion": null}',
    ],
)
def test_an_object_is_accepted_whatever_surrounds_it(answer: str):
    boot = parse(answer)
    assert boot == Attributes(**BOOT_ATTRIBUTES)
    assert list(boot.non_empty.items()) == list(BOOT_ATTRIBUTES.items())
    assert boot.text == "ankle boot, black, leather, walking."


def test_a_value_is_a_phrase():
    shoe = parse(f'{{"kind": "shoe", "colour": ["red", "blue"], "style": "{"very " * 100}"}}')
    assert shoe.colour == "red, blue"
    assert shoe.style == ("very " * 20).rstrip()


@pytest.mark.parametrize(
    ("answer", "message"),
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
            "colour: Value error, expected a text or a list of texts: ",
        ),
        ('{"kind": 3}', "kind: Value error, expected a text"),
        ("{} and {}", "Invalid JSON: trailing characters"),
        ('{"kind":' * 5_000 + "}" * 5_000, "Invalid JSON: recursion limit exceeded"),
    ],
)
def test_other_answers_are_refused_with_a_reason(answer: str, message: str):
    with pytest.raises(AttributesError) as failure:
        parse(answer)
    assert str(failure.value).startswith(message)
    assert len(str(failure.value)) < 400


def test_the_prompt_and_the_schema_have_the_same_attributes():
    assert (
        list(attributes.SCHEMA["properties"])
        == attributes.SCHEMA["required"]
        == list(Attributes.model_fields)
    )
    assert attributes.PROMPT_KEYS.startswith('"kind" (what it is), "colour" (its main colours), ')
    full = dict.fromkeys(Attributes.model_fields, "x")
    assert Attributes(**full).text == "x, x, x, x, x, x, x."


def test_an_answer_in_json_is_checked_by_its_text():
    checked = check_structured(BOOT, "Say it.")
    assert checked == ("ankle boot, black, leather, walking.", BOOT_ATTRIBUTES, None)
    error_classes = {
        '{"kind": "boot"}': "too_short",
        "I'm sorry, I can't help with that.": "refusal",
        "": "empty_caption",
        "Say it in JSON, please.": "echo",
        '{"kind": ': "too_short",
        "A pair of boots of black leather": "bad_attributes",
    }
    for answer, error_class in error_classes.items():
        rejection = check_structured(answer, "Say it in JSON, please.").rejection
        assert rejection
        assert rejection.error_class == error_class, answer
