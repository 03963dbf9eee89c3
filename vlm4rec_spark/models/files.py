"""Files of every file system, for processes without Spark, such as workers.

Knows fsspec; knows nothing of what a file holds. On the driver, storage/files.py reaches them.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class File:
    """One file in the file system that its URI names."""

    filesystem: Any
    path: str

    def size(self) -> int:
        return int(self.filesystem.size(self.path))

    def modified_at(self) -> int:
        """Milliseconds since 1970."""
        return (self.filesystem.modified(self.path) - _EPOCH) // timedelta(milliseconds=1)

    def read(self) -> bytes:
        return bytes(self.filesystem.cat_file(self.path))


def at(uri: str) -> File:
    """The file at a URI or a path; whether it exists isn't checked.

    Raises ValueError for an http address inside another address: nobody would check its host.
    """
    import fsspec

    path = without_file_scheme(uri)
    if "://" not in path:
        # In a file's name, "::" has no meaning. In a URI it chains two file systems.
        return File(fsspec.filesystem("file"), path)
    if re.search(r"::\s*https?:", path, re.IGNORECASE):
        raise ValueError("an http address inside another address")
    return File(*fsspec.core.url_to_fs(path))


def without_file_scheme(uri: str) -> str:
    """file:/a and file:///a are the path /a; any other URI stays."""
    return re.sub(r"^file:/+", "/", uri)
