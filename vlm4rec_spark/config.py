"""Loads, merges and checks the configuration: base.yaml, then each file, then each key=value.

Knows every stage's settings class and where each key was given; knows neither session nor table.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from vlm4rec_spark.caption.settings import CaptionSettings
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.evaluation.arms import EvaluateSettings
from vlm4rec_spark.report.data import ReportSettings
from vlm4rec_spark.settings_base import Settings
from vlm4rec_spark.spark.session import SparkSettings
from vlm4rec_spark.stages.embed import EmbedSettings
from vlm4rec_spark.stages.index import IndexSettings
from vlm4rec_spark.stages.ingest import IngestSettings
from vlm4rec_spark.stages.item_item import ItemItemSettings
from vlm4rec_spark.stages.profiles import ProfileSettings
from vlm4rec_spark.stages.recommend import RecommendSettings
from vlm4rec_spark.storage.index_versions import MaintainSettings

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "conf"
"""The folder conf/: in a wheel it is inside the package, in a checkout at the top."""
_MAX_LEVELS = 10
"""More than any key has. A key of thousands of dots would otherwise take memory by its square."""

_RENAMED = {
    "cooccurrence": "item_item",
    "cooccurrence.kept": "item_item.max_neighbors",
    "item_item.kept": "item_item.max_neighbors",
    "log: words": "log: text",
    "caption.model.compiled": "caption.model.torch_compile",
    "evaluate.define": "evaluate.custom_arms",
    "index.rebuild_share": "index.rebuild_threshold",
    "index.scann_from": "index.ann_min_items",
    "profiles.least_items": "profiles.min_items",
    "recommend.alike": "recommend.similarity_threshold",
    "recommend.least_score": "recommend.min_score",
    "recommend.popular": "recommend.popularity_fallback",
    "recommend.recall": "recommend.target_recall",
    "recommend.seen_again": "recommend.repeatable_events",
    "recommend.why": "recommend.explain",
}
"""Old keys, or `key: value`, and their names now."""

_Path = tuple[str, ...]
"""The parts of a key."""
_Origins = dict[_Path, str]
"""Where the value of each key was given: a file and its line, or a --set."""


class Config(Settings):
    """The whole configuration."""

    tables: str = Field("tables", min_length=1)
    log: Literal["text", "json"] = "text"
    lease_seconds: float = Field(60, ge=1)
    representation: Literal["title", "caption", "title_caption"] = "caption"
    spark: SparkSettings = SparkSettings()
    ingest: IngestSettings = IngestSettings()
    caption: CaptionSettings = CaptionSettings()
    embed: EmbedSettings = EmbedSettings()
    profiles: ProfileSettings = ProfileSettings()
    index: IndexSettings = IndexSettings()
    item_item: ItemItemSettings = ItemItemSettings()
    recommend: RecommendSettings = RecommendSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
    maintain: MaintainSettings = MaintainSettings()


def load(files: Sequence[Path] | None = None, assignments: Iterable[str] | None = None) -> Config:
    """The configuration from base.yaml, then `files`, then `key=value` assignments; later ones win.

    A file that isn't there is also looked for in conf/. Raises UsageError with a line per wrong
    key: where it is given, what is wrong, and the nearest valid key.
    """
    content: dict[str, Any] = {}
    origins: _Origins = {}
    for file in (CONF / "base.yaml", *(files or ())):
        content = _merged(content, _read(file, origins))
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--set {assignment!r}: write it as key=value, such as --set recommend.k=20."
            )
        path = tuple(key.strip().split(".", _MAX_LEVELS))
        # The keys above too: a value may take the place of a section, or a section that of a value.
        origins |= {path[:n]: f"--set {assignment}" for n in range(1, len(path) + 1)}
        _assign(content, path, _value(assignment, value))
    try:
        return Config.model_validate(content)
    except ValidationError as invalid:
        lines = [_one_line(_explain(error, origins)) for error in invalid.errors()]
        raise UsageError("\n".join(lines)) from None


def _read(file: Path, origins: _Origins) -> dict[str, Any]:
    path = file
    if len(file.parts) == 1 and not file.is_file():
        path = CONF / file.name
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        _note_origins(yaml.compose(text, Loader=yaml.SafeLoader), (), path, origins)
    except FileNotFoundError:
        raise UsageError(f"--config {file}: there is no such file, here or in {CONF}.") from None
    # PyYAML also lets through what its constructors raise, as for 2025-02-30 or !!bool x.
    except Exception as error:
        raise UsageError(f"--config {file} can't be read: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UsageError(f"--config {file}: expected keys and values at the top, found a {kind}.")
    return content


def _note_origins(node: Any, path: _Path, file: Path, origins: _Origins) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            origins[inner] = f"{file}, line {key.start_mark.line + 1}"
            _note_origins(value, inner, file, origins)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A new dict: by a YAML alias, two keys may hold the same one."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _value(assignment: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {assignment!r}: the value isn't YAML.") from None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--set {assignment!r}: the value can't be read: {reason}") from None


def _assign(content: dict[str, Any], path: _Path, value: Any) -> None:
    for part in path[:-1]:
        section = content.get(part)
        # A copy, because by a YAML alias two keys may hold the same section.
        content[part] = dict(section) if isinstance(section, dict) else {}
        content = content[part]
    content[path[-1]] = value


def _explain(error: Any, origins: _Origins) -> str:
    path = tuple(str(part) for part in error["loc"])
    key = ".".join(path)
    origin = _origin(path, origins)
    if renamed := _renamed(key, path[-1] if path else "", error["input"]):
        return f"{origin}: {renamed}."
    if error["type"] != "extra_forbidden":
        return f"{origin}: {key}: {error['msg']} (it is {_shortened(repr(error['input']))})."
    valid_keys = list(_keys(Config))
    # A right name in a wrong section, or in none, is nearer than one that is spelled alike.
    same_name = [valid for valid in valid_keys if valid.split(".")[-1] == path[-1]]
    (nearest,) = difflib.get_close_matches(key[:100], same_name or valid_keys, n=1, cutoff=0.0)
    return f"{origin}: unknown key {_shortened(repr(key))}. Did you mean {nearest!r}?"


def _origin(path: _Path, origins: _Origins) -> str:
    """Where this key was given, or a section above it, or a key below it."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    below = (origin for key, origin in origins.items() if key[: len(path)] == path)
    return next(below, "defaults")


def _renamed(key: str, name: str, value: Any) -> str:
    """What to say of an old key, of old keys in its section or of an old value; else nothing."""
    old_names = [key]
    if name == "cooccurrence":  # an arm of its own in evaluate.custom_arms may have it too
        old_names = [name]
    if isinstance(value, dict):
        old_names += [f"{key}.{inner}" for inner in value]
    if isinstance(value, str):
        old_names.append(f"{key}: {value}")
    renames = [f"{old} is called {_RENAMED[old]} now" for old in old_names if old in _RENAMED]
    return ", ".join(renames)


def _shortened(text: str) -> str:
    return text if len(text) < 80 else text[:77] + "..."


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
