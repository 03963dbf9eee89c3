"""Where a model's weights come from: a folder or a hub name, and the id that goes into keys."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlm4rec_spark.errors import UsageError

_FOR_PEOPLE = {".md", ".png"}


def pinned_id(key: str, name: str, revision: str) -> str:
    """`name@commit` of a hub model, `folder@hash` of a local one. `key` is the config key, for the error.

    The hash covers every file's name and bytes, so that retrained weights in the same folder are another model; not
    the model card and its pictures, which no model reads.
    Raises UsageError when `name` is written as a path and no folder is there, or when it holds no safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise UsageError(
                f"{key}: there is no model folder {name}. Give a folder that exists or a hub name."
            )
        return f"{name}@{_commit(key, name, revision)}"
    if not any(folder.rglob("*.safetensors")):
        raise UsageError(
            f"{key}: the folder {name} holds no .safetensors file. Other weight formats aren't loaded."
        )
    digest = hashlib.sha256()
    for file in sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in _FOR_PEOPLE
    ):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def _commit(key: str, name: str, revision: str) -> str:
    """The commit that the hub, or its local cache, holds for the revision: branches move, commits don't."""
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as unreachable:
        reason = " ".join(str(unreachable).split())[:200]
        raise UsageError(
            f"{key}: {name!r} is neither a folder nor a model that the hub or its cache gives ({reason})."
        ) from None
    return config.parent.name
