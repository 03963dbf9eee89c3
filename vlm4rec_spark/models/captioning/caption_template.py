"""A sentence from a product's attributes, and the attributes that a sentence names. Knows words; no model, no photo."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_LOOK = ("colour", "pattern", "material", "kind")
"""In the order in which English puts them."""
_KNOWN = (*_LOOK, "audience", "style", "use")


def sentence(attributes: Mapping[str, str]) -> str:
    """One English sentence that says these attributes and nothing else; those that are missing or empty it leaves out.

    `kind`, `colour`, `pattern`, `material`, `audience`, `style` and `use` have places of their own, others follow by
    their names. Which of four wordings is used depends on the kind alone: the words between the attributes then add
    no noise to the sentences' vectors.
    """
    said = {
        name: " ".join(value.split())
        for name, value in attributes.items()
        if value and value.strip()
    }
    kind = said.get("kind", "product")
    look = " ".join([said[name] for name in _LOOK if name in said and name != "kind"] + [kind])
    plural = kind.endswith("s") and not kind.endswith("ss")
    wording = zlib.crc32(kind.encode()) % 4
    audience = f"for {said['audience']}" if "audience" in said else ""
    style = f"in a {said['style']} style" if "style" in said else ""
    use, rest = (
        said.get("use", ""),
        [f"{name} {value}" for name, value in said.items() if name not in _KNOWN],
    )
    if wording == 0:
        parts = [
            " ".join(filter(None, [_noun(look, plural), audience])),
            style,
            use and f"for {use}",
        ]
    elif wording == 1:
        shown = f"{'these are' if plural else 'this is'} {_noun(look, plural)}"
        parts = [" ".join(filter(None, [shown, audience])), style, use and f"made for {use}"]
    elif wording == 2:
        coloured = (
            f"{_noun(look.removeprefix(said['colour'] + ' '), plural)} in {said['colour']}"
            if "colour" in said
            else _noun(look, plural)
        )
        parts = [coloured, audience, style, use and f"good for {use}"]
    else:
        parts = [audience, _noun(look, plural), style, use and f"meant for {use}"]
    text = ", ".join(filter(None, [*parts, *rest]))
    return f"{text[0].upper()}{text[1:]}."


def _noun(words: str, plural: bool) -> str:
    return words if plural else f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def vocabulary(rows: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """The values of each attribute, sorted: what `named` looks for."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            if value:
                found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in found.items()}


def named(text: str, values: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The attributes that `text` names: of each the first of its `values` that stands in it, as whole words.

    Read from left to right; where several values begin at a word the longest counts, and its words are used up: the
    kind "casual shoes" isn't the use "casual". An attribute of which no value stands there is missing.
    """
    phrases = sorted(
        (
            (tuple(_WORD.findall(value.lower())), name, value)
            for name, each in values.items()
            for value in each
        ),
        key=lambda phrase: -len(phrase[0]),
    )
    by_first: dict[str, list[tuple[tuple[str, ...], str, str]]] = {}
    for phrase in phrases:
        if phrase[0]:
            by_first.setdefault(phrase[0][0], []).append(phrase)
    words, found, place = _WORD.findall(text.lower()), {}, 0
    while place < len(words):
        taken = 1
        for spelled, name, value in by_first.get(words[place], ()):
            if name not in found and tuple(words[place : place + len(spelled)]) == spelled:
                found[name], taken = value, len(spelled)
                break
        place += taken
    return found
