"""The endpoint backend's protocols: how to send a photo, and where a response has the answer.

Responses are validated here, because the clients accept any shape. Knows no retries.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field

from vlm4rec_spark.models.captioning.captioner import ModelSettings

_REPLACEMENTS = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "response_format": None,
}
"""Parameters that some OpenAI models refuse, and their replacements. Answers are checked anyway."""
_UNSUPPORTED = ("unsupported_parameter", "unsupported_value")


@dataclass(frozen=True)
class ModelResponse:
    text: str | None
    """None if the response has no text. An empty text counts as one."""
    refusal: str | None
    finish_reason: str | None
    """Why the model stopped, in the server's words."""
    input_tokens: int
    output_tokens: int


class OpenAI:
    """Decodes greedily, unless the model refuses the parameter."""

    key_variable = "OPENAI_API_KEY"

    def __init__(self, settings: ModelSettings, key: str, json_schema: dict[str, Any] | None):
        import openai

        self.library: Any = openai
        # The captioner does the waiting and the retries.
        self.client: Any = openai.AsyncOpenAI(
            base_url=settings.endpoint.url, api_key=key, max_retries=0, timeout=None
        )
        self._model = settings.model
        # Not every server knows the newer max_completion_tokens. Others would set no limit at all.
        self._parameters: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": 0}
        if json_schema:
            schema = {"name": "attributes", "schema": json_schema, "strict": True}
            self._parameters["response_format"] = {"type": "json_schema", "json_schema": schema}

    async def send(self, photo: str, prompt: str) -> Any:
        """`photo` is a JPEG in base64."""
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo}"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]
        create = self.client.chat.completions.with_raw_response.create
        while True:
            sent = dict(self._parameters)
            try:
                return await create(model=self._model, messages=messages, **sent)
            except self.library.BadRequestError as failure:
                name = str(failure.param)
                unsupported = failure.code in _UNSUPPORTED and name in _REPLACEMENTS
                if not unsupported or name not in sent:
                    raise
                value = self._parameters.pop(name, None)
                replacement = _REPLACEMENTS[name]
                if replacement and value is not None:  # None: a concurrent request replaced it
                    self._parameters[replacement] = value

    def parse(self, body: bytes) -> ModelResponse:
        """Raises ValidationError if the body isn't a completion."""
        completion = _Completion.model_validate_json(body)
        choice = completion.choices[0]
        usage = completion.usage or _CompletionUsage()
        filtered = "content_filter" if choice.finish_reason == "content_filter" else None
        return ModelResponse(
            _text(choice.message.content),
            choice.message.refusal or filtered,
            choice.finish_reason,
            usage.prompt_tokens or 0,
            usage.completion_tokens or 0,
        )


class Anthropic:
    """Sends no temperature: the protocol refuses it since version 2026-10-21."""

    key_variable = "ANTHROPIC_API_KEY"

    def __init__(self, settings: ModelSettings, key: str, json_schema: dict[str, Any] | None):
        import anthropic

        self.library: Any = anthropic
        self.client: Any = anthropic.AsyncAnthropic(
            base_url=settings.endpoint.url, api_key=key, max_retries=0, timeout=None
        )
        self._model = settings.model
        self._parameters: dict[str, Any] = {"max_tokens": settings.max_new_tokens}
        if json_schema:
            self._parameters["output_config"] = {
                "format": {"type": "json_schema", "schema": json_schema}
            }

    async def send(self, photo: str, prompt: str) -> Any:
        """`photo` is a JPEG in base64."""
        image = {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/jpeg", "data": photo},
        }
        messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]
        create = self.client.messages.with_raw_response.create
        return await create(model=self._model, messages=messages, **self._parameters)

    def parse(self, body: bytes) -> ModelResponse:
        """Raises ValidationError if the body isn't a message."""
        message = _Message.model_validate_json(body)
        text = _text(message.content)
        usage = message.usage or _MessageUsage()
        return ModelResponse(
            text,
            (text or "refusal") if message.stop_reason == "refusal" else None,
            message.stop_reason,
            usage.input_tokens or 0,
            usage.output_tokens or 0,
        )


class _Part(BaseModel):
    """A part of a message. Tool calls and thoughts have no text."""

    text: str | None = None


_Tokens = Annotated[int, Field(ge=0, lt=2**31)] | None


class _ChoiceMessage(BaseModel):
    content: str | list[_Part] | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _ChoiceMessage
    finish_reason: str | None = None


class _CompletionUsage(BaseModel):
    prompt_tokens: _Tokens = None
    completion_tokens: _Tokens = None


class _Completion(BaseModel):
    """OpenAI's response."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _CompletionUsage | None = None


class _MessageUsage(BaseModel):
    input_tokens: _Tokens = None
    output_tokens: _Tokens = None


class _Message(BaseModel):
    """Anthropic's response."""

    content: list[_Part]
    stop_reason: str | None = None
    usage: _MessageUsage | None = None


def _text(content: str | list[_Part] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = [part.text for part in content if part.text is not None]
    return "".join(texts) if texts or not content else None
