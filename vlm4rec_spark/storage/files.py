"""Files of every file system on the driver: pathlib for local ones, Hadoop for all others.

Knows paths and bytes; knows no table. Workers use models/files.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm4rec_spark.models.files import without_file_scheme

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def qualified(location: str) -> str:
    """An absolute path: Delta takes a relative one for a table's name. A URI stays as it is."""
    return location if ":" in location else os.path.abspath(location)  # noqa: PTH100


def filesystem(spark: SparkSession, uri: str) -> Files:
    """The file system of a URI. A path without a scheme lies in Hadoop's default file system."""
    if without_file_scheme(uri) != uri:
        return LocalFiles()
    files = HadoopFiles(spark, uri)
    return LocalFiles() if files.scheme == "file" else files


class LocalFiles:
    """Files of this machine, or of storage that it mounts. Takes paths and file: URIs."""

    def names(self, folder: str) -> list[str]:
        """Names of all entries; none when there is no such folder."""
        path = _local(folder)
        return [entry.name for entry in path.iterdir()] if path.is_dir() else []

    def folders(self, folder: str) -> list[str]:
        """Names of the sub-folders."""
        return [name for name in self.names(folder) if (_local(folder) / name).is_dir()]

    def create(self, uri: str, text: str) -> bool:
        """Write a new file; False when it exists. Two writers can't both succeed."""
        path = _local(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def replace(self, uri: str, text: str) -> None:
        """Write over a file in place. A reader may see half of it."""
        with _local(uri).open("r+") as file:
            file.write(text)
            file.truncate()

    def read(self, uri: str) -> str | None:
        """The file's text; None when there is no such file."""
        try:
            return _local(uri).read_text()
        except FileNotFoundError:
            return None

    def delete(self, uri: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing happens when there is none."""
        path = _local(uri)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def last_written(self, folder: str) -> float:
        """When a file below the folder was last written, in seconds since 1970."""
        path = _local(folder)
        return max((file.stat().st_mtime for file in _below(path)), default=path.stat().st_mtime)

    def size(self, folder: str) -> int:
        """Bytes of all files below the folder."""
        return sum(file.stat().st_size for file in _below(_local(folder)))


class HadoopFiles:
    """The methods of LocalFiles for every file system that Hadoop knows. `uri` is any URI in it."""

    def __init__(self, spark: SparkSession, uri: str):
        self._jvm: Any = spark._jvm
        # Looked up once: py4j asks Java for each part of such a name.
        self._path: Any = self._jvm.org.apache.hadoop.fs.Path  # type: ignore[union-attr]
        conf = spark._jsparkSession.sessionState().newHadoopConf()
        self._filesystem = self._path(uri).getFileSystem(conf)
        self.scheme = self._filesystem.getUri().getScheme()

    def names(self, folder: str) -> list[str]:
        return [status.getPath().getName() for status in self._statuses(folder)]

    def folders(self, folder: str) -> list[str]:
        statuses = self._statuses(folder)
        return [status.getPath().getName() for status in statuses if status.isDirectory()]

    def create(self, uri: str, text: str) -> bool:
        """As safe as the file system's own create without overwrite."""
        try:
            self._write(uri, text, overwrite=False)
        except Exception as error:
            if "AlreadyExists" in str(error):
                return False
            raise
        return True

    def replace(self, uri: str, text: str) -> None:
        self._write(uri, text, overwrite=True)

    def read(self, uri: str) -> str | None:
        try:
            stream = self._filesystem.open(self._path(uri))
        except Exception as error:
            if "FileNotFound" in str(error):
                return None
            raise
        with closing(stream):
            return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))

    def delete(self, uri: str) -> None:
        self._filesystem.delete(self._path(uri), True)

    def last_written(self, folder: str) -> float:
        files = self._filesystem.listFiles(self._path(folder), True)
        times = []
        while files.hasNext():
            times.append(files.next().getModificationTime())
        if not times:
            # Only for an empty folder: an object store has no time for folders and says now.
            times = [self._filesystem.getFileStatus(self._path(folder)).getModificationTime()]
        return float(max(times) / 1000)

    def size(self, folder: str) -> int:
        return int(self._filesystem.getContentSummary(self._path(folder)).getLength())

    def _statuses(self, folder: str) -> list[Any]:
        path = self._path(folder)
        return list(self._filesystem.listStatus(path)) if self._filesystem.exists(path) else []

    def _write(self, uri: str, text: str, overwrite: bool) -> None:
        with closing(self._filesystem.create(self._path(uri), overwrite)) as stream:
            stream.write(bytearray(text.encode()))


def _local(uri: str) -> Path:
    return Path(without_file_scheme(uri))


def _below(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


Files = LocalFiles | HadoopFiles
