"""Prompt texts: packaged files `<name>.<version>.txt`, or a user's own file.

A prompt may contain catalogue fields such as {title}, which are filled in per item.
A prompt that contains {attributes} is structured: its answer is JSON.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.models.captioning import attributes

_PACKAGED = Path(__file__).parent
FIELDS = ("title", "brand", "category")
"""Columns of `items` that a prompt may contain."""
_ATTRIBUTES = "attributes"
_FIELD = re.compile(r"\{(\w*)\}")
_MAX_LENGTH = 200
"""Characters of a field. Some shops fill titles with search words, which models then describe."""
_MARKUP = re.compile(r"[\x00-\x1f\x7f<>\[\]{}|]+")
"""Removed from titles: chat templates have markers such as <image>, <|im_end|> and [INST]."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its id for people: the caption key holds the text.

    The answer to a `structured` prompt is the JSON of `attributes.Attributes`.
    """

    prompt_id: str
    text: str
    structured: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields in the text."""
        return tuple(dict.fromkeys(_FIELD.findall(self.text)))

    def render(self, values: dict[str, str | None]) -> str:
        """The text with cleaned values in place of its fields. A missing value is "unknown"."""
        return _FIELD.sub(
            lambda field: _cleaned(values.get(field[1]) or "") or "unknown", self.text
        )


def load_prompt(name: str, language: str | None = None) -> Prompt:
    """The packaged prompt `name`, or the file at path `name`, to be answered in `language`.

    Raises UsageError if neither exists or the file isn't a prompt.
    """
    packaged = _PACKAGED / f"{name}.txt"
    file = packaged if packaged.is_file() else Path(name)
    text = _read(file, name)
    if file == packaged:
        prompt_id = name
    else:
        prompt_id = f"{file.stem}@{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    structured = _ATTRIBUTES in _FIELD.findall(text)
    text = text.replace(f"{{{_ATTRIBUTES}}}", attributes.PROMPT_KEYS)
    if language:
        # The keys stay English: the program reads them.
        text += f" Write the values in {language}." if structured else f" Answer in {language}."
        prompt_id += f"-{language.lower().replace(' ', '-')}"
    return Prompt(prompt_id, text, structured)


def _read(file: Path, name: str) -> str:
    """A prompt's text on one line. Raises UsageError if the file isn't a prompt."""
    if not file.is_file():
        packaged = ", ".join(sorted(path.stem for path in _PACKAGED.glob("*.txt")))
        raise UsageError(
            f"caption.prompt: there is no prompt {name!r} and no such file. "
            f"Packaged prompts: {packaged}."
        )
    try:
        text = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(
            f"caption.prompt: the file {file} can't be read as UTF-8 text ({failure})."
        ) from None
    if not text:
        raise UsageError(f"caption.prompt: the file {file} is empty.")
    allowed = (*FIELDS, _ATTRIBUTES)
    for field in _FIELD.findall(text):
        if field not in allowed:
            names = ", ".join(f"{{{name}}}" for name in allowed)
            raise UsageError(
                f"caption.prompt: the file {file} contains {{{field}}}; the fields are {names}."
            )
    return text


def _cleaned(value: str) -> str:
    return " ".join(_MARKUP.sub(" ", value).split())[:_MAX_LENGTH].rstrip()
