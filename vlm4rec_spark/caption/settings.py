"""The caption stage's settings: model, prompt, chunks, the failures it accepts and the cost."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from vlm4rec_spark.models.captioning.captioner import ModelSettings
from vlm4rec_spark.settings_base import Settings


class Budget(Settings):
    """The limit of a run. Items with the most events come first; the rest waits for the next."""

    photos: int | None = Field(None, ge=0)
    money: float | None = Field(None, ge=0)
    """In the currency of `Prices`."""


class Prices(Settings):
    """In any one currency; 0 where nothing is paid."""

    device_hour: float = Field(0.0, ge=0)
    million_input_tokens: float = Field(0.0, ge=0)
    million_output_tokens: float = Field(0.0, ge=0)

    def cost(
        self,
        device_seconds: float,
        input_tokens: float,
        output_tokens: float,
    ) -> float:
        return (
            device_seconds / 3_600 * self.device_hour
            + input_tokens / 1e6 * self.million_input_tokens
            + output_tokens / 1e6 * self.million_output_tokens
        )

    @property
    def any(self) -> bool:
        """Whether anything is paid for."""
        return any(self.model_dump().values())


class Assumed(Settings):
    """Rates for the plan until a run has measured them."""

    photos_per_second: float = Field(1.0, gt=0)
    """Of one device."""
    input_tokens: float = Field(3_000, ge=0)
    """LLaVA-NeXT makes 2,988 of a photo of 672 pixels."""
    output_tokens: float = Field(100, ge=0)


class CaptionSettings(Settings):
    """`conf/base.yaml` explains every setting."""

    model_config = ConfigDict(protected_namespaces=())

    model: ModelSettings = ModelSettings()
    prompt: str = "describe.1"
    # A sentence of the prompt: words, and nothing that could be an instruction of its own.
    language: str | None = Field(
        None,
        max_length=40,
        pattern=r"^[^\W\d_]+( [^\W\d_]+){0,2}$",
    )
    on_change: Literal["replace", "keep"] = "replace"
    photos_per_item: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    photos_per_task: int = Field(1_000, ge=1)
    chunk_minutes: float = Field(10.0, gt=0)
    chunk_photos: int = Field(50_000, ge=2)
    batch_seconds: float = Field(300.0, ge=1)
    memory_gb: float | None = Field(None, gt=0)
    max_failed_share: float = Field(
        0.2,
        ge=0,
        le=1,
    )
    max_attempts: int = Field(3, ge=1)
    budget: Budget = Budget()
    prices: Prices = Prices()
    assumed: Assumed = Assumed()

    @model_validator(mode="after")
    def _money_needs_prices(self) -> CaptionSettings:
        if self.budget.money is not None and not self.prices.any:
            raise ValueError("budget.money needs a price above 0 in prices")
        return self
