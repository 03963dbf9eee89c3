"""A product's attributes: the JSON that a structured prompt asks for, its checks, and its text.

Knows no model and no prompt's wording.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

_MAX_LENGTH = 100
"""Characters of a value. A longer one is a misplaced description, not a phrase."""
_MISSING = {
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
"""What models write instead of leaving a value empty."""


class AttributesError(Exception):
    """The answer isn't the JSON that was asked for. Its text says why."""


def _phrase(value: Any) -> str:
    """One text, cut to its maximum length; "" if it says that nothing is known."""
    parts = value if isinstance(value, list) else [value]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise ValueError("expected a text or a list of texts")
    words = (" ".join((part or "").split()).strip(" .") for part in parts)
    informative = [word for word in words if word.lower() not in _MISSING]
    return ", ".join(informative)[:_MAX_LENGTH].rstrip(" ,")


_Phrase = Annotated[str, BeforeValidator(_phrase)]


class Attributes(BaseModel):
    """What a photo shows of the product; "" for what it doesn't show. In the order of the text."""

    model_config = ConfigDict(frozen=True)

    kind: _Phrase = Field(description="what it is")
    colour: _Phrase = Field("", description="its main colours")
    material: _Phrase = Field("", description="what it is made of")
    pattern: _Phrase = Field("", description="pattern or print")
    style: _Phrase = Field("", description="such as sporty, classic or rustic")
    use: _Phrase = Field("", description="what it is used for")
    occasion: _Phrase = Field("", description="when, where or by whom")

    @property
    def non_empty(self) -> dict[str, str]:
        """Attributes that have a value."""
        return {name: value for name, value in self if value}

    @property
    def text(self) -> str:
        """The text to embed: values only, because repeated names make all texts similar."""
        return ", ".join(self.non_empty.values()) + "."


PROMPT_KEYS = ", ".join(
    f'"{name}" ({field.description})' for name, field in Attributes.model_fields.items()
)
"""The attributes as a prompt lists them."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        name: {"type": "string", "description": field.description}
        for name, field in Attributes.model_fields.items()
    },
    # OpenAI and Anthropic accept a schema only if it requires every property and allows no others.
    "required": list(Attributes.model_fields),
    "additionalProperties": False,
}
"""The attributes as a JSON schema, for backends with guided decoding."""


def parse(answer: str) -> Attributes:
    """The attributes in an answer's JSON object, whatever surrounds it. Raises AttributesError."""
    start = answer.find("{")
    end = answer.rfind("}")
    if start < 0:
        raise AttributesError(f"no JSON object: {answer[:200]}")
    if end < start:
        raise AttributesError(
            f"the JSON ends early (see caption.model.max_new_tokens): {answer[:200]}"
        )
    try:
        parsed = Attributes.model_validate_json(answer[start : end + 1])
    except ValidationError as invalid:
        error = invalid.errors()[0]
        words = [".".join(map(str, error["loc"])), error["msg"], answer[:200]]
        raise AttributesError(": ".join(filter(None, words))) from None
    if not parsed.kind:
        raise AttributesError(f"kind: it is empty: {answer[:200]}")
    return parsed
