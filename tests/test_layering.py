"""The arrows between the modules, read from their imports; and names that stand once."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vlm4rec_spark"
HEAVY = ("torch", "transformers", "scann", "sentence_transformers")
# Only the wiring knows several stages; everything else knows one at most.
STAGES = ("stages", "caption")
WIRING = ("pipeline", "config", "evaluation")
ABOVE_NUMPY = (
    "stages",
    "caption",
    "evaluation",
    "pipeline",
    "report",
    "cli",
    "config",
    "storage",
    "sources",
    "spark",
)
STAGE_WORDS = {
    "ingest",
    "caption",
    "embed",
    "index",
    "profiles",
    "recommend",
    "publish",
    "evaluate",
    "report",
    "maintain",
}


class Import(NamedTuple):
    name: str
    """The full dotted name, of `from a.b import c` a.b.c."""
    at_load: bool
    """When the module is loaded: not inside a function, not for type checkers only."""

    def of(self, *packages: str) -> bool:
        return any(f"{self.name}.".startswith(f"{package}.") for package in packages)

    def of_package(self, *parts: str) -> bool:
        return self.of(*(f"{PACKAGE}.{part}" for part in parts))


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


TREES = parsed(PACKAGE)
IMPORTS = {file: list(imports(tree)) for file, tree in TREES.items()}


def within(file: str, *parts: str) -> bool:
    """Whether the file is one of these modules, or in one of these folders."""
    return file.removesuffix(".py").split("/")[0] in parts


def importers(*packages: str) -> set[str]:
    return {
        file
        for file, imported in IMPORTS.items()
        if any(module.of(*packages) for module in imported)
    }


def offences(*parts: str, to: tuple[str, ...] = (), inside: tuple[str, ...] = ()) -> list[str]:
    """Imports in these parts of packages `to`, or of the package's parts `inside`."""
    return sorted(
        f"{file} imports {module.name}"
        for file, imported in IMPORTS.items()
        if within(file, *parts)
        for module in imported
        if module.of(*to) or module.of_package(*inside)
    )


def test_the_reader_of_imports_sees_every_kind():
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
    imported = list(imports(ast.parse(code)))
    at_load = [module.name for module in imported if module.at_load]
    assert at_load == ["a.b", "c.d.e", "c.d.f", "i", "m"]
    assert [module.name for module in imported if not module.at_load] == ["g.h", "j", "k.l"]
    assert not Import("a.bc", True).of("a.b")
    assert Import("a.b", True).of("a.b")
    assert Import("a.b.c", True).of("a.b")
    assert len(TREES) > 40


def test_the_numpy_world_never_imports_spark():
    assert offences("models", "training", "demo", to=("pyspark", "delta")) == []
    assert offences("models", "training", "demo", inside=ABOVE_NUMPY) == []
    assert offences("models", inside=("demo", "training")) == []
    assert offences("training", inside=("demo",)) == []


def test_stages_never_import_each_other():
    for file, imported in IMPORTS.items():
        if within(file, *STAGES):
            own = "caption"
            if not within(file, "caption"):
                own = file.removesuffix(".py").replace("/", ".")
            stages = [
                module.name
                for module in imported
                if module.of_package(*STAGES) and not module.of_package(own)
            ]
            assert stages == [], file


def test_stages_know_nothing_of_the_wiring():
    above = ("evaluation", "pipeline", "report", "cli", "config", "spark", "demo")
    assert offences("stages", inside=above) == []
    tables = ("storage.tables", "storage.layout", "storage.maintenance", "storage.state")
    assert offences(*STAGES, inside=tables) == []
    assert offences("caption", inside=tuple(part for part in above if part != "spark")) == []


def test_stages_touch_neither_session_nor_files():
    modules = ("fsspec", "shutil", "tempfile", "io", "os", "pyspark.sql.SparkSession")
    assert offences("stages", to=modules) == []
    forbidden = {
        "sparkSession",
        "sparkContext",
        "persist",
        "cache",
        "checkpoint",
        "localCheckpoint",
        "write",
        "mkdir",
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
    }
    for file, tree in TREES.items():
        if within(file, "stages"):
            assert forbidden.isdisjoint(used_names(tree)), file


