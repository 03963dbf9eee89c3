"""What a model said, judged: captions that aren't descriptions are rejected with a reason. Knows text, no model."""

from __future__ import annotations

import re

from vlm4rec_spark.models.captioning import attributes

_WORDS = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")
"""Chinese and Japanese write no spaces: each of their signs counts as a word."""
_FEWEST_WORDS = 3
_REPEATED_WORDS = 12
"""From so many words on a text is looked at for loops: shorter ones may well say a word twice."""
_NGRAM = 3
_ECHO = 0.6
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry\b|i apologi[sz]e|i (can ?not|can'?t|am unable|'m unable|won'?t)|i'?m unable|"
    r"unfortunately,? i|as an ai\b|there is no image|no image (was|is)|please (provide|upload))",
    re.IGNORECASE,
)
"""How English-speaking models begin when they describe nothing; in other languages a refusal passes."""


Fault = tuple[str, str]
"""Class and reason."""


def structured(answer: str, prompt: str) -> tuple[str, dict[str, str], Fault | None]:
    """The text that an answer in JSON becomes, the attributes in it, and its fault, as of `fault` or bad_attributes."""
    try:
        found = attributes.parse(answer)
    except attributes.AttributesError as wrong:
        # A refusal or a loop is called what it is.
        return answer, {}, fault(answer, prompt) or ("bad_attributes", str(wrong))
    return found.text, found.known, fault(found.text, prompt)


def fault(caption: str, prompt: str) -> Fault | None:
    """Class and reason for which a caption isn't one, or None: it will do.

    The classes: empty_caption; too_short, under three words; refusal; echo, where at least 60 % of its three-word
    sequences stand in the prompt; repetition, where fewer than half of twelve or more such sequences are distinct.
    """
    words = _WORDS.findall(caption.lower())
    if not words:
        return "empty_caption", "the model said nothing"
    if _REFUSAL.match(caption.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        return "refusal", f"the model refused: {caption[:200]}"
    if len(words) < _FEWEST_WORDS:
        return "too_short", f"fewer than {_FEWEST_WORDS} words: {caption[:200]}"
    said = _ngrams(words)
    asked = set(_ngrams(_WORDS.findall(prompt.lower())))
    if sum(ngram in asked for ngram in said) >= _ECHO * len(said):
        return "echo", f"the model repeated the prompt: {caption[:200]}"
    if len(said) >= _REPEATED_WORDS and len(set(said)) < len(said) / 2:
        return "repetition", f"the model repeated itself: {caption[:200]}"
    return None


def _ngrams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + _NGRAM]) for place in range(len(words) - _NGRAM + 1)]
