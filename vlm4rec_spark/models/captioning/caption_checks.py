"""Rejects captions that aren't descriptions, with a reason. Knows text; knows no model."""

import re
from typing import NamedTuple

from vlm4rec_spark.models.captioning import attributes

_WORDS = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")
"""Chinese and Japanese are written without spaces: each character counts as a word."""
_MIN_WORDS = 3
_NGRAM = 3
_MIN_NGRAMS_FOR_REPETITION = 12
"""A shorter text may well repeat a word."""
_ECHO_SHARE = 0.6
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry\b|i apologi[sz]e"
    r"|i (can ?not|can'?t|am unable|'m unable|won'?t)|i'?m unable|unfortunately,? i|as an ai\b"
    r"|there is no image|no image (was|is)|please (provide|upload))",
    re.IGNORECASE,
)
"""How English-speaking models begin a refusal. Refusals in other languages pass."""


class CaptionRejection(NamedTuple):
    """Why a text isn't a caption."""

    error_class: str
    reason: str


class CheckedAnswer(NamedTuple):
    """A structured answer's text and attributes, and why it is rejected if it is."""

    text: str
    attributes: dict[str, str]
    rejection: CaptionRejection | None


def check_structured(answer: str, prompt: str) -> CheckedAnswer:
    """Parse an answer in JSON and check its text.

    Its rejection has a class of `check_caption`, or else bad_attributes.
    """
    try:
        parsed = attributes.parse(answer)
    except attributes.AttributesError as failure:
        # A refusal or a loop keeps its own class.
        rejection = check_caption(answer, prompt) or CaptionRejection(
            "bad_attributes", str(failure)
        )
        return CheckedAnswer(answer, {}, rejection)
    return CheckedAnswer(parsed.text, parsed.non_empty, check_caption(parsed.text, prompt))


def check_caption(caption: str, prompt: str) -> CaptionRejection | None:
    """Why `caption` isn't a description; None if it is one.

    The classes, of which n-grams have three words:
    empty_caption;
    refusal;
    too_short: under three words;
    echo: at least 60 % of its n-grams are in the prompt;
    repetition: of at least twelve n-grams, under half are distinct.
    """
    words = _WORDS.findall(caption.lower())
    if not words:
        return CaptionRejection("empty_caption", "the model said nothing")
    if _REFUSAL.match(caption.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        return CaptionRejection("refusal", f"the model refused: {caption[:200]}")
    if len(words) < _MIN_WORDS:
        return CaptionRejection("too_short", f"fewer than {_MIN_WORDS} words: {caption[:200]}")
    ngrams = _ngrams(words)
    prompt_ngrams = set(_ngrams(_WORDS.findall(prompt.lower())))
    if sum(ngram in prompt_ngrams for ngram in ngrams) >= _ECHO_SHARE * len(ngrams):
        return CaptionRejection("echo", f"the model repeated the prompt: {caption[:200]}")
    if len(ngrams) >= _MIN_NGRAMS_FOR_REPETITION and len(set(ngrams)) < len(ngrams) / 2:
        return CaptionRejection("repetition", f"the model repeated itself: {caption[:200]}")
    return None


def _ngrams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1)]
