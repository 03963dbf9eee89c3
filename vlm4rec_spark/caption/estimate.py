"""What captioning takes (tokens, device-hours, money), and how many photos a budget buys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vlm4rec_spark.caption.plan import PENDING
from vlm4rec_spark.caption.settings import Budget, Prices


@dataclass(frozen=True)
class Rates:
    """Figures of one photo on one device."""

    photos_per_second: float
    input_tokens: float
    output_tokens: float
    speed: str
    """Where `photos_per_second` comes from: `measured`, or `assumed` by the config."""
    tokens: str
    """Where the tokens come from, likewise."""

    def cost(
        self,
        photos: int,
        prices: Prices,
    ) -> float:
        """Of this number of photos, in the currency of the prices."""
        seconds = photos / self.photos_per_second
        return prices.cost(seconds, photos * self.input_tokens, photos * self.output_tokens)

    def affordable(
        self,
        photos: int,
        budget: Budget,
        prices: Prices,
    ) -> int:
        """How many of `photos` the budget buys."""
        if budget.photos is not None:
            photos = min(photos, budget.photos)
        cost_per_photo = self.cost(1, prices)
        if budget.money is None or not cost_per_photo:
            return photos
        # The last digit of a division mustn't cost a photo that the money just buys.
        return min(photos, math.floor(budget.money / cost_per_photo * (1 + 1e-12)))


@dataclass(frozen=True)
class CaptionPlan:
    """What a run would do, in photos.

    wanted = reused + kept + given_up + duplicates + to_caption.
    """

    wanted: int
    """Photos that shall have a caption."""
    reused: int
    """They have the caption already."""
    kept: int
    """They keep the caption of another prompt or model."""
    given_up: int
    """They failed and aren't tried again."""
    duplicates: int
    """A photo with the same bytes is captioned."""
    to_caption: int
    reasons: Mapping[str, int]
    """`to_caption` by reason."""
    now: int
    """How many of `to_caption` the budget buys."""
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
    """From the photos by reason (`plan.with_reason`) and the contents by reason (`plan.queue`)."""
    to_caption = sum(contents.values())
    now = rates.affordable(to_caption, budget, prices)
    return CaptionPlan(
        wanted=sum(photos.values()),
        reused=photos.get("reused", 0),
        kept=photos.get("kept", 0),
        given_up=photos.get("given_up", 0),
        duplicates=sum(photos.get(reason, 0) for reason in PENDING) - to_caption,
        to_caption=to_caption,
        reasons={reason: contents[reason] for reason in PENDING if reason in contents},
        now=now,
        input_tokens=round(now * rates.input_tokens),
        output_tokens=round(now * rates.output_tokens),
        device_hours=now / rates.photos_per_second / 3_600,
        cost=rates.cost(now, prices),
        rates=rates,
    )
