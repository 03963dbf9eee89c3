"""Prompt texts: files named `<name>.<version>.txt`, found by `<name>.<version>` or by the path of one's own file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vlm4rec_spark.errors import UsageError

_PACKAGED = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """A prompt's id (for people; its text is what the caption key holds) and its text."""

    prompt_id: str
    text: str


def load_prompt(name: str) -> Prompt:
    """The packaged prompt `name`, or the file at the path `name`. Raises UsageError when there is neither."""
    packaged = _PACKAGED / f"{name}.txt"
    file = packaged if packaged.is_file() else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in _PACKAGED.glob("*.txt")))
        raise UsageError(f"caption.prompt: there is no prompt {name!r} and no such file. Packaged prompts: {known}.")
    try:
        text = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as broken:
        raise UsageError(f"caption.prompt: the file {file} can't be read as UTF-8 text ({broken}).") from None
    if not text:
        raise UsageError(f"caption.prompt: the file {file} is empty.")
    if file == packaged:
        return Prompt(name, text)
    return Prompt(f"{file.stem}@{hashlib.sha256(text.encode()).hexdigest()[:8]}", text)
