"""The README tells the truth: its worked example runs, its tree is the repository's, its make commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from vlm4rec_spark.cli import main
from vlm4rec_spark.demo.drawing import draw

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    """The block after `<!-- example: name -->`."""
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no example {name}"
    return found[1]


def test_the_worked_example_gives_every_user_two_items(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("items.csv", "events.csv", "shop.yaml"):
        Path(name).write_text(example(name))
    # The JVM of these tests was started in another folder, where Spark would look for relative paths.
    settings = Path("shop.yaml").read_text()
    for name in ("items.csv", "events.csv", "photos\n"):
        settings = settings.replace(f" {name}", f" {tmp_path}/{name}").replace(
            f"[{name}", f"[{tmp_path}/{name}"
        )
    Path("shop.yaml").write_text(settings)
    Path("photos").mkdir()
    for number, line in enumerate(example("items.csv").splitlines()[1:]):
        item = line.split(",")[0]
        kind, colour = (
            ("cushion" if item.startswith("mug") else item.split("-")[0]),
            item.split("-")[1],
        )
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

    rows = spark.read.format("delta").load(f"{tmp_path}/tables/recommendations").collect()
    lists = {row["user_id"]: row["items"] for row in rows}
    assert {user: len(items) for user, items in lists.items()} == {"ann": 2, "bob": 2}
    assert {item["item_id"] for item in lists["ann"]}.isdisjoint({"mug-red", "hat-red"})
    assert "mug-blue" not in {item["item_id"] for item in lists["bob"]}
    assert Path("report.html").read_text().count("<html") == 1


def test_the_tree_names_every_module() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    package = [
        path
        for path in (ROOT / "vlm4rec_spark").iterdir()
        if path.name not in ("__init__.py", "__pycache__")
    ]
    named = {
        path.name + ("/" if path.is_dir() else "")
        for path in package
        if path.is_dir() or path.suffix == ".py"
    }
    assert named == set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    folders = {"jobs/", "conf/", "vlm4rec_spark/", "tests/", "benchmarks/"}
    assert folders == set(re.findall(r"^(\S+)", tree, re.MULTILINE))


def test_every_make_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
