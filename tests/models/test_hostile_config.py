"""A configuration of any YAML and any bytes is a Config, or an error with a line per mistake."""

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
    result: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        result.append((name,))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            result += [(name, *rest) for rest in paths(field.annotation)]
    return result


PATHS = paths(Config)
# Texts that PyYAML converts, or fails on.
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
    """The Config, or the lines of the error; any other exception fails the test."""
    try:
        return load(files, assignments)
    except UsageError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.strip() for line in lines)
        return lines


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("config") / "own.yaml"


@hostile
@given(content=trees | st.tuples(st.sampled_from(PATHS), trees).map(lambda pair: nested(*pair)))
def test_any_tree(config_file, content: Any):
    config_file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    outcome([config_file], [])


@hostile
@given(path=st.sampled_from(PATHS), value=st.sampled_from(SCALARS))
def test_any_key_with_a_hostile_value(
    config_file,
    path: tuple[str, ...],
    value: str,
):
    result = outcome([], [f"{'.'.join(path)}={value}"])
    assert isinstance(result, Config) or len(result) == 1
    sections = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(path))
    config_file.write_text(f"{sections[:-1]} {value}\n")
    outcome([config_file], [])


fragments = (
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
@given(
    data=st.binary(max_size=200) | st.lists(st.sampled_from(fragments), max_size=40).map(b"".join)
)
def test_any_bytes(config_file, data: bytes):
    config_file.write_bytes(data)
    outcome([config_file], [])


assignment = st.tuples(
    st.sampled_from([".".join(path) for path in PATHS]) | st.text(max_size=10),
    st.sampled_from(["=", "", ".x=", "=="]),
    st.sampled_from(SCALARS) | st.text(max_size=10),
).map("".join)


@hostile
@given(assignments=st.lists(assignment, max_size=3))
def test_any_assignments(assignments: list[str]):
    result = outcome([], assignments)
    assert isinstance(result, Config) or len(result) <= 1 + len(assignments)


def test_a_very_long_key():
    for key in ("x" * 100_000, "." * 100_000):
        (line,) = outcome([], [f"{key}=1"])
        assert line.endswith("?")


def test_one_value_under_two_names_stays_two_values(config_file):
    config_file.write_text("ingest: {items: &same {path: [a]}, interactions: *same}\n")
    ingest = load([config_file], ["ingest.items.format=json"]).ingest
    assert (ingest.items.format, ingest.interactions.format) == ("json", "csv")


@pytest.mark.parametrize("weight", [".inf", ".nan", "-1", "0"])
def test_an_impossible_weight(weight: str):
    assert len(outcome([], [f"profiles.event_weights.view={weight}"])) == 1
