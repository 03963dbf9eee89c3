"""The protocol of captioning backends, and their settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from PIL.Image import Image
from pydantic import Field, model_validator

from vlm4rec_spark.models.model_id import pinned_id
from vlm4rec_spark.settings_base import Settings

MAX_WAIT_SECONDS = 60.0
"""Providers set limits per minute. A server that asks for a longer wait is down."""
PACKAGED_MODEL = Path(__file__).with_name("packaged")


@dataclass(frozen=True)
class Request:
    """A photo (RGB), its prompt, and the key that its answer carries."""

    key: str
    image: Image
    prompt: str


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: a text, perhaps an empty one, or an error class."""

    key: str
    text: str | None
    input_tokens: int | None = None
    output_tokens: int | None = None
    error_class: str | None = None
    error: str | None = None


class Captioner(Protocol):
    """A stream: requests go in one by one, and one answer per request comes out, in any order.

    One thread drives it: it adds the requests at hand, calls `step`, and repeats.
    """

    max_in_flight: int
    """The most requests to give it before they are answered. Enough to keep it busy."""
    batch_size: int
    """`step` is efficient from this many requests on. With fewer, wait if more are coming."""
    on_begin: Callable[[Sequence[str]], None] = staticmethod(lambda keys: None)
    """Called with the keys of requests as their work begins: suspects, if the process ends now."""

    def add(self, request: Request) -> None:
        """Queue a request. Returns at once."""

    def step(self) -> list[Answer]:
        """Work until some requests are answered. Not called while there are none.

        An error in one request is that request's answer.
        Raises RunError, which ends the run, when no request can be served: a wrong key, say.
        """


def caption_all(captioner: Captioner, requests: Sequence[Request]) -> dict[str, Answer]:
    """Answers by key, in the order of the requests. Meant for a few requests at a time."""
    for request in requests:
        captioner.add(request)
    answers: dict[str, Answer] = {}
    while len(answers) < len(requests):
        answers |= {answer.key: answer for answer in captioner.step()}
    return {request.key: answers[request.key] for request in requests}


class EndpointSettings(Settings):
    """The endpoint backend's server and limits. No part of the caption key: they change no text."""

    dialect: Literal["openai", "anthropic"] = "openai"
    # No credentials in it: it appears in error messages, and the settings are stored in tables.
    url: str | None = Field(None, pattern=r"^https?://[^\s@?]+$")
    # The clients open at most a thousand connections.
    concurrency: int = Field(16, ge=1, le=1_000)
    timeout_seconds: float = Field(60.0, gt=0)
    tries: int = Field(5, ge=1, le=20)
    tokens_per_minute: int | None = Field(None, ge=1)


class ModelSettings(Settings):
    """The model and what changes its text. The key leaves out `endpoint` and `torch_compile`."""

    backend: Literal["transformers", "vllm", "endpoint", "fake"] = "transformers"
    model: str = "packaged"
    revision: str = "main"
    max_new_tokens: int = Field(64, ge=1)
    max_side: int = Field(672, ge=16)
    torch_compile: bool = False
    endpoint: EndpointSettings = EndpointSettings()

    @model_validator(mode="after")
    def _vllm_needs_a_model(self) -> Self:
        if (self.backend, self.model) == ("vllm", "packaged"):
            raise ValueError("vLLM doesn't read the packaged model's weights: name another model")
        return self

    @property
    def source(self) -> str:
        return str(PACKAGED_MODEL) if self.model == "packaged" else self.model

    @property
    def max_silence_seconds(self) -> float:
        """How long a healthy captioner may go without an answer: the endpoint retries."""
        if self.backend != "endpoint":
            return 0.0
        return self.endpoint.tries * (self.endpoint.timeout_seconds + 2 * MAX_WAIT_SECONDS)

    def model_id(self) -> str:
        """The model's name, at its revision or content hash. UsageError for a missing folder."""
        if self.backend == "fake":
            return f"fake-{self.model}@1"
        if self.backend == "endpoint":
            revision = f"@{self.revision}" if self.revision != "main" else ""
            return f"{self.model}@endpoint{revision}"
        return pinned_id("caption.model.model", self.source, self.revision)
