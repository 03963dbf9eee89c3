"""Why a photo can't be used."""

PHOTO_ERRORS = (
    "empty",
    "not_an_image",
    "html_page",
    "svg",
    "unsupported",
    "truncated",
    "too_large",
    "too_small",
    "blank",
)
"""In this order: no bytes; an unknown format; a web page; a drawing; a known format that can't be
read here; damaged or cut off; more than MAX_PIXELS; a side under MIN_SIDE; one color all over."""


class PhotoError(Exception):
    """A photo that can't be used. `error_class` is one of PHOTO_ERRORS."""

    def __init__(self, error_class: str, message: str):
        super().__init__(message)
        self.error_class = error_class
