"""Attributes of a product: the JSON that a structured prompt asks for, checked, and the text that is made of it.

Knows no model and no prompt's words.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_LONGEST = 100
"""Characters of a value. A phrase is asked for; what is longer is a description that has gone astray."""
_NOTHING = {
    "",
    "unknown",
    "none",
    "n/a",
    "na",
    "null",
    "not visible",
    "not specified",
    "unspecified",
    "unclear",
}
"""What models write where they are asked to leave a value empty."""


class AttributesError(Exception):
    """The answer isn't what was asked for; says why."""


def _phrase(value: Any) -> str:
    """A text, of several the first ones; "" for what says that nothing is known."""
    parts = value if isinstance(value, list) else [value]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise ValueError("a text, or a list of texts, was asked for")
    words = (" ".join((part or "").split()).strip(" .") for part in parts)
    known = [word for word in words if word.lower() not in _NOTHING]
    return ", ".join(known)[:_LONGEST].rstrip(" ,")


_Phrase = Annotated[str, BeforeValidator(_phrase)]


class Attributes(BaseModel):
    """What a photo says of the product; "" where it doesn't say. The order is that of the text."""

    model_config = ConfigDict(frozen=True)

    kind: Annotated[_Phrase, Field(description="what it is")]
    colour: Annotated[_Phrase, Field(description="its main colours")] = ""
    material: Annotated[_Phrase, Field(description="what it is made of")] = ""
    pattern: Annotated[_Phrase, Field(description="pattern or print")] = ""
    style: Annotated[_Phrase, Field(description="such as sporty, classic or rustic")] = ""
    use: Annotated[_Phrase, Field(description="what it is used for")] = ""
    occasion: Annotated[_Phrase, Field(description="when, where or by whom")] = ""

    @property
    def known(self) -> dict[str, str]:
        """Those that aren't empty."""
        return {name: value for name, value in self if value}

    @property
    def text(self) -> str:
        """What is embedded: the values alone, since names that stand in every text make all texts alike."""
        return ", ".join(self.known.values()) + "."


NAMED = ", ".join(
    f'"{name}" ({field.description})' for name, field in Attributes.model_fields.items()
)
"""The attributes as a prompt names them."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        name: {"type": "string", "description": field.description}
        for name, field in Attributes.model_fields.items()
    },
    # OpenAI and Anthropic take a schema only where it requires every property and allows no other.
    "required": list(Attributes.model_fields),
    "additionalProperties": False,
}
"""The same as a JSON schema, for backends that can hold a model to one."""


def parse(answer: str) -> Attributes:
    """The attributes in a model's answer: its JSON object, whatever stands before and after. Raises AttributesError."""
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0:
        raise AttributesError(f"no JSON object: {answer[:200]}")
    if end < start:
        raise AttributesError(
            f"the JSON ends early (see caption.model.max_new_tokens): {answer[:200]}"
        )
    try:
        found = Attributes.model_validate_json(answer[start : end + 1])
    except ValidationError as wrong:
        first = wrong.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AttributesError(
            f"{f'{place}: ' if place else ''}{first['msg']}: {answer[:200]}"
        ) from None
    if not found.kind:
        raise AttributesError(f"kind: it is empty: {answer[:200]}")
    return found
