"""A photo as if taken again, and a photo of nothing: what a captioner is asked about to see whether it looks.

Knows pixels; knows no captioner.
"""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from vlm4rec_spark.models.photos.decode import decode

_CROP = 0.03
"""Of each side: enough that no pixel stays where it was, too little to lose what is shown."""
_SIDE = 224
_DARKEST, _LIGHTEST = 112, 144
"""Further apart than what `images.decode` refuses as blank."""


def perturbed(data: bytes, max_side: int) -> bytes:
    """The photo mirrored, its margins cut, as another JPEG. Raises PhotoError."""
    photo = ImageOps.mirror(decode(data, max_side))
    wide, high = round(photo.width * _CROP), round(photo.height * _CROP)
    out = io.BytesIO()
    photo.crop((wide, high, photo.width - wide, photo.height - high)).save(out, "JPEG", quality=90)
    return out.getvalue()


def blank_photo() -> bytes:
    """A grey that grows a little lighter from top to bottom, as a PNG."""
    slope = Image.linear_gradient("L").resize((_SIDE, _SIDE))
    grey = slope.point(lambda shade: _DARKEST + shade * (_LIGHTEST - _DARKEST) // 255)
    out = io.BytesIO()
    grey.convert("RGB").save(out, "PNG")
    return out.getvalue()
