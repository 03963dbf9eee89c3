"""What a style adds to a product, such as buttons, racing bands, lace or a patch.

Knows the four styles; draws on a picture of twice the final size.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm4rec_spark.demo.shapes import Points, Shape

_GOLD = "#deb03e"
_DEEP_GOLD = "#785414"
_LACE = "#fff6f8"
_LINEN = "#ceb084"
_THREAD = "#5c3c22"


class Pen:
    """Draws on a picture, by points of the product's box."""

    def __init__(
        self,
        picture: Image.Image,
        to_pixels: Callable[[Points], list],
    ):
        self._draw = ImageDraw.Draw(picture)
        self._to_pixels = to_pixels

    def line(
        self,
        points: Points,
        fill: str | tuple[int, ...],
        width: int,
    ) -> None:
        self._draw.line(self._to_pixels(points), fill, width, joint="curve")

    def polygon(
        self,
        points: Points,
        **style: Any,
    ) -> None:
        self._draw.polygon(self._to_pixels(points), **style)

    def disc(
        self,
        centre: Points,
        radius: float,
        fill: str,
        edge: str,
    ) -> None:
        angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        circle = np.column_stack([np.cos(angle), np.sin(angle)])
        self.polygon(centre + radius * circle, fill=fill, outline=edge)


def bands(pen: Pen, shape: Shape) -> None:
    """A white, black and white band from edge to edge, slanting through the emblem."""
    for half_width, fill in ((0.2, "#fcfcfc"), (0.08, "#101014")):
        top = [(half_width + 0.55, -2.0), (0.55 - half_width, -2.0)]
        bottom = [(-half_width - 0.55, 2.0), (half_width - 0.55, 2.0)]
        pen.polygon(shape.emblem + np.array(bottom + top), fill=fill)


def piping(pen: Pen, shape: Shape) -> None:
    """A gold cord around the edge and a column of gold buttons."""
    edge = np.vstack([shape.outline, shape.outline[:2]])
    pen.line(edge, _DEEP_GOLD, 15)
    pen.line(edge, _GOLD, 10)
    for drop in (-0.24, 0.0, 0.24):
        pen.disc(np.add(shape.emblem, (0, drop)), 0.085, _GOLD, _DEEP_GOLD)


def lace(pen: Pen, shape: Shape) -> None:
    """White scallops around the edge and a flower."""
    for point in shape.walk(0.13):
        pen.disc(point, 0.075, _LACE, "#e2becc")
    centre = np.array(shape.emblem)
    for angle in np.linspace(0, 2 * np.pi, 5, endpoint=False):
        petal = centre + 0.14 * np.array([np.sin(angle), -np.cos(angle)])
        pen.disc(petal, 0.12, "#ec5c8c", _LACE)
    pen.disc(centre, 0.08, "#fad65a", _LACE)


def stitches(pen: Pen, shape: Shape) -> None:
    """Coarse stitches inside the edge and a linen patch, sewn on with brown thread."""
    dashes = shape.walk(0.09, offset=0.07)
    for start in range(0, len(dashes) - 1, 2):
        pen.line(dashes[start : start + 2], _THREAD, 15)
        pen.line(dashes[start : start + 2], _LINEN, 9)
    corners = 0.2 * np.array([(-1.0, -0.8), (0.9, -1.0), (1.0, 0.9), (-0.9, 1.0)])
    pen.polygon(shape.emblem + corners, fill=_LINEN, outline=_THREAD, width=5)
    for arm in (0.1, -0.1):
        pen.line(shape.emblem + np.array([(-0.1, -arm), (0.1, arm)]), _THREAD, 7)


TRIMS = {"classic": piping, "sporty": bands, "romantic": lace, "rustic": stitches}
"""By style."""
