"""Patterns, materials and backgrounds as arrays, point by point. Knows no kinds and no outlines.

Textures are coarse on purpose: the demo's captioner sees a photo at 128 px. A product is some 100
px wide there.
"""

from typing import NamedTuple

import numpy as np

Plane = np.ndarray
"""Shape (height, width), float32."""


def _step(distance: Plane, softness: float = 0.04) -> Plane:
    """0 below zero and 1 above, with a soft edge, so that nothing flickers in a small photo."""
    return np.clip(distance / softness + 0.5, 0, 1)


def _saw(x: Plane, period: float) -> Plane:
    """Distance to the nearest multiple of `period`, from 0 to half a period."""
    return np.abs(x - period * np.rint(x / period))


def pattern(
    name: str,
    u: Plane,
    v: Plane,
    rng: np.random.Generator,
) -> Plane:
    """How much of the second colour shows at each point (u, v) of the product, 0 to 1."""
    period = rng.uniform(0.36, 0.46)
    u = u + rng.uniform(0, period)
    v = v + rng.uniform(0, period)
    if rng.random() < 0.5:
        u, v = v, u
    match name:
        case "plain":
            return np.zeros_like(u)
        case "striped":
            return _step(period * 0.2 - _saw(v, period))
        case "checked":
            bands = [_step(period * 0.22 - _saw(axis, period)) for axis in (u, v)]
            return (bands[0] + bands[1]) / 2
        case "dotted":
            row = np.rint(v / period)
            shifted = u + row * period / 2
            return _step(period * 0.27 - np.hypot(_saw(shifted, period), _saw(v, period)))
        case "zigzag":
            return _step(period * 0.2 - _saw(v + _saw(u, period * 1.1), period))
    raise ValueError(f"no pattern named {name!r}")


class Material(NamedTuple):
    """The colour is multiplied by `shade`, and white is mixed in by `gloss`."""

    shade: Plane
    gloss: Plane


def material(
    name: str,
    u: Plane,
    v: Plane,
    rng: np.random.Generator,
) -> Material:
    """The material at each point (u, v) of the product."""
    # A float64 would make every array one.
    phase = rng.uniform(0, 6.28, size=4).astype(np.float32)
    folds = np.sin(3.1 * u + 1.7 * v + phase[0]) * np.sin(2.3 * v - 0.9 * u + phase[1])
    match name:
        case "cotton":
            return Material(1 + 0.1 * folds, np.zeros_like(u))
        case "denim":
            period = rng.uniform(0.12, 0.14)
            twill = _saw(u + v, period) * (4 / period) - 1
            slub = np.sin(41 * u + phase[2]) * np.sin(7 * v + phase[3])
            shade = 0.9 + 0.06 * folds + 0.24 * twill + 0.07 * slub
            return Material(shade, np.clip(0.22 * twill, 0, 1))
        case "leather":
            return _leather(u, v, phase[2:])
        case "wool":
            shade = _knitted(
                u,
                v,
                rng.uniform(0.18, 0.21),
                phase[2],
                0.45 + 0.05 * folds,
            )
            return Material(shade, np.zeros_like(u))
    raise ValueError(f"no material named {name!r}")


def _leather(
    u: Plane,
    v: Plane,
    phase: np.ndarray,
) -> Material:
    """Creases whose crests shine."""
    waves = 1.2 * np.sin(2.4 * v + phase[0])
    crest = np.sin(4.2 * u + 2.6 * v + waves + phase[1])
    shine = np.clip((crest - 0.55) / 0.3, 0, 1) ** 2
    return Material(0.8 + 0.2 * crest, 0.75 * shine)


def _knitted(
    u: Plane,
    v: Plane,
    period: float,
    phase: np.floating,
    base: Plane,
) -> Plane:
    """The shade of rows of stitches, on a base."""
    ridge = _saw(u, period)
    lean = np.abs(ridge / period - 0.25) * 4 - 0.5
    row = np.abs(np.sin((v + 0.35 * ridge) * (np.pi / (period * 0.8)) + phase))
    column = np.clip(ridge * (6 / period), 0, 1)
    return base + 0.42 * row * column + 0.22 * column + 0.06 * lean


def background(
    x: Plane,
    y: Plane,
    rng: np.random.Generator,
) -> np.ndarray:
    """The scene behind a product: shape (height, width, 3), 0 to 255.

    x and y run from -1 to 1 over the photo.
    """
    wall = rng.uniform(130, 245) + rng.uniform(-22, 22, size=3)
    floor = rng.uniform(90, 235) + rng.uniform(-26, 26, size=3)
    slope = rng.uniform(-0.2, 0.2, size=2).astype(np.float32)
    light = (1 + slope[0] * x + slope[1] * y)[..., None]
    match rng.integers(4):
        case 0:  # a cut-out on white
            return np.full((*x.shape, 3), rng.uniform(240, 255), dtype=np.float32)
        case 1:
            return np.float32(wall) * light
        case 2:
            below = _step(y - rng.uniform(0.25, 0.7) - 0.1 * slope[0] * x, 0.02)[..., None]
            return (np.float32(wall) * (1 - below) + np.float32(floor) * below) * light
        case _:
            return np.float32(floor) * (light * _planks(x, y, rng)[..., None])


def _planks(
    x: Plane,
    y: Plane,
    rng: np.random.Generator,
) -> Plane:
    """The brightness of a wooden floor."""
    plank = _step(_saw(y + rng.uniform(0, 1), rng.uniform(0.3, 0.6)) - 0.012, 0.02)
    grain = 0.96 + 0.04 * np.sin(26 * y + 3 * np.sin(2 * x + rng.uniform(0, 6)))
    return (0.8 + 0.2 * plank) * grain
