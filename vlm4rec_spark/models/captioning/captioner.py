"""Captioners: photos and prompts in, descriptions out. One file per backend behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlm4rec_spark.models.model_id import pinned_id

LONGEST_WAIT = 60.0
"""Seconds. Limits are given per minute: a server that asks for more is down, and a later run is the better retry."""
PACKAGED_MODEL = Path(__file__).with_name("packaged")


@dataclass(frozen=True)
class Request:
    """A photo (RGB), the prompt for it, and the key that its answer bears."""

    key: str
    image: Image
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What became of a request: a text, which may be empty (that is for the caller to judge), or an error's class."""

    key: str
    text: str | None
    input_tokens: int = 0
    output_tokens: int = 0
    error_class: str | None = None
    error: str | None = None


class Captioner(Protocol):
    """A stream: requests go in one by one, answers come out in any order, one for each.

    One thread drives it: `add` what is at hand, `step`, and so on.
    """

    at_once: int
    """The most requests that it wants to hold: those at work, and enough others that it needn't wait."""
    batch: int
    """`step` is worth its while from so many on; with fewer it is called when no more are coming."""
    begins: Callable[[Sequence[str]], None]
    """Called with the keys of the requests on which work begins: if the process ends now, it was over these."""

    def add(self, request: Request) -> None:
        """Take a request; returns at once."""
        ...

    def step(self) -> list[Answer]:
        """Work until some of the requests held are answered. Not called while none is held.

        What is wrong with a single request is its answer. Raises RunError where no request can be served, such as for
        a wrong key to an endpoint: the run then fails with these words.
        """
        ...


def answers(captioner: Captioner, requests: Iterable[Request]) -> dict[str, Answer]:
    """All of them by key, in the order of the requests; for a few at a time."""
    wanted = list(requests)
    for request in wanted:
        captioner.add(request)
    found: dict[str, Answer] = {}
    while len(found) < len(wanted):
        found |= {answer.key: answer for answer in captioner.step()}
    return {request.key: found[request.key] for request in wanted}


class EndpointSettings(BaseModel):
    """Where the endpoint backend asks, and how hard. None of it changes a text, nor is it part of the caption key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dialect: Literal["openai", "anthropic"] = "openai"
    # Without credentials: it stands in error texts, and the settings are kept in the tables.
    url: str | None = Field(None, pattern=r"^https?://[^\s@?]+$")
    # The clients open a thousand connections at most.
    concurrency: int = Field(16, ge=1, le=1_000)
    timeout_seconds: float = Field(60.0, gt=0)
    tries: int = Field(5, ge=1, le=20)
    tokens_per_minute: int | None = Field(None, ge=1)


class ModelSettings(BaseModel):
    """Which model captions, and what changes its text; `endpoint` and `compiled` don't, nor are they in the key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["transformers", "vllm", "endpoint", "fake"] = "transformers"
    model: str = "packaged"
    revision: str = "main"
    max_new_tokens: int = Field(64, ge=1)
    max_side: int = Field(672, ge=16)
    torch_compile: bool = False
    endpoint: EndpointSettings = EndpointSettings()

    @model_validator(mode="after")
    def _vllm_needs_a_model(self) -> ModelSettings:
        if (self.backend, self.model) == ("vllm", "packaged"):
            raise ValueError("vLLM doesn't read the packaged model's weights: name another model")
        return self

    @property
    def source(self) -> str:
        return str(PACKAGED_MODEL) if self.model == "packaged" else self.model

    @property
    def longest_silence(self) -> float:
        """Seconds for which nothing may come although all is well: a server is tried again and again."""
        tried = self.endpoint.tries * (self.endpoint.timeout_seconds + 2 * LONGEST_WAIT)
        return tried if self.backend == "endpoint" else 0.0

    def model_id(self) -> str:
        """Model at revision or content hash. Raises UsageError when the model folder isn't there."""
        if self.backend == "fake":
            return f"fake-{self.model}@1"
        if self.backend == "endpoint":
            return f"{self.model}@endpoint" + (
                f"@{self.revision}" if self.revision != "main" else ""
            )
        return pinned_id("caption.model.model", self.source, self.revision)


def load_captioner(
    settings: ModelSettings, batch_size: int = 16, json_schema: dict[str, Any] | None = None
) -> Captioner:
    """Load the model; slow. Raises what the backend raises, UsageError for a missing library.

    With a `json_schema` the answers are JSON of that kind where the backend can hold the model to it (guided decoding):
    vllm and endpoint can, transformers can't.
    """
    if settings.backend == "fake":
        from vlm4rec_spark.models.captioning.backends.fake import FakeCaptioner

        return FakeCaptioner(settings.model, batch_size, json_schema)
    if settings.backend == "endpoint":
        from vlm4rec_spark.models.captioning.backends.endpoint import EndpointCaptioner

        return EndpointCaptioner(
            settings.model, settings.max_new_tokens, settings.endpoint, json_schema
        )
    if settings.backend == "vllm":
        from vlm4rec_spark.models.captioning.backends.vllm import VllmCaptioner

        return VllmCaptioner(
            settings.source, settings.revision, settings.max_new_tokens, json_schema
        )
    from vlm4rec_spark.models.captioning.backends.transformers import TransformersCaptioner

    return TransformersCaptioner(
        settings.source,
        settings.revision,
        settings.max_new_tokens,
        batch_size,
        settings.torch_compile,
    )
