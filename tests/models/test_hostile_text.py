"""Hostile texts for the encoder and the index: no exception, and no endless computation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm4rec_spark.models.encoding.text_encoder import clean, load_embedder
from vlm4rec_spark.models.index.telling_words import telling_words

MILLION = 1_000_000
FRAGMENTS = (
    "<",
    ">",
    "<script",
    "</script>",
    "<style>",
    "<!--",
    "&",
    "&#",
    "&#x",
    "&lt;",
    ";",
    "0",
    "99999999",
    " ",
    "\x00",
    "a",
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    text=st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join), max_words=st.integers(1, 5)
)
def test_any_text_becomes_printable_and_short(text: str, max_words: int):
    cleaned = clean(text, max_words)
    assert cleaned.isprintable()
    assert cleaned == " ".join(cleaned.split())
    assert len(cleaned.split()) <= max_words
    (vector,) = load_embedder("fake", "main").embed([cleaned])
    assert abs(np.linalg.norm(vector) - 1) < 1e-3


@pytest.mark.parametrize(
    ("fragment", "times"),
    [
        ("<", MILLION),
        ("<a ", MILLION),
        ("<script", 100_000),
        ("<script></script ", 100_000),
        ("<!--", MILLION),
        ("&", MILLION),
        ("&#9", MILLION),
        ("x", MILLION),
        ("word ", MILLION),
        ("\u0301", MILLION),
        ("\x00", MILLION),
    ],
)
def test_a_text_of_a_million_characters(fragment: str, times: int):
    cleaned = clean(fragment * times, 256)
    assert len(cleaned.split()) <= 256
    words = telling_words([cleaned]).vocabulary
    assert set(words) <= set(cleaned.lower().split())


@pytest.mark.parametrize("number", ["99999999", "9" * 5_000, "x" + "f" * 5_000])
def test_the_number_of_no_character(number: str):
    assert clean(f"a&#{number};", 256) in ("a", "a\ufffd")
