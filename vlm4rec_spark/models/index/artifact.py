"""An immutable folder that any Python process can open: its manifest, written last, holds every file's checksum."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from vlm4rec_spark.errors import RunError


def seal(folder: Path, facts: dict) -> None:
    """Write manifest.json with the facts, and the checksums of the files that are there."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    manifest = facts | {"sha256": {str(file.relative_to(folder)): _sha256(file) for file in files}}
    # Renamed into place: a torn manifest would pass for a finished folder, which isn't built again.
    aside = folder / "manifest.json.aside"
    aside.write_text(json.dumps(manifest, indent=1))
    aside.rename(folder / "manifest.json")


def manifest(what: str, folder: Path, known: int, again: str, verify: bool = True) -> dict:
    """The manifest of a sound folder. Raises RunError when it is incomplete, damaged or of another format.

    `what` names the folder for people, `known` is the format that can be read, `again` says what to do.
    """
    try:
        found = dict(json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError) as broken:
        raise RunError(f"The {what} folder {folder} is incomplete ({broken}). {again}") from None
    if found.get("format") != known:
        other = found.get("format")
        raise RunError(
            f"The {what} folder {folder} has format {other}; this release reads {known}. {again}"
        )
    for name, expected in found["sha256"].items() if verify else ():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise RunError(
                f"The {what} folder {folder} is damaged: {name} doesn't match its checksum. {again}"
            )
    return found


def reused(target: Path, opens: Callable[[Path], object]) -> bool:
    """Whether a sound folder is there, which then counts as used now. A torn or damaged one is removed, as are those
    beside it that nobody has used for a day."""
    for old in target.parent.iterdir() if target.parent.is_dir() else ():
        if old != target and time.time() - old.stat().st_mtime > 86_400:
            shutil.rmtree(old, ignore_errors=True)
    try:
        opens(target)
    except RunError:
        shutil.rmtree(target, ignore_errors=True)
        return False
    os.utime(target)
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
