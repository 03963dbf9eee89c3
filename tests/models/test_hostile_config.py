"""A configuration of any YAML and any bytes is a Config, or a UsageError of one line per mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from vlm4rec_spark.config import Config, load
from vlm4rec_spark.errors import UsageError

hostile = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def paths(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """Every key and section, as a path."""
    found: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        found.append((name,))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [(name, *rest) for rest in paths(field.annotation)]
    return found


PATHS = paths(Config)
# What PyYAML makes something of, or fails to.
SCALARS = (
    "2025-02-30",
    "2025-01-01",
    "0x_",
    "0b_",
    "1:99",
    "9" * 5_000,
    "1e400",
    ".nan",
    "-.inf",
    "~",
    "=",
    "<<",
    "!!bool x",
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary é",
    "!!omap 3",
    "!!set {a}",
    "!!python/object:os.system x",
    "*a",
    "&a [*a]",
    "&a {a: *a}",
    "[a",
    "{a: 1, a: 2}",
    "{? [a] : b}",
    "{? {a: b} : c}",
    "{<<: 3}",
    "---\n---\n",
    '"\\ud800"',
    '"\\0"',
    "a\nb",
    "\x1b[31m",
    "\u2028x",
    "(a{99999999999999})(b)",
    "(" * 300,
    "[" * 300,
    "{a: " * 300,
    "'; DROP TABLE items; --",
    "../../etc/passwd",
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(SCALARS),
    st.dates(),
)
names = st.sampled_from(sorted({part for path in PATHS for part in path})) | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def nested(path: tuple[str, ...], value: Any) -> dict:
    for part in reversed(path):
        value = {part: value}
    return value


def outcome(files: list[Path], assignments: list[str]) -> Config | list[str]:
    """The Config, or the lines of the refusal; any other exception fails the test."""
    try:
        return load(files, assignments)
    except UsageError as refused:
        lines = str(refused).splitlines()
        assert lines and all(line.strip() for line in lines)
        return lines


@pytest.fixture(scope="module")
def yours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "yours.yaml"


@hostile
@given(content=trees | st.tuples(st.sampled_from(PATHS), trees).map(lambda pair: nested(*pair)))
def test_any_tree(yours: Path, content: Any) -> None:
    yours.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    outcome([yours], [])


@hostile
@given(path=st.sampled_from(PATHS), value=st.sampled_from(SCALARS))
def test_any_key_with_what_yaml_makes_something_of(
    yours: Path, path: tuple[str, ...], value: str
) -> None:
    shown = outcome([], [f"{'.'.join(path)}={value}"])
    assert isinstance(shown, Config) or len(shown) == 1
    yours.write_text(
        "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(path))[:-1] + f" {value}\n"
    )
    outcome([yours], [])


bits = (
    b"a",
    b"recommend",
    b"k",
    b": ",
    b"\n",
    b"  ",
    b"- ",
    b"&x ",
    b"*x",
    b"[",
    b"]",
    b"{",
    b"}",
    b", ",
    b"<<",
    b"!!",
    b"|",
    b"%",
    b"\xff",
    b"1",
)


@hostile
@given(data=st.binary(max_size=200) | st.lists(st.sampled_from(bits), max_size=40).map(b"".join))
def test_any_bytes(yours: Path, data: bytes) -> None:
    yours.write_bytes(data)
    outcome([yours], [])


assignment = st.tuples(
    st.sampled_from([".".join(path) for path in PATHS]) | st.text(max_size=10),
    st.sampled_from(["=", "", ".x=", "=="]),
    st.sampled_from(SCALARS) | st.text(max_size=10),
).map("".join)


@hostile
@given(assignments=st.lists(assignment, max_size=3))
def test_any_assignments(assignments: list[str]) -> None:
    shown = outcome([], assignments)
    assert isinstance(shown, Config) or len(shown) <= 1 + len(assignments)


def test_a_key_as_long_as_a_book() -> None:
    for key in ("x" * 100_000, "." * 100_000):
        (line,) = outcome([], [f"{key}=1"])
        assert line.endswith("?")


def test_one_value_under_two_names_stays_two_values(yours: Path) -> None:
    yours.write_text("ingest: {items: &same {path: [a]}, interactions: *same}\n")
    ingest = load([yours], ["ingest.items.format=json"]).ingest
    assert (ingest.items.format, ingest.interactions.format) == ("json", "csv")


@pytest.mark.parametrize("weight", [".inf", ".nan", "-1", "0"])
def test_a_weight_that_no_vector_bears(weight: str) -> None:
    assert len(outcome([], [f"profiles.event_weights.view={weight}"])) == 1
