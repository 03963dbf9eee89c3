"""The outlines of the eight kinds of product.

Knows geometry only: points in a box from -1 to 1, with y pointing down.
"""

from dataclasses import dataclass

import numpy as np

Points = np.ndarray
"""Shape (n, 2), float64: x and y in the product's own box."""


@dataclass(frozen=True)
class Shape:
    """One kind's silhouette, and what is drawn on and around it."""

    outline: Points
    emblem: tuple[float, float]
    """The position of a style's emblem."""
    seams: tuple[Points, ...] = ()
    behind: tuple[Points, ...] = ()
    """Parts of wood or metal that stick out: legs, a stand. Polygons drawn under the fabric."""
    handle: Points | None = None

    def walk(
        self,
        gap: float,
        offset: float = 0.0,
    ) -> Points:
        """Points along the outline, `gap` apart, moved towards the middle by `offset`."""
        closed = np.vstack([self.outline, self.outline[:1]])
        steps = np.hypot(*np.diff(closed, axis=0).T)
        along = np.concatenate([[0.0], np.cumsum(steps)])
        count = round(along[-1] / gap)
        at = np.linspace(0, along[-1], count, endpoint=False)
        points = np.column_stack([np.interp(at, along, closed[:, axis]) for axis in (0, 1)])
        direction = np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)
        # Outlines run clockwise on the screen.
        normal = np.column_stack([-direction[:, 1], direction[:, 0]])
        return points + offset * normal / np.linalg.norm(normal, axis=1, keepdims=True)


def _points(text: str) -> Points:
    """Points as in an SVG: "x,y x,y"."""
    return np.array([point.split(",") for point in text.split()], float)


def _mirrored(right: str) -> Points:
    """A symmetric outline from its right half, listed from top to bottom."""
    half = _points(right)
    return np.vstack([half, half[::-1] * (-1, 1)])


def _rounded(corners: Points, times: int = 2) -> Points:
    """Chaikin's corner cutting: a corner becomes two points, closer to its neighbors."""
    for _ in range(times):
        following = np.roll(corners, -1, axis=0)
        first = 0.82 * corners + 0.18 * following
        second = 0.18 * corners + 0.82 * following
        corners = np.stack([first, second], axis=1).reshape(-1, 2)
    return corners


def _arc(
    centre: str,
    radii: str,
    start: float,
    stop: float,
) -> Points:
    """From one angle to another, in degrees."""
    angle = np.radians(np.linspace(start, stop, 24))
    return _points(centre) + _points(radii) * np.column_stack([np.cos(angle), np.sin(angle)])


def _cushion() -> Points:
    """A square whose sides are pulled in and whose corners stick out."""
    t = np.linspace(-1, 1, 17)[:-1]
    top = np.column_stack([0.9 * t, -0.9 + 0.14 * (1 - t**2)])
    quarter_turn = [[0, 1], [-1, 0]]
    return np.vstack([top @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)])


def _neckline(neck: Points, right: str) -> Points:
    """The outline of a garment from its neck and its right half."""
    return _rounded(np.vstack([neck, _mirrored(right)]), 1)


SHAPES = {
    "shirt": Shape(
        _neckline(
            _arc("0,-0.82", "0.22,0.24", 170, 10),
            "0.2,-0.78 0.5,-0.82 1,-0.3 0.76,-0.02 0.54,-0.22 0.56,0.9",
        ),
        emblem=(0.26, -0.2),
        seams=(_points("0.5,-0.8 0.54,-0.2"), _points("-0.5,-0.8 -0.54,-0.2")),
    ),
    "dress": Shape(
        _neckline(
            _arc("0,-0.92", "0.24,0.3", 170, 10),
            "0.26,-0.95 0.44,-0.9 0.42,-0.5 0.3,-0.12 0.6,0.45 0.84,0.95",
        ),
        emblem=(0.0, -0.1),
        seams=(
            _points("-0.3,-0.12 0.3,-0.12"),
            _points("-0.1,0.1 -0.28,0.9"),
            _points("0.1,0.1 0.28,0.9"),
        ),
    ),
    "trousers": Shape(
        _rounded(_mirrored("0.5,-0.95 0.56,-0.4 0.66,0.95 0.14,0.95 0.03,-0.2"), 1),
        emblem=(0.34, -0.3),
        seams=(_points("-0.52,-0.78 0.52,-0.78"), _points("0,-0.78 0,-0.2")),
    ),
    "bag": Shape(
        _rounded(_mirrored("0.62,-0.32 0.9,0.82 0.8,0.92")),
        emblem=(0.0, 0.25),
        seams=(_points("-0.7,-0.05 0.7,-0.05"),),
        handle=_arc("0,-0.3", "0.4,0.62", 180, 360),
    ),
    "hat": Shape(
        np.vstack([_arc("0,-0.05", "0.56,0.72", 180, 360), _arc("0,0.38", "1,0.34", -52, 232)]),
        emblem=(0.1, -0.2),
        seams=(_arc("0,0.1", "0.57,0.14", 170, 10),),
    ),
    "cushion": Shape(_cushion(), emblem=(0.3, 0.3)),
    "lamp": Shape(
        _rounded(_mirrored("0.38,-0.95 0.82,0.16"), 1),
        emblem=(0.0, -0.3),
        behind=(
            _points("-0.06,0.1 0.06,0.1 0.06,0.86 -0.06,0.86"),
            _arc("0,0.9", "0.42,0.12", 0, 360),
        ),
    ),
    "armchair": Shape(
        _rounded(_mirrored("0.34,-0.9 0.62,-0.78 0.66,-0.16 0.92,-0.14 0.96,0.68")),
        emblem=(0.0, -0.5),
        seams=(
            _points("-0.64,-0.1 -0.6,0.66"),
            _points("0.64,-0.1 0.6,0.66"),
            _points("-0.62,0.16 0.62,0.16"),
        ),
        behind=(
            _points("-0.86,0.5 -0.72,0.5 -0.72,0.95 -0.86,0.95"),
            _points("0.72,0.5 0.86,0.5 0.86,0.95 0.72,0.95"),
        ),
    ),
}
"""All kinds by name."""
