"""The protocols of the endpoint backend: how a photo is asked about, and which part of the reply is the answer.

A reply's shape is checked here and not by the clients, which take any. Knows nothing of failures and retries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field

_INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": None, "response_format": None}
"""What some of OpenAI's models refuse, and what they take in its place. Answers are checked in any case."""
_UNSUPPORTED = ("unsupported_parameter", "unsupported_value")


@dataclass(frozen=True)
class Said:
    text: str | None
    """None where the reply has no text; an empty one is a text."""
    refusal: str | None
    end: str | None
    """Why the model stopped, in the server's words."""
    input_tokens: int
    output_tokens: int


class OpenAI:
    """Greedy where the model lets itself be told so."""

    variable = "OPENAI_API_KEY"

    def __init__(
        self,
        model: str,
        max_new_tokens: int,
        url: str | None,
        key: str,
        json_schema: dict[str, Any] | None = None,
    ):
        import openai

        self.library: Any = openai
        # The captioner waits and tries again by itself.
        self.client: Any = openai.AsyncOpenAI(
            base_url=url, api_key=key, max_retries=0, timeout=None
        )
        self._model = model
        # Not every server knows the newer max_completion_tokens, and one that doesn't would set no bound at all.
        self._parameters: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0}
        if json_schema:
            schema = {"name": "attributes", "schema": json_schema, "strict": True}
            self._parameters["response_format"] = {"type": "json_schema", "json_schema": schema}

    async def ask(self, photo: str, prompt: str) -> Any:
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo}"}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]
        create = self.client.chat.completions.with_raw_response.create
        while True:
            sent = dict(self._parameters)
            try:
                return await create(model=self._model, messages=messages, **sent)
            except self.library.BadRequestError as refused:
                name = str(refused.param)
                if not (refused.code in _UNSUPPORTED and name in _INSTEAD and name in sent):
                    raise
                value, instead = self._parameters.pop(name, None), _INSTEAD[name]
                if instead and value is not None:  # None: another request has learnt it meanwhile
                    self._parameters[instead] = value

    def read(self, body: bytes) -> Said:
        """Raises ValidationError where it isn't a reply."""
        reply = _Completion.model_validate_json(body)
        choice, usage = reply.choices[0], reply.usage or _CompletionUsage()
        refusal = choice.message.refusal or (
            "content_filter" if choice.finish_reason == "content_filter" else None
        )
        return Said(
            _text(choice.message.content),
            refusal,
            choice.finish_reason,
            usage.prompt_tokens or 0,
            usage.completion_tokens or 0,
        )


class Anthropic:
    """No temperature is sent: from version 2026-10-21 of the protocol on, which the client speaks, it is an error."""

    variable = "ANTHROPIC_API_KEY"

    def __init__(
        self,
        model: str,
        max_new_tokens: int,
        url: str | None,
        key: str,
        json_schema: dict[str, Any] | None = None,
    ):
        import anthropic

        self.library: Any = anthropic
        self.client: Any = anthropic.AsyncAnthropic(
            base_url=url, api_key=key, max_retries=0, timeout=None
        )
        self._model, self._parameters = model, dict[str, Any](max_tokens=max_new_tokens)
        if json_schema:
            self._parameters["output_config"] = {
                "format": {"type": "json_schema", "schema": json_schema}
            }

    async def ask(self, photo: str, prompt: str) -> Any:
        image = {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/jpeg", "data": photo},
        }
        messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]
        create = self.client.messages.with_raw_response.create
        return await create(model=self._model, messages=messages, **self._parameters)

    def read(self, body: bytes) -> Said:
        """Raises ValidationError where it isn't a reply."""
        reply = _Message.model_validate_json(body)
        text, usage = _text(reply.content), reply.usage or _MessageUsage()
        refusal = (text or "refusal") if reply.stop_reason == "refusal" else None
        return Said(
            text, refusal, reply.stop_reason, usage.input_tokens or 0, usage.output_tokens or 0
        )


class _Part(BaseModel):
    """Of a message. One without a text is a tool's call, or a thought."""

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
    """OpenAI's reply."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _CompletionUsage | None = None


class _MessageUsage(BaseModel):
    input_tokens: _Tokens = None
    output_tokens: _Tokens = None


class _Message(BaseModel):
    """Anthropic's reply."""

    content: list[_Part]
    stop_reason: str | None = None
    usage: _MessageUsage | None = None


def _text(content: str | list[_Part] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = [part.text for part in content if part.text is not None]
    return "".join(texts) if texts or not content else None
