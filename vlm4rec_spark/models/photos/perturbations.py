"""Photos to test a captioner with: one as if taken again, and a blank one. Knows pixels only."""

import io

from PIL import Image, ImageOps

from vlm4rec_spark.models.photos.decode import decode

_CROPPED_SHARE = 0.03
"""Of each side. It moves every pixel, and is too little to lose what is shown."""
_BLANK_SIDE = 224
_DARKEST = 112
_LIGHTEST = 144
"""Further apart than what `decode` refuses as blank."""


def perturbed(data: bytes, max_side: int) -> bytes:
    """The photo mirrored, with its margins cut, as a new JPEG. Raises PhotoError."""
    photo = ImageOps.mirror(decode(data, max_side))
    margin_x = round(photo.width * _CROPPED_SHARE)
    margin_y = round(photo.height * _CROPPED_SHARE)
    box = (margin_x, margin_y, photo.width - margin_x, photo.height - margin_y)
    buffer = io.BytesIO()
    photo.crop(box).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def blank_photo() -> bytes:
    """A gray that grows a little lighter from top to bottom, as a PNG."""
    gradient = Image.linear_gradient("L").resize((_BLANK_SIDE, _BLANK_SIDE))
    gray = gradient.point(lambda shade: _DARKEST + shade * (_LIGHTEST - _DARKEST) // 255)
    buffer = io.BytesIO()
    gray.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
