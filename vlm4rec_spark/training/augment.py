"""Random changes of photos, so that a captioner learns the product and not the studio."""

import math

import torch
from torch.nn import functional

_FLOOD_SIDE = 32
"""Pixels of the picture in which a plain background is searched: it is one area, with soft edges.
"""


def augment(photos: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """(n, 3, side, side) uint8 to floats from -1 to 1, every photo changed in its own way.

    In a third of the photos a plain light background is replaced: by a colour, a gradient, or
    another photo out of focus. Then photos are turned, mirrored, scaled and moved. Brightness,
    contrast and colours change. Some photos get coarser, and some have a part covered.
    """
    pixels = photos.float() / 255
    pixels = _with_background(pixels, rng)
    pixels = _moved(pixels, rng)
    pixels = _with_light(pixels, rng)
    pixels = _coarser(pixels, rng)
    return _with_cover(pixels, rng) * 2 - 1


def plain(photos: torch.Tensor) -> torch.Tensor:
    """The same photos as `augment` gives them, unchanged."""
    return photos.float() / 127.5 - 1


def _draw(
    photos: torch.Tensor,
    rng: torch.Generator,
    numbers: int = 1,
) -> torch.Tensor:
    """(n, numbers, 1, 1): from 0 to 1, for every photo its own."""
    return torch.rand(len(photos), numbers, 1, 1, generator=rng, device=photos.device)


def _resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    return functional.interpolate(pixels, size, mode="bilinear")


def _with_background(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    side = pixels.shape[-1]
    # Zero in a photo without a plain background.
    cover = _background(pixels)
    replace = (_draw(pixels, rng) < 0.35).float()
    top = _draw(pixels, rng, 3)
    bottom = _draw(pixels, rng, 3)
    slope = torch.linspace(0, 1, side, device=pixels.device).view(1, 1, -1, 1)
    gradient = top + (bottom - top) * slope * (_draw(pixels, rng) < 0.5)
    blurred = _resize(_resize(pixels.roll(1, 0), 12), side)
    background = torch.where(_draw(pixels, rng) < 0.4, blurred, gradient)
    # A room's floor or wall has a grain.
    grain = torch.rand(pixels.shape, generator=rng, device=pixels.device)
    background = background + 0.06 * (grain - 0.5)
    return pixels + cover * replace * (background - pixels)


def _background(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 1, side, side): how much a pixel belongs to a plain, nearly white background.

    It is grown in from the edges.
    """
    light = ((pixels.amin(1, keepdim=True) - 0.88) / 0.06).clamp(0, 1)
    area = (functional.adaptive_avg_pool2d(light, _FLOOD_SIDE) > 0.6).float()
    edge = torch.ones_like(area)
    edge[..., 1:-1, 1:-1] = 0
    reached = area * edge
    for _ in range(_FLOOD_SIDE):
        reached = functional.max_pool2d(reached, 3, 1, 1) * area
    reached = functional.max_pool2d(reached, 3, 1, 1)
    return light * _resize(reached, pixels.shape[-1])


def _moved(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    draw = _draw(pixels, rng, 7).flatten(1)
    # Some photos are hardly moved at all.
    strength = draw[:, 6]
    # The window's side: from two thirds of the photo's to 1.6 of it.
    size = torch.exp((draw[:, 1] - 0.45) * 0.9 * strength)
    ratio = torch.exp((draw[:, 2] - 0.5) * 0.45 * strength)
    window = torch.stack([size * ratio, size / ratio], 1)
    # A window smaller than the photo may lie anywhere in it, a larger one round it.
    room = (window - 1).abs().clamp(max=0.45) + 0.06 * strength[:, None]
    move = (draw[:, 4:6] - 0.5) * 2 * room
    angle = (draw[:, 0] - 0.5) * 2 * math.radians(16) * strength
    mirrored = torch.where(draw[:, 3] < 0.5, -1.0, 1.0)
    transform = _affine(window, angle, mirrored, move)
    grid = functional.affine_grid(transform, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _affine(
    window: torch.Tensor,
    angle: torch.Tensor,
    mirrored: torch.Tensor,
    move: torch.Tensor,
) -> torch.Tensor:
    """(n, 2, 3)."""
    width, height = window.unbind(1)
    cos = torch.cos(angle)
    sin = torch.sin(angle)
    rows = [
        torch.stack([mirrored * width * cos, -height * sin, move[:, 0]], 1),
        torch.stack([mirrored * width * sin, height * cos, move[:, 1]], 1),
    ]
    return torch.stack(rows, 1)


def _with_light(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    draw = _draw(pixels, rng, 4)
    strength = draw[:, 3:]
    cast = 1 + (_draw(pixels, rng, 3) - 0.5) * 0.2 * strength
    mean = pixels.mean((1, 2, 3), keepdim=True)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (1 + (draw[:, :1] - 0.5) * 0.4 * strength)
    pixels = mean + (pixels - mean) * (1 + (draw[:, 1:2] - 0.5) * 0.5 * strength)
    return (pixels * cast * (1 + (draw[:, 2:3] - 0.6) * 0.5 * strength)).clamp(0, 1)


def _coarser(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    side = pixels.shape[-1]
    small = functional.avg_pool2d(pixels, 2)
    is_coarse = _draw(pixels, rng) < 0.2
    pixels = torch.where(is_coarse, _resize(small, side), pixels)
    noise = torch.randn(pixels.shape, generator=rng, device=pixels.device)
    return pixels + noise * 0.04 * _draw(pixels, rng) ** 2


def _with_cover(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A quarter of the photos get a rectangle of one colour."""
    side = pixels.shape[-1]
    draw = _draw(pixels, rng, 5).flatten(1)
    is_row = _between(draw[:, 2:3], 0.1 + 0.3 * draw[:, 0:1], side)
    is_column = _between(draw[:, 3:4], 0.1 + 0.3 * draw[:, 1:2], side)
    is_covered = draw[:, 4].view(-1, 1, 1, 1) < 0.25
    rectangle = is_row[:, None, :, None] & is_column[:, None, None, :] & is_covered
    return torch.where(rectangle, _draw(pixels, rng, 3), pixels)


def _between(
    start: torch.Tensor,
    share: torch.Tensor,
    side: int,
) -> torch.Tensor:
    """(n, side) bool: a range of this share of the side; `start` from 0 to 1 is where it fits."""
    line = torch.arange(side, device=start.device).view(1, -1)
    length = side * share
    first = start * (side - length)
    return (line >= first) & (line < first + length)
