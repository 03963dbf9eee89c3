"""The id of a model's weights that goes into keys, from a folder or a hub name. Loads no model."""

import hashlib
from pathlib import Path

from vlm4rec_spark.errors import UsageError

_DOCUMENTATION = {".md", ".png"}


def pinned_id(key: str, name: str, revision: str) -> str:
    """`name@commit` of a hub model, `folder@hash` of a local one.

    `key` is the config key, for the error. The hash covers the name and bytes of every file, so new
    weights in the same folder are another model. The model card and its pictures don't count.
    Raises UsageError if a path leads to no folder, or if the folder holds no safetensors.
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
            f"{key}: the folder {name} holds no .safetensors file. "
            "Other weight formats aren't loaded."
        )
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _DOCUMENTATION or not file.is_file():
            continue
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def _commit(key: str, name: str, revision: str) -> str:
    """The commit of the revision, from the hub or its cache. A branch moves, a commit doesn't."""
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as unreachable:
        reason = " ".join(str(unreachable).split())[:200]
        raise UsageError(
            f"{key}: {name!r} is neither a folder nor a model of the hub or its cache ({reason})."
        ) from None
    return config.parent.name
