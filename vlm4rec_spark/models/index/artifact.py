"""Artifact folders: immutable, and opened by any Python process.

The manifest is written last and holds the checksum of every file. Knows files, not their content.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm4rec_spark.errors import RunError

_UNUSED_S = 86_400
"""Seconds after which a folder that nobody used is deleted."""


def seal(folder: Path, details: dict) -> None:
    """Write manifest.json with the details and the checksums of all files in the folder."""
    checksums = {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    content = json.dumps(details | {"sha256": checksums}, indent=1)
    # Renamed into place: a torn manifest would pass for a finished folder, which isn't built again.
    draft = folder / "manifest.json.tmp"
    draft.write_text(content)
    draft.rename(folder / "manifest.json")


def read_manifest(
    folder: Path,
    kind: str,
    supported_format: int,
    advice: str,
    verify: bool = True,
) -> dict:
    """Read the manifest, and verify the files' checksums.

    kind: the folder's name in messages. advice: the last sentence of each message, what to do.
    Raises RunError if the folder is incomplete, damaged or of another format.
    """
    name = f"The {kind} folder {folder}"
    try:
        manifest = dict(json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{name} is incomplete ({error}). {advice}") from None
    stored = manifest.get("format")
    if stored != supported_format:
        message = f"{name} has format {stored}; this release reads {supported_format}. {advice}"
        raise RunError(message)
    checksums = manifest["sha256"] if verify else {}
    for file, checksum in checksums.items():
        path = folder / file
        if not path.is_file() or _sha256(path) != checksum:
            raise RunError(f"{name} is damaged: {file} doesn't match its checksum. {advice}")
    return manifest


def reuse(target: Path, open_folder: Callable[[Path], object]) -> bool:
    """Whether `target` is a sound folder. If so, it counts as used now.

    A torn or damaged `target` is removed. So are other folders in its parent that nobody used for a
    day.
    """
    for sibling in target.parent.glob("*"):
        if sibling != target and time.time() - sibling.stat().st_mtime > _UNUSED_S:
            shutil.rmtree(sibling, ignore_errors=True)
    try:
        open_folder(target)
    except RunError:
        shutil.rmtree(target, ignore_errors=True)
        return False
    os.utime(target)
    return True


def map_array(file: Path) -> np.ndarray:
    """As a plain array: each slice of a memmap is another memmap, which is slow to make."""
    return np.asarray(np.load(file, mmap_mode="r"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
