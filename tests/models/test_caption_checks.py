"""Captions that aren't descriptions are rejected."""

import pytest

from vlm4rec_spark.models.captioning.caption_checks import check_caption

PROMPT = "Describe the product in this photo for somebody who cannot see it. Two sentences at most."


@pytest.mark.parametrize(
    "caption",
    [
        "A red striped cotton shirt in a sporty style.",
        "A thing of red 0, green 4 and blue 0.",
        "A very, very, very soft scarf.",
        "A chair that cannot be folded; I can't see a label.",
        "The product in this photo is a wooden chair with four legs and a round seat.",
        "赤い木綿のシャツ",
        "Ein roter Stuhl aus Holz, schlicht, für die Küche.",
        "A set of plates: a white plate, a blue plate, a green plate and a red plate, "
        "each with a thin golden rim.",
    ],
)
def test_a_description_passes(caption: str):
    assert check_caption(caption, PROMPT) is None


@pytest.mark.parametrize(
    ("caption", "error_class"),
    [
        ("", "empty_caption"),
        (" \n", "empty_caption"),
        ("...", "empty_caption"),
        ("Shirt.", "too_short"),
        ("Red shirt", "too_short"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I\u2019m sorry, no.", "refusal"),
        ("As an AI, I do not see photos.", "refusal"),
        ("Unfortunately, I am unable to view it.", "refusal"),
        (PROMPT, "echo"),
        ("Describe the product in this photo for somebody.", "echo"),
        ("a red shirt " * 12, "repetition"),
        ("shirt " * 20, "repetition"),
        ("椅子" * 20, "repetition"),
        ("A blue bag with a strap. " * 6, "repetition"),
    ],
)
def test_other_texts_are_rejected_with_a_reason(caption: str, error_class: str):
    rejection = check_caption(caption, PROMPT)
    assert rejection
    assert rejection.error_class == error_class
    assert rejection.reason
