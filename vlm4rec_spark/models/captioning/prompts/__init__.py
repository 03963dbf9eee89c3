"""Prompt texts: files named `<name>.<version>.txt`, found by `<name>.<version>` or by the path of one's own file.

A prompt may name fields of the catalogue, such as {title}: each photo is then asked about with its item's own. One
that names {attributes} is structured: its answer is JSON.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning import attributes

_PACKAGED = Path(__file__).parent
FIELDS = ("title", "brand", "category")
"""Columns of `items` that a prompt may name."""
_ATTRIBUTES = "attributes"
_FIELD = re.compile(r"\{(\w*)\}")
_LONGEST = 200
"""Characters of a field: shops stuff titles with search words, and models then describe those."""
_MARKUP = re.compile(r"[\x00-\x1f\x7f<>\[\]{}|]+")
"""What chat templates and processors make their marks of (<image>, <|im_end|>, [INST]): a title holds none of it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's id (for people; its text is what the caption key holds) and its text.

    The answer to one that is `structured` is the JSON of `attributes.Attributes`.
    """

    prompt_id: str
    text: str
    structured: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it names."""
        return tuple(dict.fromkeys(_FIELD.findall(self.text)))

    def about(self, values: dict[str, str | None]) -> str:
        """The text with the fields' values in place of their names, cleaned; "unknown" for one that is missing."""
        return _FIELD.sub(
            lambda named: _cleaned(values.get(named[1]) or "") or "unknown", self.text
        )


def load_prompt(name: str, language: str | None = None) -> Prompt:
    """The packaged prompt `name`, or the file at the path `name`, to be answered in `language`.

    Raises UsageError when there is neither, or when the file is no prompt.
    """
    packaged = _PACKAGED / f"{name}.txt"
    file = packaged if packaged.is_file() else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in _PACKAGED.glob("*.txt")))
        raise UsageError(
            f"caption.prompt: there is no prompt {name!r} and no such file. Packaged prompts: {known}."
        )
    try:
        text = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as broken:
        raise UsageError(
            f"caption.prompt: the file {file} can't be read as UTF-8 text ({broken})."
        ) from None
    if not text:
        raise UsageError(f"caption.prompt: the file {file} is empty.")
    for field in Prompt("", text).fields:
        if field not in (*FIELDS, _ATTRIBUTES):
            known = ", ".join(f"{{{field}}}" for field in (*FIELDS, _ATTRIBUTES))
            raise UsageError(
                f"caption.prompt: the file {file} names {{{field}}}; the fields are {known}."
            )
    prompt_id = (
        name if file == packaged else f"{file.stem}@{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )
    structured = _ATTRIBUTES in Prompt("", text).fields
    text = text.replace(f"{{{_ATTRIBUTES}}}", attributes.NAMED)
    if language:
        # The keys are the program's.
        text += f" Write the values in {language}." if structured else f" Answer in {language}."
        prompt_id += f"-{language.lower().replace(' ', '-')}"
    return Prompt(prompt_id, text, structured)


def _cleaned(value: str) -> str:
    return " ".join(_MARKUP.sub(" ", value).split())[:_LONGEST].rstrip()
