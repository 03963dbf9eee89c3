"""A caption from a product's attributes, and attributes from a caption. Knows no model."""

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_BEFORE_KIND = ("colour", "pattern", "material")
"""The order of English adjectives."""
_PLACED = {*_BEFORE_KIND, "kind", "audience", "style", "use"}
_USE_WORDS = ("for", "made for", "good for", "meant for")


def caption_from_attributes(attributes: Mapping[str, str]) -> str:
    """One English sentence that says exactly these attributes, without the empty ones.

    `kind`, `colour`, `pattern`, `material`, `audience`, `style` and `use` have fixed places.
    Others follow, each after its name.
    The kind alone decides which of four wordings is used.
    So the wording adds no noise to the sentences' vectors.
    """
    values = {
        name: " ".join(value.split())
        for name, value in attributes.items()
        if value and value.strip()
    }
    others = [f"{name} {value}" for name, value in values.items() if name not in _PLACED]
    text = ", ".join(filter(None, [*_placed_parts(values), *others]))
    return f"{text[0].upper()}{text[1:]}."


def _placed_parts(values: Mapping[str, str]) -> list[str]:
    """The sentence's parts, of which some may be empty."""
    kind = values.get("kind", "product")
    plural = kind.endswith("s") and not kind.endswith("ss")
    adjectives = [values[name] for name in _BEFORE_KIND if name in values]
    product = _with_article([*adjectives, kind], plural)
    audience = f"for {values['audience']}" if "audience" in values else ""
    style = f"in a {values['style']} style" if "style" in values else ""
    wording = zlib.crc32(kind.encode()) % len(_USE_WORDS)
    use = f"{_USE_WORDS[wording]} {values['use']}" if "use" in values else ""
    if wording == 1:
        product = f"{'these are' if plural else 'this is'} {product}"
    if wording < 2:
        return [f"{product} {audience}".rstrip(), style, use]
    if wording == 3:
        return [audience, product, style, use]
    if "colour" in values:
        product = f"{_with_article([*adjectives[1:], kind], plural)} in {values['colour']}"
    return [product, audience, style, use]


def _with_article(words: list[str], plural: bool) -> str:
    noun = " ".join(words)
    if plural:
        return noun
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def attribute_values(rows: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """All values of each attribute, sorted, as `extract_attributes` takes them."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            if value:
                values.setdefault(name, set()).add(value)
    return {name: sorted(distinct) for name, distinct in values.items()}


class _Phrase(NamedTuple):
    words: tuple[str, ...]
    attribute: str
    value: str


def extract_attributes(text: str, values: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The attributes in `text`: for each, the first of its `values` that occurs as whole words.

    The text is read from left to right. The longest value at a word wins and uses up its words:
    the kind "casual shoes" isn't also the use "casual".
    An attribute without an occurring value is left out.
    """
    phrases = _phrases_by_first_word(values)
    words = _WORD.findall(text.lower())
    extracted: dict[str, str] = {}
    position = 0
    while position < len(words):
        for phrase in phrases.get(words[position], ()):
            end = position + len(phrase.words)
            if phrase.attribute not in extracted and tuple(words[position:end]) == phrase.words:
                extracted[phrase.attribute] = phrase.value
                position = end
                break
        else:
            position += 1
    return extracted


def _phrases_by_first_word(values: Mapping[str, Iterable[str]]) -> dict[str, list[_Phrase]]:
    """The longest phrases come first."""
    phrases = [
        _Phrase(tuple(_WORD.findall(value.lower())), attribute, value)
        for attribute, names in values.items()
        for value in names
    ]
    phrases.sort(key=lambda phrase: -len(phrase.words))
    by_first_word: dict[str, list[_Phrase]] = {}
    for phrase in phrases:
        if phrase.words:
            by_first_word.setdefault(phrase.words[0], []).append(phrase)
    return by_first_word
