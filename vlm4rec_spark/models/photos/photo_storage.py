"""Photos where they lie, in a file system or behind a URL: whether one has changed, and its bytes. Knows no rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vlm4rec_spark.models import files
from vlm4rec_spark.models.photos import download
from vlm4rec_spark.models.photos.download import HttpSettings


@dataclass(frozen=True)
class Known:
    """What was found at a place before, as far as anything was. Times are milliseconds since 1970."""

    bytes: int | None = None
    modified_at: int | None = None
    sha256: str | None = None


_NOTHING = Known()


def read(
    uri: str, http: HttpSettings, known: Known = _NOTHING, listed_at: int | None = None
) -> tuple[bytes, int] | None:
    """Bytes and modification time, or None when they are those that are known. Raises whatever the place raises.

    `listed_at` is the time of a photo that a listing has found to be changed.
    """
    return (
        _download(uri, http, known) if download.is_url(uri) else _read_file(uri, known, listed_at)
    )


class ChangedError(Exception):
    """At the place lies another photo than the one that was found there before."""


def read_again(uri: str, sha256: str, http: HttpSettings) -> bytes:
    """The photo that was found at a place before. Raises ChangedError, or whatever the place raises."""
    found = read(uri, http)
    assert found is not None  # nothing is known that they could be equal to
    if hashlib.sha256(found[0]).hexdigest() != sha256:
        raise ChangedError("at its place lies another photo now; run ingest")
    return found[0]


def _read_file(uri: str, known: Known, listed_at: int | None) -> tuple[bytes, int] | None:
    file = files.at(uri)
    modified_at = listed_at
    if modified_at is None:
        modified_at = file.modified_at()
        if modified_at == known.modified_at and file.size() == known.bytes:
            return None
    return file.read(), modified_at


def _download(url: str, http: HttpSettings, known: Known) -> tuple[bytes, int] | None:
    """None when the server or the bytes say that nothing has changed.

    A server that names no time is asked with that of its last answer, and most then send the photo again.
    """
    answer = download.fetch(url, http, known.modified_at)
    if answer is None:
        return None
    modified_at = answer.last_modified
    if hashlib.sha256(answer.image).hexdigest() == known.sha256 and modified_at in (
        None,
        known.modified_at,
    ):
        return None
    # The same photo with a new time is taken too, or it would be downloaded each night from now on.
    return answer.image, answer.answered_at if modified_at is None else modified_at
