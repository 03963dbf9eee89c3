"""Photos changed at random, so that a captioner learns the product and not the studio. Torch, on any device."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

_FLOOD_SIDE = 32
"""The plain background is looked for in a picture so small: it is one area, and its edges are softened anyhow."""


def augment(photos: torch.Tensor, chance: torch.Generator, mirrored: float = 0.0) -> torch.Tensor:
    """(n, 3, side, side) uint8 to the same as floats from -1 to 1, each changed in its own way.

    Backgrounds: a plain light one is replaced in a third of the photos by a colour, a slope between two, or another
    photo out of focus. Then turned, mirrored, cropped or shrunk, moved; brighter or darker, of another contrast and
    with a cast; some coarser, some with a part hidden. A share of `mirrored` is left as it is, or mirrored at most.
    """
    if mirrored and (gentle := round(len(photos) * mirrored)):
        flip = _rand(photos[:gentle], 1, 1, 1, chance=chance) < 0.5
        first = plain(torch.where(flip, photos[:gentle].flip(-1), photos[:gentle]))
        return (
            torch.cat([first, augment(photos[gentle:], chance)]) if gentle < len(photos) else first
        )
    pixels = photos.float() / 255
    pixels = _replaced(pixels, chance)
    pixels = _moved(pixels, chance)
    pixels = _lit(pixels, chance)
    pixels = _coarser(pixels, chance)
    return _hidden(pixels, chance) * 2 - 1


def plain(photos: torch.Tensor) -> torch.Tensor:
    """The same photos as `augment` gives them, unchanged."""
    return photos.float() / 127.5 - 1


def _rand(like: torch.Tensor, *shape: int, chance: torch.Generator) -> torch.Tensor:
    return torch.rand(len(like), *shape, generator=chance, device=like.device)


def _replaced(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    cover = _background(pixels)
    # Where there is none there is nothing to replace.
    wanted = (_rand(pixels, 1, 1, 1, chance=chance) < 0.35).float()
    first, second = (_rand(pixels, 3, 1, 1, chance=chance) for _ in range(2))
    slope = torch.linspace(0, 1, pixels.shape[-1], device=pixels.device).view(1, 1, -1, 1)
    flat = first + (second - first) * slope * (_rand(pixels, 1, 1, 1, chance=chance) < 0.5)
    small = functional.interpolate(pixels.roll(1, 0), size=12, mode="bilinear", align_corners=False)
    blurred = functional.interpolate(
        small, size=pixels.shape[-2:], mode="bilinear", align_corners=False
    )
    other = torch.where(_rand(pixels, 1, 1, 1, chance=chance) < 0.4, blurred, flat)
    # A room's floor or wall has a grain.
    other = other + 0.06 * (torch.rand(pixels.shape, generator=chance, device=pixels.device) - 0.5)
    return pixels + cover * wanted * (other - pixels)


def _background(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 1, side, side): how much of a plain, nearly white background each pixel is, grown in from the edges."""
    light = ((pixels.amin(1, keepdim=True) - 0.88) / 0.06).clamp(0, 1)
    area = (functional.adaptive_avg_pool2d(light, _FLOOD_SIDE) > 0.6).float()
    edge = torch.ones_like(area)
    edge[..., 1:-1, 1:-1] = 0
    reached = area * edge
    for _ in range(_FLOOD_SIDE):
        reached = functional.max_pool2d(reached, 3, 1, 1) * area
    reached = functional.max_pool2d(reached, 3, 1, 1)
    return light * functional.interpolate(
        reached, size=pixels.shape[-2:], mode="bilinear", align_corners=False
    )


def _moved(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    draw = _rand(pixels, 7, chance=chance)
    far = draw[:, 6]  # some photos are hardly moved at all
    angle = (draw[:, 0] - 0.5) * 2 * math.radians(16) * far
    size = torch.exp(
        (draw[:, 1] - 0.45) * 0.9 * far
    )  # the window: from two thirds of the photo's side to 1.6
    ratio = torch.exp((draw[:, 2] - 0.5) * 0.45 * far)
    mirrored = torch.where(draw[:, 3] < 0.5, -1.0, 1.0)
    wide, high = size * ratio, size / ratio
    # A window smaller than the photo may lie anywhere in it, a larger one round it.
    move = (
        (draw[:, 4:6] - 0.5)
        * 2
        * ((torch.stack([wide, high], 1) - 1).abs().clamp(max=0.45) + 0.06 * far[:, None])
    )
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([mirrored * wide * cos, -high * sin, move[:, 0]], 1),
        torch.stack([mirrored * wide * sin, high * cos, move[:, 1]], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return functional.grid_sample(
        pixels, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _lit(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    draw = _rand(pixels, 4, 1, 1, chance=chance)
    far = draw[:, 3:]
    cast = 1 + (_rand(pixels, 3, 1, 1, chance=chance) - 0.5) * 0.2 * far
    mean = pixels.mean((1, 2, 3), keepdim=True)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (1 + (draw[:, :1] - 0.5) * 0.4 * far)
    pixels = mean + (pixels - mean) * (1 + (draw[:, 1:2] - 0.5) * 0.5 * far)
    return (pixels * cast * (1 + (draw[:, 2:3] - 0.6) * 0.5 * far)).clamp(0, 1)


def _coarser(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    side = pixels.shape[-1]
    small = functional.interpolate(pixels, size=side // 2, mode="area")
    soft = functional.interpolate(small, size=side, mode="bilinear", align_corners=False)
    pixels = torch.where(_rand(pixels, 1, 1, 1, chance=chance) < 0.2, soft, pixels)
    noise = torch.randn(pixels.shape, generator=chance, device=pixels.device)
    return pixels + noise * 0.04 * _rand(pixels, 1, 1, 1, chance=chance) ** 2


def _hidden(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    side = pixels.shape[-1]
    draw = _rand(pixels, 5, chance=chance)
    line = torch.arange(side, device=pixels.device).view(1, -1)
    high, wide = (side * (0.1 + 0.3 * draw[:, place : place + 1]) for place in (0, 1))
    top, left = draw[:, 2:3] * (side - high), draw[:, 3:4] * (side - wide)
    rows, columns = (line >= top) & (line < top + high), (line >= left) & (line < left + wide)
    hide = (rows[:, None, :, None] & columns[:, None, None, :]) & (
        draw[:, 4].view(-1, 1, 1, 1) < 0.25
    )
    return torch.where(hide, _rand(pixels, 3, 1, 1, chance=chance), pixels)
