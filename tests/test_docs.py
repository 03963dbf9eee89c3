"""README and docs tell the truth: examples run, commands parse, links work, sentences are short."""

import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from pyspark.sql import SparkSession

from vlm4rec_spark.cli import app, main
from vlm4rec_spark.config import load
from vlm4rec_spark.demo.drawing import draw
from vlm4rec_spark.storage.schemas import TABLES

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of every fenced block in this language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page, block) for page, text in PAGES.items() for block in pattern.findall(text)]


def commands() -> Iterator[tuple[str, str]]:
    """Page and command of every line in a shell block, continued lines joined."""
    for page, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                yield page, command.split("   #")[0].strip()


def example(name: str) -> str:
    """The block after `<!-- example: name -->` in the README."""
    match = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert match, f"the README has no example {name}"
    return match[1]


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory) -> Iterator[Path]:
    """A folder in which the README's worked example has run."""
    folder = tmp_path_factory.mktemp("worked-example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("items.csv", "events.csv"):
            Path(name).write_text(example(name))
        # The tests' JVM was started elsewhere: relative paths would be looked for there.
        settings = example("shop.yaml").replace("folder: photos", f"folder: {folder}/photos")
        for name in ("items.csv", "events.csv"):
            settings = settings.replace(f"[{name}", f"[{folder}/{name}")
        Path("shop.yaml").write_text(settings)
        Path("photos").mkdir()
        for number, line in enumerate(example("items.csv").splitlines()[1:]):
            item = line.split(",")[0]
            kind, colour = item.split("-")
            look = {
                "kind": kind,
                "colour": colour,
                "pattern": "plain",
                "material": "cotton",
                "style": "classic",
            }
            draw(look, np.random.default_rng(number)).save(f"photos/{item}.jpg")
        (command,) = example("command").splitlines()
        assert main(command.split()[1:]) == 0
        yield folder


def test_the_worked_example_gives_every_user_two_items(shop: Path, spark: SparkSession):
    rows = spark.read.format("delta").load(f"{shop}/tables/recommendations").collect()
    lists = {row["user_id"]: [item["item_id"] for item in row["items"]] for row in rows}
    assert {user: len(items) for user, items in lists.items()} == {"ann": 2, "bob": 2}
    assert {"shirt-red", "hat-red"}.isdisjoint(lists["ann"])
    assert "shirt-blue" not in lists["bob"]
    assert (shop / "report.html").read_text().count("<html") == 1


def test_the_lists_are_read_as_the_readme_says(shop: Path, spark: SparkSession):
    sql = example("read with SQL").replace("`tables/", f"`{shop}/tables/")
    rows = [(row["user_id"], row["rank"]) for row in spark.sql(sql).collect()]
    assert rows == [("ann", 1), ("ann", 2), ("bob", 1), ("bob", 2)]
    names: dict[str, object] = {"spark": spark}
    for name in ("read with Spark", "read with pandas"):
        exec(example(name).replace('"tables/', f'"{shop}/tables/'), names)
    assert sorted(names["lists"]["user_id"]) == ["ann", "ann", "bob", "bob"]  # type: ignore[index]


def test_every_query_of_the_docs_runs(shop: Path, spark: SparkSession):
    queries = [query for page, query in blocks("sql") if page != "README.md"]
    assert len(queries) >= 3
    for query in queries:
        spark.sql(query.replace("`tables/", f"`{shop}/tables/")).collect()


def test_every_command_of_ours_can_be_parsed():
    group = typer.main.get_command(app)
    parsed = set()
    for page, command in commands():
        words = shlex.split(command)
        if not words or words[0] != "vlm4rec" or words[1:] == ["--help"]:
            continue
        context = group.make_context("vlm4rec", words[1:2])
        subcommand = group.get_command(context, words[1])  # type: ignore[attr-defined]
        assert subcommand is not None, f"{page}: {command}"
        subcommand.make_context(words[1], words[2:], parent=context)
        parsed.add(words[1])
    assert {"run", "plan", "caption", "evaluate", "tune", "maintain", "show", "status"} <= parsed


def test_every_make_target_benchmark_and_job_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets, page
        assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets, page
        for file in re.findall(r"(?:benchmarks|jobs)/\w+\.py", text):
            assert (ROOT / file).is_file(), f"{page}: {file}"


def test_every_configuration_of_the_docs_loads(tmp_path):
    configurations = blocks("yaml")
    assert len(configurations) >= 4
    for number, (_, block) in enumerate(configurations):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        load([file])


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        folder = (ROOT / page).parent
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (folder / link).exists(), f"{page}: {link}"


def test_the_file_to_open_exists():
    for file in re.findall(r"`(vlm4rec_spark/[^`]+|conf/[^`]+)`", PAGES["docs/contributing.md"]):
        assert (ROOT / file).exists(), file


def test_the_tree_names_every_room():
    tree = PAGES["docs/contributing.md"].split("## The tree")[1].split("```")[1]
    package = ROOT / "vlm4rec_spark"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^  (\S+)", tree, re.MULTILINE)) == rooms | modules
    nouns = {f"{path.parent.name}/" for path in package.glob("models/*/__init__.py")}
    assert set(re.findall(r"^    (\S+)", tree, re.MULTILINE)) == nouns
    top = {"jobs/", "conf/", "docs/", "vlm4rec_spark/", "tests/", "benchmarks/"}
    assert set(re.findall(r"^(\S+)", tree, re.MULTILINE)) == top


def test_the_page_of_tables_has_every_column(spark: SparkSession):
    sections = re.split(r"^## ", PAGES["docs/tables.md"], flags=re.MULTILINE)[1:]
    documented = {section.split("\n")[0].strip("` "): section for section in sections}
    assert set(documented) == set(TABLES)
    for name, table in TABLES.items():
        columns = re.findall(r"^\| `(\w+)`", documented[name], re.MULTILINE)
        assert columns == table.columns, name
        key = re.search(r"^Key: (.+)\.$", documented[name], re.MULTILINE)
        assert key is not None, name
        assert key[1] == ", ".join(table.key), name


def test_the_readme_is_short_and_sentences_are():
    assert len(README.splitlines()) <= 150
    lengths = []
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
        prose = re.sub(r"^\s*(\||#|<!--|!\[).*$", "", prose, flags=re.MULTILINE)
        for sentence in re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*[-*]\s", prose):
            words = len(sentence.split())
            assert words <= 30, f"{page}: {sentence}"
            lengths.append(words)
    assert statistics.mean(words for words in lengths if words > 2) < 15