def used_names(tree: ast.Module) -> set[str]:
    """Attributes, and called functions such as open."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = {
        "write" if node.func.id == "open" else node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return attributes | calls


def test_the_reader_of_names_sees_sessions_and_files():
    code = ast.parse("rows.sparkSession.sparkContext; open(path); rows.select(a).persist()")
    assert used_names(code) == {"sparkSession", "sparkContext", "write", "select", "persist"}


def test_heavy_libraries_are_imported_where_they_are_needed():
    # Training is torch from end to end. Only its own command imports it, when it is called.
    at_load = {
        file
        for file, imported in IMPORTS.items()
        if any(module.of(*HEAVY) and module.at_load for module in imported)
    }
    assert at_load == {"training/augment.py", "training/train.py"}
    training = {
        (file, module.at_load)
        for file, imported in IMPORTS.items()
        for module in imported
        if module.of_package("training") and not within(file, "training")
    }
    assert training == {("cli/train_captioner.py", False)}
    assert {file.split("/")[0] for file in importers(*HEAVY)} <= {"models", "training"}


DELTA_STATEMENT = re.compile("MERGE INTO|DESCRIBE (HISTORY|DETAIL)|TBLPROPERTIES")


def test_only_storage_speaks_deltas_sql():
    assert importers("delta") == set()
    speaking = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and DELTA_STATEMENT.search(str(node.value))
    }
    # The archive's example runs each kind of statement once, on a table of its own.
    outside = {file for file in speaking if not file.startswith("storage/")}
    assert outside == {"spark/class_archive.py"}


def test_only_session_builds_a_session():
    building = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("builder", "getOrCreate")
        and ast.unparse(node).startswith(("SparkSession", "SparkContext", "pyspark"))
    }
    assert building == {"spark/session.py"}


def test_only_the_wiring_sees_several_stages():
    several = [file for file in IMPORTS if len(stages_of(file)) > 1]
    assert [file for file in several if not within(file, *WIRING)] == []
    outside = [
        file for file in importers(f"{PACKAGE}.stages") if not within(file, "stages", *WIRING)
    ]
    assert outside == []


def stages_of(file: str) -> set[str]:
    """The stages that the file imports, such as stages.index or caption."""
    stages = set()
    for module in IMPORTS[file]:
        if module.of_package("stages"):
            stages.add(".".join(module.name.split(".")[1:3]))
        elif module.of_package("caption"):
            stages.add("caption")
    return stages


def test_evaluation_runs_three_stages_and_is_run_by_the_wiring():
    stages = {stage for file in IMPORTS if within(file, "evaluation") for stage in stages_of(file)}
    assert stages == {f"stages.{name}" for name in ("item_item", "profiles", "recommend")}
    allowed = ("evaluation", "cli", "pipeline", "config")
    evaluating = importers(f"{PACKAGE}.evaluation")
    assert [file for file in evaluating if not within(file, *allowed)] == []


def test_only_the_command_line_runs_the_pipeline():
    running = importers(f"{PACKAGE}.pipeline")
    assert [file for file in running if not within(file, "pipeline", "cli")] == []
    assert [file for file in importers(f"{PACKAGE}.cli") if not within(file, "cli")] == []


def test_every_stage_file_has_its_stage_and_its_fingerprint():
    wiring = TREES["pipeline/__init__.py"]
    stages = next(
        [ast.literal_eval(key) for key in node.value.keys if key]
        for node in wiring.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_STAGES"
        if isinstance(node.value, ast.Dict)
    )
    assert len(stages) == 9
    for stage in stages:
        functions = {
            node.name: [argument.arg for argument in node.args.args]
            for node in TREES[f"pipeline/{stage}.py"].body
            if isinstance(node, ast.FunctionDef)
        }
        assert functions[stage] == ["context", "result"], stage
        assert functions["inputs_fingerprint"] == ["context"], stage


def test_no_module_and_no_class_name_stands_twice_but_for_a_stage():
    modules = Counter(Path(file).stem for file in TREES if not file.endswith("__init__.py"))
    # Files are reached through two modules: models/files.py on workers, storage/files.py on the
    # driver.
    assert {name for name, count in modules.items() if count > 1} - STAGE_WORDS <= {"files"}
    classes = Counter(
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


@pytest.mark.parametrize(
    "file", sorted(path.name for path in (ROOT / "jobs").iterdir() if path.suffix == ".py")
)
def test_a_job_only_calls_its_command(file: str):
    text = (ROOT / "jobs" / file).read_text()
    assert len(text.splitlines()) <= 12
    assert [module.name for module in imports(ast.parse(text))] == ["sys", "vlm4rec_spark.cli.main"]
    command = {"pipeline": "run"}.get(name := file.removeprefix("run_").removesuffix(".py"), name)
    assert text.endswith(f'raise SystemExit(main(["{command}", *sys.argv[1:]]))\n')


def test_there_is_no_drawer_for_leftovers():
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [file for file in TREES if file.rsplit("/", 1)[-1] in drawers] == []


def test_nothing_is_unpickled_and_no_model_brings_code():
    assert importers("pickle", "cloudpickle", "dill", "joblib", "shelve") == set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), file
            assert not (isinstance(node, ast.Constant) and node.value == "trust_remote_code"), file
