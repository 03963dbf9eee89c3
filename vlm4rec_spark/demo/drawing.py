"""One product photo from five attributes, and the sentence that describes it.

Knows how a product looks; knows nothing of shops, shoppers and models. The generator decides all
that isn't an attribute: background, angle, size, position, light. The same state gives the same
picture.
"""

from collections.abc import Mapping

import numpy as np
from numpy import ndarray
from PIL import Image, ImageChops, ImageColor, ImageFilter

from vlm4rec_spark.demo.shapes import SHAPES, Points, Shape
from vlm4rec_spark.demo.surfaces import Plane, background, material, pattern
from vlm4rec_spark.demo.trims import TRIMS, Pen

SIZE = 224
_FINE = 2 * SIZE
"""Outlines are drawn at twice the size and scaled down: Pillow draws without anti-aliasing."""

_COLOURS = {
    "red": "#c41e26",
    "yellow": "#f0c41e",
    "green": "#228034",
    "turquoise": "#28baba",
    "blue": "#2044be",
    "purple": "#702c96",
    "pink": "#f482b0",
    "black": "#343236",
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": ("shirt", "dress", "trousers", "bag", "hat", "cushion", "lamp", "armchair"),
    "colour": tuple(_COLOURS),
    "pattern": ("plain", "striped", "checked", "dotted", "zigzag"),
    "material": ("cotton", "denim", "leather", "wool"),
    "style": ("classic", "sporty", "romantic", "rustic"),
}
"""Every attribute with its possible values."""

_CREAM = np.array([246, 240, 222], np.float32)


def render(seed: int) -> tuple[dict[str, str], Image.Image]:
    """Attributes drawn uniformly, and a photo of such a product."""
    rng = np.random.default_rng(seed)
    attributes = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
    return attributes, draw(attributes, rng)


class _Camera:
    """The product's position in the photo: from its box to pixels, and back."""

    def __init__(self, rng: np.random.Generator) -> None:
        angle = np.radians(rng.uniform(-16, 16))
        self.scale = rng.uniform(0.68, 0.9)
        self.centre = rng.uniform(-0.09, 0.09, size=2)
        cos = np.cos(angle)
        sin = np.sin(angle)
        self.turn = np.array([[cos, sin], [-sin, cos]])

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        """Points of the product's box as positions in the fine picture."""
        placed = (points @ self.turn * self.scale + self.centre + 1) * (_FINE / 2)
        return list(map(tuple, placed.tolist()))

    def box(
        self,
        x: Plane,
        y: Plane,
    ) -> tuple[Plane, Plane]:
        """Positions in the photo, from -1 to 1, as points of the product's box."""
        back = (self.turn.T / self.scale).astype(np.float32)
        x = x - np.float32(self.centre[0])
        y = y - np.float32(self.centre[1])
        return x * back[0, 0] + y * back[1, 0], x * back[0, 1] + y * back[1, 1]


def draw(attributes: Mapping[str, str], rng: np.random.Generator) -> Image.Image:
    """A photo of the product, SIZE × SIZE, RGB."""
    shape = SHAPES[attributes["kind"]]
    camera = _Camera(rng)
    line = np.linspace(-1, 1, SIZE, dtype=np.float32)
    x, y = np.meshgrid(line, line)

    fabric = Image.new("L", (_FINE, _FINE))
    Pen(fabric, camera.pixels).polygon(shape.outline, fill=255)
    cover = _reduced(fabric)[..., None] / 255
    shift = rng.uniform(-12, 12, size=3).astype(np.float32)
    colour = np.array(ImageColor.getrgb(_COLOURS[attributes["colour"]]), np.float32) + shift
    surface = _surface(attributes, colour, camera.box(x, y), rng)

    picture = _fine(background(x, y, rng) * (1 - _shadow(fabric, rng)))
    _draw_fixtures(Pen(picture, camera.pixels), shape, colour)
    picture = _fine(_reduced(picture) * (1 - cover) + surface * cover)
    picture = _trimmed(picture, fabric, attributes["style"], shape, camera)
    return _exposed(_reduced(picture), rng)


def _trimmed(
    picture: Image.Image,
    fabric: Image.Image,
    style: str,
    shape: Shape,
    camera: _Camera,
) -> Image.Image:
    """The picture with seams and the style's decoration; `fabric` is the product's mask."""
    for seam in shape.seams:
        Pen(picture, camera.pixels).line(seam, "#1e1a1c", 4)
    trimmed = picture.copy()
    TRIMS[style](Pen(trimmed, camera.pixels), shape)
    # The sporty bands reach beyond the fabric.
    return Image.composite(trimmed, picture, fabric) if style == "sporty" else trimmed


def _exposed(scene: ndarray, rng: np.random.Generator) -> Image.Image:
    """The scene with a camera's tint and noise."""
    tint = rng.uniform(0.86, 1.1) * (1 + rng.uniform(-0.04, 0.04, size=3))
    noise = rng.integers(-5, 6, size=(SIZE, SIZE, 1), dtype=np.int8)
    return Image.fromarray(_bytes(scene * np.float32(tint) + noise))


def _surface(
    attributes: Mapping[str, str],
    colour: ndarray,
    points: tuple[Plane, Plane],
    rng: np.random.Generator,
) -> ndarray:
    """The product's RGB color at its points, one for each pixel: shape (SIZE, SIZE, 3)."""
    u, v = points
    second = pattern(attributes["pattern"], u, v, rng)[..., None]
    shade, gloss = material(attributes["material"], u, v, rng)
    slope = rng.uniform(-0.12, 0.12, size=2).astype(np.float32)
    light = shade + slope[0] * u + slope[1] * v
    surface = (colour + (_CREAM - colour) * second) * light[..., None]
    surface += (255 - surface) * gloss[..., None]
    return surface


def _bytes(scene: ndarray) -> ndarray:
    return np.clip(scene, 0, 255).astype(np.uint8)


def _fine(scene: ndarray) -> Image.Image:
    """The scene at the size at which outlines are drawn."""
    return Image.fromarray(_bytes(scene)).resize((_FINE, _FINE), Image.Resampling.NEAREST)


def _reduced(fine: Image.Image) -> ndarray:
    """The picture at its final size."""
    return np.asarray(fine.reduce(2), dtype=np.float32)


def _shadow(fabric: Image.Image, rng: np.random.Generator) -> ndarray:
    """How dark the product's shadow makes the background: shape (SIZE, SIZE, 1), 0 to 1."""
    small = fabric.reduce(8).filter(ImageFilter.GaussianBlur(2))
    right = int(rng.integers(-2, 3))
    down = int(rng.integers(1, 4))
    soft = ImageChops.offset(small, right, down).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(soft, dtype=np.float32)[..., None] * np.float32(rng.uniform(0.25, 0.5) / 255)


def _draw_fixtures(
    pen: Pen,
    shape: Shape,
    colour: ndarray,
) -> None:
    """The parts behind the fabric: legs and stands of wood, and a dark handle."""
    for part in shape.behind:
        pen.polygon(part, fill="#966c3e", outline="#54381c")
    if shape.handle is not None:
        dark = tuple(int(channel) for channel in np.clip(colour * 0.6, 0, 255))
        pen.line(shape.handle, dark, 22)
