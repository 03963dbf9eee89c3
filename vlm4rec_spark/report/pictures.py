"""Photo bytes to a small JPEG and to the name of their kind. Knows Pillow; knows no table and no
HTML."""

import io
import warnings

from PIL import Image

from vlm4rec_spark.models.photos.decode import MAX_PIXELS, decode

THUMBNAIL_SIDE = 160
_EXIF_ORIENTATION = 0x0112


def thumbnail(data: bytes) -> bytes:
    """The photo as a JPEG of at most THUMBNAIL_SIDE pixels a side. Raises PhotoError."""
    out = io.BytesIO()
    decode(data, THUMBNAIL_SIDE).save(out, "JPEG", quality=82, optimize=True)
    return out.getvalue()


def kind(data: bytes) -> str:
    """The photo's kind by its header: "JPEG", or such as "JPEG, CMYK", or "unreadable"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                words = [image.format or "unknown format"]
                if image.mode == "CMYK":
                    words.append("CMYK")
                if image.has_transparency_data:
                    words.append("transparent")
                if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                    words.append("turned by EXIF")
                if getattr(image, "is_animated", False):
                    words.append("animated")
                if image.width * image.height > MAX_PIXELS:
                    words.append("too large")
    except Exception:  # Pillow's plug-ins raise anything on damaged headers
        return "unreadable"
    return ", ".join(words)
