"""Captioners: photos and prompts in, descriptions out. One file per backend behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from vlm4rec_spark.models.weights import pinned_id

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"


@dataclass(frozen=True)
class Caption:
    """A description and what it cost; an empty `text` is for the caller to judge."""

    text: str
    input_tokens: int
    output_tokens: int


class Captioner(Protocol):
    def caption(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Caption]:
        """One description per RGB image, in order. May raise anything: the caller then tries the photos singly."""
        ...


class ModelSettings(BaseModel):
    """Which model captions, and everything that changes its text (all of it is part of the caption key)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["transformers", "fake"] = "transformers"
    model: str = "demo"
    revision: str = "main"
    max_new_tokens: int = Field(64, ge=1)
    max_side: int = Field(672, ge=16)

    @property
    def source(self) -> str:
        return str(DEMO_MODEL) if self.model == "demo" else self.model

    def model_id(self) -> str:
        """Model at revision or content hash. Raises UsageError when the model folder isn't there."""
        if self.backend == "fake":
            return f"fake-{self.model}@1"
        return pinned_id("caption.model.model", self.source, self.revision)


def load_captioner(settings: ModelSettings) -> Captioner:
    """Load the model; slow. Raises what the backend raises, UsageError for a missing library."""
    if settings.backend == "fake":
        from vlm4rec_spark.models.captioners.fake import FakeCaptioner

        return FakeCaptioner(settings.model)
    from vlm4rec_spark.models.captioners.transformers import TransformersCaptioner

    return TransformersCaptioner(settings.source, settings.revision, settings.max_new_tokens)
