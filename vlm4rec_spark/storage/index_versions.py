"""Upkeep of the index folder: which versions in it are ours, and which of them may go.

Knows folders and manifests; knows no table, no Spark and nothing of what a version holds.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from vlm4rec_spark.settings_base import Settings

SECONDS_UNTOUCHED = 24 * 3600
"""What was written less than this ago stays: somebody may be at work on it."""
_INDEX_ID = re.compile(r"[0-9a-f]{16}")
_PARTS = {"vectors.npy", "ids.parquet", "scann", "manifest.json", "manifest.json.aside"}


class MaintainSettings(Settings):
    """How long files stay that only older table versions need, and how many older indexes."""

    # At most the 30 days of Delta's own log. `maintenance.py` checks the minimum, as Delta does.
    retention_hours: int = Field(168, ge=0, le=720)
    index_versions: int = Field(3, ge=0)


@dataclass(frozen=True)
class IndexVersion:
    """A sub-folder of the index folder. `whole`: it has its manifest, which is written last."""

    folder: Path
    whole: bool
    written: float
    bytes: int

    @property
    def index_id(self) -> str:
        return self.folder.name


def versions(folder: Path) -> list[IndexVersion]:
    """The index versions in `folder`, by name. What isn't surely one is left out, links too."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    candidates = (_version(entry) for entry in entries if _INDEX_ID.fullmatch(entry.name))
    return [version for version in candidates if version]


def prunable(
    existing: Collection[IndexVersion],
    in_use: Collection[str],
    built_at: Mapping[str, float],
    keep: int,
    now: float,
) -> list[IndexVersion]:
    """The versions that may go at the time `now`, in seconds since 1970.

    These are half-built ones, and whole ones beyond the `keep` latest that aren't in use.
    `built_at`: when a run of these tables last built the index, by index id. A whole version that
    no run built may be another shop's, and stays. So does what was written or built in the last
    SECONDS_UNTOUCHED.
    """
    idle = [version for version in existing if version.index_id not in in_use]
    half_built = [version for version in idle if not version.whole]
    whole = [version for version in idle if version.whole and version.index_id in built_at]
    whole.sort(key=lambda version: _last_used(version, built_at), reverse=True)
    return [
        version
        for version in half_built + whole[keep:]
        if now - _last_used(version, built_at) > SECONDS_UNTOUCHED
    ]


def remove(version: IndexVersion) -> None:
    """Delete the folder, its manifest first: what a kill leaves isn't taken for an index."""
    (version.folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(version.folder)


def _version(folder: Path) -> IndexVersion | None:
    if folder.is_symlink() or not folder.is_dir():
        return None
    whole = _manifest(folder).get("index_id") == folder.name
    if not whole and not {entry.name for entry in folder.iterdir()} <= _PARTS:
        return None
    files = [entry.stat() for entry in folder.rglob("*") if entry.is_file()]
    written = max([folder.stat().st_mtime, *(file.st_mtime for file in files)])
    return IndexVersion(folder, whole, written, sum(file.st_size for file in files))


def _manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _last_used(version: IndexVersion, built_at: Mapping[str, float]) -> float:
    return max(version.written, built_at.get(version.index_id, 0.0))
