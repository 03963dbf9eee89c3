"""Loads, merges and checks the configuration: base.yaml, then each file, then each key=value.

Knows every stage's settings class and which key came from where; knows no Spark session and no table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm4rec_spark.caption.settings import CaptionSettings
from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.evaluation.arms import EvaluateSettings
from vlm4rec_spark.report.data import ReportSettings
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
"""The conf/ folder: inside the package in a wheel, beside it in a checkout."""
_LEVELS = 10
"""More than any key has. A typing error of thousands of dots would otherwise cost memory by its square."""

_RENAMED = {
    "cooccurrence": "item_item",
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
"""Keys of releases before 0.9, and what they are called now."""


class Config(BaseModel):
    """The whole configuration. Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


def load(files: Sequence[Path] = (), assignments: Iterable[str] = ()) -> Config:
    """The configuration from base.yaml, then `files`, then `key=value` assignments; later ones win.

    A file that isn't there is also looked for in conf/. Raises UsageError, one line per wrong key, each with the
    place where it stands and the nearest valid key.
    """
    merged: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    for file in (CONF / "base.yaml", *files):
        merged = _merged(merged, _read(file, places))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--set {assignment!r}: write it as key=value, such as --set recommend.k=20."
            )
        path = tuple(key.strip().split(".", _LEVELS))
        # The keys above too: a value may stand where a section was, and the other way round.
        places |= {path[:n]: f"--set {assignment}" for n in range(1, len(path) + 1)}
        _assign(merged, path, _value(assignment, value))
    try:
        return Config.model_validate(merged)
    except ValidationError as wrong:
        raise UsageError(
            "\n".join(_on_one_line(_explain(error, places)) for error in wrong.errors())
        ) from None


def _read(file: Path, places: dict[tuple[str, ...], str]) -> dict[str, Any]:
    try:
        found = file if file.is_file() else CONF / file.name if len(file.parts) == 1 else file
        text = found.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        _note_places(yaml.compose(text, Loader=yaml.SafeLoader), (), found, places)
    except FileNotFoundError:
        raise UsageError(f"--config {file}: there is no such file, here or in {CONF}.") from None
    # Not only YAMLError: PyYAML lets through what its constructors raise, as for 2025-02-30 or !!bool x.
    except Exception as broken:
        raise UsageError(
            f"--config {file} can't be read: {' '.join(str(broken).split())}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"--config {file}: expected keys and values at the top, found a {type(content).__name__}."
        )
    return content


def _note_places(
    node: Any, path: tuple[str, ...], file: Path, places: dict[tuple[str, ...], str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            places[*path, str(key.value)] = f"{file}, line {key.start_mark.line + 1}"
            _note_places(value, (*path, str(key.value)), file, places)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A new dict: by an alias, the same one may stand under two keys."""
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
    except Exception as wrong:
        raise UsageError(
            f"--set {assignment!r}: the value can't be read: {' '.join(str(wrong).split())}"
        ) from None


def _assign(into: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        section = into.get(part)
        # A copy, because by an alias the same section may stand under two keys.
        into[part] = dict(section) if isinstance(section, dict) else {}
        into = into[part]
    into[path[-1]] = value


def _explain(error: Any, places: dict[tuple[str, ...], str]) -> str:
    path = tuple(str(part) for part in error["loc"])
    above = (places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places)
    below = (place for key, place in places.items() if key[: len(path)] == path)
    place = [*above, *below, "defaults"][0]
    key = ".".join(path)
    if error["type"] != "extra_forbidden":
        return f"{place}: {key}: {error['msg']} (it is {_shortened(repr(error['input']))})."
    if key in _RENAMED:
        return f"{place}: {key} is called {_RENAMED[key]} now."
    known = list(_keys(Config))
    # A right name under a wrong or a missing section is nearer than one that is merely spelt alike.
    same_name = [other for other in known if other.split(".")[-1] == path[-1]]
    near = difflib.get_close_matches(key[:100], same_name or known, n=1, cutoff=0.0)
    return f"{place}: unknown key {_shortened(repr(key))}. Did you mean {near[0]!r}?"


def _shortened(text: str) -> str:
    return text if len(text) < 80 else text[:77] + "..."


def _on_one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
