"""Housekeeping of the index folder: which versions in it are ours, and which of them may go.

Knows folders and manifests; knows no table, no Spark and nothing of what a version holds.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

REST = 24 * 3600
"""Seconds for which nothing is deleted that has just been written: somebody may be at work on it."""
_NAME = re.compile(r"[0-9a-f]{16}")
_PARTS = {"vectors.npy", "ids.parquet", "scann", "manifest.json", "manifest.json.aside"}


class MaintainSettings(BaseModel):
    """How long files are kept that only older versions of a table need, and how many older versions of the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Not longer than Delta's log, which it keeps for 30 days; the least is checked by `tables.py`, as Delta does.
    retention_hours: int = Field(168, ge=0, le=720)
    index_versions: int = Field(3, ge=0)


@dataclass(frozen=True)
class Version:
    """One sub-folder of the index folder. `whole`: its manifest is there, which is written last."""

    folder: Path
    whole: bool
    written: float
    bytes: int

    @property
    def index_id(self) -> str:
        return self.folder.name


def versions(folder: Path) -> list[Version]:
    """The index versions in `folder`, by name. Whatever isn't surely one is left out, links too."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    found = (_version(entry) for entry in entries if _NAME.fullmatch(entry.name))
    return [version for version in found if version]


def prunable(
    there: Collection[Version],
    in_force: Collection[str],
    named: Mapping[str, float],
    keep: int,
    now: float,
) -> list[Version]:
    """The versions that may go, at the time `now` in seconds of the epoch.

    Half-built ones; and whole ones beyond the `keep` latest that aren't in force. `named`: when a run of these tables
    last built the index, by index id; a whole version that no run names may be another shop's and stays. So does
    whatever was written, or named, less than a day ago.
    """
    idle = [version for version in there if version.index_id not in in_force]
    half_built = [version for version in idle if not version.whole]
    ours = [version for version in idle if version.whole and version.index_id in named]
    ours.sort(key=lambda version: _last_used(version, named), reverse=True)
    return [
        version for version in half_built + ours[keep:] if now - _last_used(version, named) > REST
    ]


def remove(version: Version) -> None:
    """Delete the folder. Its manifest goes first: killed half-way, it leaves what nobody takes for an index."""
    (version.folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(version.folder)


def _version(folder: Path) -> Version | None:
    if folder.is_symlink() or not folder.is_dir():
        return None
    whole = _manifest(folder).get("index_id") == folder.name
    if not whole and not {entry.name for entry in folder.iterdir()} <= _PARTS:
        return None
    files = [entry.stat() for entry in folder.rglob("*") if entry.is_file()]
    written = max([folder.stat().st_mtime, *(file.st_mtime for file in files)])
    return Version(folder, whole, written, sum(file.st_size for file in files))


def _manifest(folder: Path) -> dict:
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_used(version: Version, named: Mapping[str, float]) -> float:
    return max(version.written, named.get(version.index_id, 0.0))
