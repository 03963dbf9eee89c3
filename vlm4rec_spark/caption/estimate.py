"""What captioning so many photos takes: tokens, device-hours, money; and how many a budget buys. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vlm4rec_spark.caption.plan import PENDING
from vlm4rec_spark.caption.settings import Budget, Prices


@dataclass(frozen=True)
class Rates:
    """Of one photo on one device, and where the figures come from: `measured`, or `assumed` by the config."""

    photos_per_second: float
    input_tokens: float
    output_tokens: float
    speed: str
    tokens: str

    def cost(self, photos: int, prices: Prices) -> float:
        """Of so many photos, in the currency of the prices."""
        seconds = photos / self.photos_per_second
        return prices.cost(seconds, photos * self.input_tokens, photos * self.output_tokens)

    def affordable(self, photos: int, budget: Budget, prices: Prices) -> int:
        """How many of `photos` the budget buys."""
        most = photos if budget.photos is None else min(photos, budget.photos)
        each = self.cost(1, prices)
        if budget.money is None or not each:
            return most
        # The last digit of a division mustn't cost a photo that the money just buys.
        return min(most, math.floor(budget.money / each * (1 + 1e-12)))


@dataclass(frozen=True)
class CaptionPlan:
    """What a run would do, in photos: wanted = reused + kept + given_up + duplicates + to_caption."""

    wanted: int
    """Photos that shall have a caption."""
    reused: int
    """Their caption is there."""
    kept: int
    """They keep the caption of another prompt or model."""
    given_up: int
    """They failed and aren't tried again."""
    duplicates: int
    """Another photo that is captioned has their very bytes."""
    to_caption: int
    reasons: Mapping[str, int]
    """Of `to_caption`, by reason."""
    now: int
    """What the budget buys of `to_caption`."""
    input_tokens: int
    output_tokens: int
    device_hours: float
    cost: float
    rates: Rates


def estimate(
    photos: Mapping[str, int],
    contents: Mapping[str, int],
    rates: Rates,
    budget: Budget,
    prices: Prices,
) -> CaptionPlan:
    """From the photos by reason (of `plan.judged`) and the contents to caption by reason (of `plan.queue`)."""
    todo = sum(contents.values())
    now = rates.affordable(todo, budget, prices)
    return CaptionPlan(
        wanted=sum(photos.values()),
        reused=photos.get("reused", 0),
        kept=photos.get("kept", 0),
        given_up=photos.get("given_up", 0),
        duplicates=sum(photos.get(reason, 0) for reason in PENDING) - todo,
        to_caption=todo,
        reasons={reason: contents[reason] for reason in PENDING if reason in contents},
        now=now,
        input_tokens=round(now * rates.input_tokens),
        output_tokens=round(now * rates.output_tokens),
        device_hours=now / rates.photos_per_second / 3_600,
        cost=rates.cost(now, prices),
        rates=rates,
    )
