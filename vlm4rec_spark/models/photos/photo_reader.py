"""Reads photos from file systems and URLs, if they have changed. Knows no rows and no tables."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from vlm4rec_spark.models import files
from vlm4rec_spark.models.photos import download
from vlm4rec_spark.models.photos.download import HttpSettings


@dataclass(frozen=True)
class PhotoVersion:
    """What identified a photo when it was last read. Times are milliseconds since 1970."""

    bytes: int | None = None
    modified_at: int | None = None
    sha256: str | None = None


class PhotoFile(NamedTuple):
    """A photo's bytes, and its modification time in milliseconds since 1970."""

    image: bytes
    modified_at: int


class ChangedError(Exception):
    """Another photo has taken the place of the one that was ingested."""


_NEVER_READ = PhotoVersion()


def read_if_changed(
    uri: str,
    http: HttpSettings,
    last_read: PhotoVersion = _NEVER_READ,
    changed_at: int | None = None,
) -> PhotoFile | None:
    """The photo, or None if it is still the one that was last read.

    `changed_at` is the modification time of a photo that a listing has shown to be changed. Raises
    DownloadError, or whatever the file system raises.
    """
    if download.is_url(uri):
        return _download(uri, http, last_read)
    return _read_file(uri, last_read, changed_at)


def read_unchanged(uri: str, sha256: str, http: HttpSettings) -> bytes:
    """The photo that was ingested. Raises ChangedError if it is another one now.

    Also raises DownloadError, or whatever the file system raises.
    """
    photo = read_if_changed(uri, http)
    assert photo is not None  # nothing was given that it could equal
    if hashlib.sha256(photo.image).hexdigest() != sha256:
        raise ChangedError("the photo at this address has changed since ingest; run ingest")
    return photo.image


def _read_file(uri: str, last_read: PhotoVersion, changed_at: int | None) -> PhotoFile | None:
    file = files.at(uri)
    modified_at = changed_at
    if modified_at is None:
        modified_at = file.modified_at()
        if modified_at == last_read.modified_at and file.size() == last_read.bytes:
            return None
    return PhotoFile(file.read(), modified_at)


def _download(url: str, http: HttpSettings, last_read: PhotoVersion) -> PhotoFile | None:
    """None if the server or the bytes say that nothing has changed.

    A server that gave no modification time is asked with the time of its last answer. Most servers
    then send the photo again.
    """
    answer = download.fetch(url, http, last_read.modified_at)
    if answer is None:
        return None
    same_bytes = hashlib.sha256(answer.image).hexdigest() == last_read.sha256
    if same_bytes and answer.last_modified in (None, last_read.modified_at):
        return None
    # The same photo with a new time is stored too, or it would be downloaded on every run.
    if answer.last_modified is None:
        return PhotoFile(answer.image, answer.answered_at)
    return PhotoFile(answer.image, answer.last_modified)
