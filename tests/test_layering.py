"""The arrows between the modules, read from their imports: numpy below, stages apart, wiring above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OURS = "vlm4rec_spark"
HEAVY = ("torch", "transformers", "scann", "sentence_transformers")
# Two levels of folders, the second with the command line, know each stage; everything else knows one at most.
STAGES = ("stages", "caption")
WIRING = ("pipeline", "config", "evaluation")


class Import(NamedTuple):
    name: str
    """The full dotted name, of `from a.b import c` a.b.c."""
    at_load: bool
    """It happens when the module is loaded: neither inside a function nor for type checkers only."""

    def of(self, *packages: str) -> bool:
        return any(f"{self.name}.".startswith(f"{package}.") for package in packages)

    def of_ours(self, *parts: str) -> bool:
        return self.of(*(f"{OURS}.{part}" for part in parts))


def imports(node: ast.AST, at_load: bool = True) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, at_load) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here, so that this test can read them"
        yield from (Import(f"{node.module}.{alias.name}", at_load) for alias in node.names)
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for child in ast.iter_child_nodes(node):
        yield from imports(child, at_load and not later)


def parsed(folder: str) -> dict[str, ast.Module]:
    files = (ROOT / folder).rglob("*.py")
    return {str(file.relative_to(ROOT / folder)): ast.parse(file.read_text()) for file in files}


PACKAGE = parsed(OURS)
IMPORTS = {file: list(imports(tree)) for file, tree in PACKAGE.items()}


def within(file: str, *parts: str) -> bool:
    """The file is one of these modules or lies in one of these folders."""
    return file.removesuffix(".py").split("/")[0] in parts


def importers(*packages: str) -> set[str]:
    return {file for file, found in IMPORTS.items() if any(one.of(*packages) for one in found)}


def offences(*parts: str, to: tuple[str, ...] = (), to_ours: tuple[str, ...] = ()) -> list[str]:
    return sorted(
        f"{file} imports {one.name}"
        for file, found in IMPORTS.items()
        if within(file, *parts)
        for one in found
        if one.of(*to) or one.of_ours(*to_ours)
    )


def test_the_reader_of_imports_sees_every_kind() -> None:
    code = """
import a.b
from c.d import e, f
if TYPE_CHECKING:
    from g import h
class C:
    import i
def function():
    import j
    async def inner():
        from k import l
try:
    import m
except ImportError:
    pass
"""
    found = list(imports(ast.parse(code)))
    assert [one.name for one in found if one.at_load] == ["a.b", "c.d.e", "c.d.f", "i", "m"]
    assert [one.name for one in found if not one.at_load] == ["g.h", "j", "k.l"]
    assert [
        Import("a.bc", True).of("a.b"),
        Import("a.b", True).of("a.b"),
        Import("a.b.c", True).of("a.b"),
    ] == [False, True, True]
    assert len(PACKAGE) > 40


def test_the_numpy_world_never_imports_spark() -> None:
    assert offences("models", "training", "demo", to=("pyspark", "delta")) == []
    above = (
        "stages",
        "caption",
        "evaluation",
        "pipeline",
        "report",
        "cli",
        "config",
        "tables",
        "sources",
        "session",
        "schemas",
        "progress",
    )
    assert offences("models", "training", "demo", to_ours=above) == []
    assert offences("models", to_ours=("demo", "training")) == []
    assert offences("training", to_ours=("demo",)) == []


def test_stages_never_import_each_other() -> None:
    for file, found in IMPORTS.items():
        if within(file, *STAGES):
            own = (
                "caption" if within(file, "caption") else file.removesuffix(".py").replace("/", ".")
            )
            others = [one.name for one in found if one.of_ours(*STAGES) and not one.of_ours(own)]
            assert others == [], file


def test_stages_know_nothing_of_the_wiring() -> None:
    above = (
        "evaluation",
        "pipeline",
        "report",
        "cli",
        "config",
        "tables",
        "session",
        "progress",
        "demo",
    )
    assert offences(*STAGES, to_ours=above) == []


def test_heavy_libraries_are_imported_where_they_are_needed() -> None:
    # Training is torch from end to end, and only its own command imports it, when it is called.
    early = {
        (file, one.name)
        for file, found in IMPORTS.items()
        for one in found
        if one.of(*HEAVY) and one.at_load
    }
    assert {file for file, _ in early} == {"training/augment.py", "training/train.py"}
    training = {
        (file, one.at_load)
        for file, found in IMPORTS.items()
        for one in found
        if one.of_ours("training") and not within(file, "training")
    }
    assert training == {("cli/training.py", False)}
    assert {file.split("/")[0] for file in importers(*HEAVY)} <= {"models", "training"}


def test_only_tables_knows_delta() -> None:
    assert importers("delta") == {"tables.py"}


def test_only_session_builds_a_session() -> None:
    building = {
        file
        for file, tree in PACKAGE.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("builder", "getOrCreate")
        and ast.unparse(node).startswith(("SparkSession", "SparkContext", "pyspark"))
    }
    assert building == {"session.py"}


def test_only_the_wiring_sees_several_stages() -> None:
    several = set()
    for file, found in IMPORTS.items():
        ours = [one for one in found if one.of_ours(*STAGES)]
        seen = {tuple(one.name.split(".")[1 : 3 if one.of_ours("stages") else 2]) for one in ours}
        if len(seen) > 1:
            several.add(file)
    assert [file for file in several if not within(file, *WIRING)] == []
    assert [
        file for file in importers(f"{OURS}.stages") if not within(file, "stages", *WIRING)
    ] == []


def test_evaluation_runs_four_stages_and_is_run_by_the_wiring() -> None:
    runs = {
        one.name
        for file, found in IMPORTS.items()
        if within(file, "evaluation")
        for one in found
        if one.of_ours(*STAGES)
    }
    stages = {".".join(name.split(".")[1:3]) for name in runs}
    assert stages == {
        f"stages.{stage}" for stage in ("cooccurrence", "index", "profiles", "recommend")
    }
    allowed = ("evaluation", "cli", "pipeline", "config")
    assert [file for file in importers(f"{OURS}.evaluation") if not within(file, *allowed)] == []


def test_only_the_command_line_runs_the_pipeline() -> None:
    assert [
        file for file in importers(f"{OURS}.pipeline") if not within(file, "pipeline", "cli")
    ] == []
    assert [file for file in importers(f"{OURS}.cli") if not within(file, "cli")] == []


@pytest.mark.parametrize(
    "file", sorted(path.name for path in (ROOT / "jobs").iterdir() if path.suffix == ".py")
)
def test_a_job_only_calls_its_command(file: str) -> None:
    text = (ROOT / "jobs" / file).read_text()
    assert len(text.splitlines()) <= 12
    assert [one.name for one in imports(ast.parse(text))] == ["sys", "vlm4rec_spark.cli.main"]
    command = {"pipeline": "run"}.get(name := file.removeprefix("run_").removesuffix(".py"), name)
    assert text.endswith(f'raise SystemExit(main(["{command}", *sys.argv[1:]]))\n')


def test_there_is_no_drawer_for_leftovers() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [file for file in PACKAGE if file.rsplit("/", 1)[-1] in drawers] == []


def test_nothing_is_unpickled_and_no_model_brings_code() -> None:
    assert importers("pickle", "cloudpickle", "dill", "joblib", "shelve") == set()
    for file, tree in PACKAGE.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), file
            assert not (isinstance(node, ast.Constant) and node.value == "trust_remote_code"), file
