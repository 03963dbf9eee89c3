"""What a style adds to a product, such as buttons, racing bands, lace or a patch.

Knows the four styles; draws in pixels on a picture of twice the final size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from vlm4rec_spark.demo.shapes import Points, Shape

ToPixels = Callable[[Points], list[tuple[float, float]]]
"""Points of the product's box to pixels."""

_GOLD = (222, 176, 62)
_DEEP_GOLD = (120, 84, 20)
_LACE = (255, 246, 248)
_ROSE = (236, 92, 140)
_HEART = (250, 214, 90)
_LINEN = (206, 176, 132)
_THREAD = (92, 60, 34)


def trim(
    style: str,
    picture: Image.Image,
    fabric: Image.Image,
    shape: Shape,
    to_pixels: ToPixels,
) -> Image.Image:
    """The picture with the style's decoration; `fabric` is the product's mask, as large."""
    if style == "sporty":
        banded = picture.copy()
        _bands(ImageDraw.Draw(banded), np.array(shape.emblem), to_pixels)
        return Image.composite(banded, picture, fabric)
    pen = ImageDraw.Draw(picture)
    {"classic": _piping, "romantic": _lace, "rustic": _stitches}[style](pen, shape, to_pixels)
    return picture


def _disc(
    pen: ImageDraw.ImageDraw,
    to_pixels: ToPixels,
    centre: Points,
    radius: float,
    fill: tuple,
    edge: tuple,
) -> None:
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    circle = np.column_stack([np.cos(angle), np.sin(angle)])
    pen.polygon(
        to_pixels(centre + radius * circle),
        fill=fill,
        outline=edge,
    )


def _bands(
    pen: ImageDraw.ImageDraw,
    emblem: Points,
    to_pixels: ToPixels,
) -> None:
    """A white, black and white band from edge to edge, slanting through the emblem."""
    for half_width, fill in (
        (0.2, (252, 252, 252)),
        (0.08, (16, 16, 20)),
    ):
        left = -half_width
        right = half_width
        corners = np.array(
            [
                (left - 0.55, 2.0),
                (right - 0.55, 2.0),
                (right + 0.55, -2.0),
                (left + 0.55, -2.0),
            ]
        )
        pen.polygon(to_pixels(emblem + corners), fill=fill)


def _piping(
    pen: ImageDraw.ImageDraw,
    shape: Shape,
    to_pixels: ToPixels,
) -> None:
    """A gold cord around the edge and a column of gold buttons."""
    edge = to_pixels(np.vstack([shape.outline, shape.outline[:2]]))
    pen.line(
        edge,
        fill=_DEEP_GOLD,
        width=15,
        joint="curve",
    )
    pen.line(
        edge,
        fill=_GOLD,
        width=10,
        joint="curve",
    )
    for drop in (-0.24, 0.0, 0.24):
        _disc(
            pen,
            to_pixels,
            np.add(shape.emblem, (0, drop)),
            0.085,
            _GOLD,
            _DEEP_GOLD,
        )


def _lace(
    pen: ImageDraw.ImageDraw,
    shape: Shape,
    to_pixels: ToPixels,
) -> None:
    """White scallops around the edge and a flower."""
    for point in shape.walk(0.13):
        _disc(
            pen,
            to_pixels,
            point,
            0.075,
            _LACE,
            (226, 190, 204),
        )
    centre = np.array(shape.emblem)
    angles = np.linspace(0, 2 * np.pi, 5, endpoint=False)
    for angle in angles:
        petal = centre + 0.14 * np.array([np.sin(angle), -np.cos(angle)])
        _disc(pen, to_pixels, petal, 0.12, _ROSE, _LACE)
    _disc(pen, to_pixels, centre, 0.08, _HEART, _LACE)


def _stitches(
    pen: ImageDraw.ImageDraw,
    shape: Shape,
    to_pixels: ToPixels,
) -> None:
    """Coarse stitches inside the edge and a linen patch, sewn on with brown thread."""
    dashes = to_pixels(shape.walk(0.09, offset=0.07))
    for start in range(0, len(dashes) - 1, 2):
        pen.line(
            dashes[start : start + 2],
            fill=_THREAD,
            width=15,
        )
        pen.line(
            dashes[start : start + 2],
            fill=_LINEN,
            width=9,
        )
    corners = 0.2 * np.array(
        [
            (-1.0, -0.8),
            (0.9, -1.0),
            (1.0, 0.9),
            (-0.9, 1.0),
        ]
    )
    pen.polygon(
        to_pixels(shape.emblem + corners),
        fill=_LINEN,
        outline=_THREAD,
        width=5,
    )
    for arm in (0.1, -0.1):
        stitch = np.array([(-0.1, -arm), (0.1, arm)])
        pen.line(
            to_pixels(shape.emblem + stitch),
            fill=_THREAD,
            width=7,
        )
