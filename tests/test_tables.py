"""Tables: what Delta refuses, what each way of writing touches, and what `prepare` says before any work."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.schemas import Table
from vlm4rec_spark.tables import Tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

THINGS = Table(
    "things",
    "Things with a price.",
    """id STRING NOT NULL COMMENT 'Id of the thing', price DOUBLE COMMENT 'Its price', tags MAP<STRING, STRING>,
    at TIMESTAMP""",
    key=("id",),
    checks=(("not_free", "price > 0"),),
    volatile=("at",),
    feed=True,
)
MONDAY, TUESDAY = datetime(2025, 3, 3), datetime(2025, 3, 4)


@pytest.fixture
def tables(spark: SparkSession, tmp_path: Path) -> Tables:
    return Tables(spark, str(tmp_path / "tables"))


@pytest.fixture
def things(tables: Tables) -> Tables:
    """Table `things` with a and b, as of Monday."""
    tables.insert(THINGS, rows(tables, ("a", 1.0, {"x": "1", "y": "2"}, MONDAY), ("b", 2.0, None, MONDAY)))
    return tables


def rows(tables: Tables, *values: tuple) -> DataFrame:
    return tables.spark.createDataFrame(list(values), THINGS.schema.simpleString())


def content(tables: Tables) -> dict[str, tuple]:
    return {row["id"]: (row["price"], row["tags"], row["at"]) for row in tables.read(THINGS).collect()}


def changes(tables: Tables, since: int) -> list[tuple[str, str]]:
    """id and kind of every change that the feed holds after version `since`."""
    feed = tables.spark.read.format("delta").options(readChangeFeed=True, startingVersion=0).load(tables.place(THINGS))
    new = feed.where(feed["_commit_version"] > since)
    return sorted((row["id"], row["_change_type"]) for row in new.collect())


def version(tables: Tables) -> int:
    return tables.versions([THINGS])["things"]


def test_comments_not_null_and_checks_are_part_of_the_table(things: Tables) -> None:
    detail = things.spark.sql(f"DESCRIBE DETAIL delta.`{things.place(THINGS)}`").collect()[0]
    assert detail["description"] == "Things with a price."
    assert detail["properties"]["delta.constraints.not_free"] == "price > 0"
    field = things.read(THINGS).schema["id"]
    assert field.metadata["comment"] == "Id of the thing"
    # Not through this package: what any other writer gets.
    for bad, refusal in (((None, 1.0, None, None), "NOT NULL"), (("c", 0.0, None, None), "CHECK constraint not_free")):
        with pytest.raises(Exception, match=refusal):
            rows(things, bad).write.format("delta").mode("append").save(things.place(THINGS))
    assert things.read(THINGS).count() == 2


def test_insert_adds_only_new_keys(things: Tables) -> None:
    again = rows(things, ("a", 9.0, None, TUESDAY), ("c", 3.0, None, TUESDAY))
    assert things.insert(THINGS, again) == 1
    assert things.insert(THINGS, again) == 0
    assert content(things) == {
        "a": (1.0, {"x": "1", "y": "2"}, MONDAY), "b": (2.0, None, MONDAY), "c": (3.0, None, TUESDAY),
    }  # fmt: skip


def test_upsert_touches_only_rows_that_differ(things: Tables) -> None:
    # a differs in the volatile time and in the order of its map, which is to say not at all.
    new = rows(things, ("a", 1.0, {"y": "2", "x": "1"}, TUESDAY), ("b", 2.5, None, TUESDAY), ("c", 3.0, None, TUESDAY))
    before = version(things)
    things.upsert(THINGS, new)
    assert changes(things, before) == [("b", "update_postimage"), ("b", "update_preimage"), ("c", "insert")]
    assert content(things)["a"] == (1.0, {"x": "1", "y": "2"}, MONDAY)
    assert content(things)["b"] == (2.5, None, TUESDAY)
    before = version(things)
    things.upsert(THINGS, new)
    assert changes(things, before) == []


def test_upsert_sees_a_change_inside_a_map_and_from_null(things: Tables) -> None:
    before = version(things)
    things.upsert(THINGS, rows(things, ("a", 1.0, {"x": "1", "y": "3"}, MONDAY), ("b", 2.0, {}, MONDAY)))
    assert {item for item, _ in changes(things, before)} == {"a", "b"}


def test_sync_deletes_what_is_gone_and_touches_nothing_twice(things: Tables) -> None:
    new = rows(things, ("a", 1.0, {"x": "1", "y": "2"}, TUESDAY), ("c", 3.0, None, TUESDAY))
    before = version(things)
    things.sync(THINGS, new)
    assert changes(things, before) == [("b", "delete"), ("c", "insert")]
    before = version(things)
    things.sync(THINGS, new)
    assert changes(things, before) == []


def test_replace_keeps_constraints_and_is_all_or_nothing(things: Tables) -> None:
    things.replace(THINGS, rows(things, ("z", 7.0, None, MONDAY)))
    with pytest.raises(Exception, match="CHECK constraint not_free"):
        things.replace(THINGS, rows(things, ("y", 1.0, None, MONDAY), ("x", -1.0, None, MONDAY)))
    assert content(things) == {"z": (7.0, None, MONDAY)}
    assert things.read(THINGS).schema["id"].metadata["comment"] == "Id of the thing"


def test_read_as_of_pending_and_a_table_that_is_not_there(tables: Tables) -> None:
    assert tables.read(THINGS).count() == 0
    assert tables.versions([THINGS]) == {}
    tables.insert(THINGS, rows(tables, ("a", 1.0, None, MONDAY)))
    first = version(tables)
    tables.insert(THINGS, rows(tables, ("b", 2.0, None, MONDAY)))
    assert tables.read(THINGS, first).count() == 1
    new = rows(tables, ("b", 2.0, None, MONDAY), ("c", 3.0, None, MONDAY))
    assert [row["id"] for row in tables.pending(new, THINGS).collect()] == ["c"]


def test_prepare_refuses_a_table_of_another_schema(spark: SparkSession, tables: Tables) -> None:
    place = Path(tables.location)
    spark.sql("SELECT 'a' AS item_id, '1' AS price").write.format("delta").save(str(place / "items"))
    before = sorted(place.rglob("*"))
    with pytest.raises(RunError, match="price is string, expected double") as refused:
        tables.prepare()
    assert "title is missing" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("place", ["/proc/nowhere/tables", "{tmp}/file/tables", "{tmp}/file"])
def test_prepare_refuses_a_place_that_cannot_be_written(spark: SparkSession, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="nothing can be written to") as refused:
        Tables(spark, place.format(tmp=tmp_path)).prepare()
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_prepare_leaves_no_trace(tables: Tables) -> None:
    tables.prepare()
    assert not Path(tables.location).exists()


@pytest.fixture
def named(spark: SparkSession) -> Iterator[Tables]:
    spark.sql("CREATE SCHEMA shop")
    yield Tables(spark, "spark_catalog.shop")
    spark.sql("DROP SCHEMA shop CASCADE")


def test_tables_named_by_catalog_and_schema(named: Tables) -> None:
    named.prepare()
    assert named.insert(THINGS, rows(named, ("a", 1.0, None, MONDAY), ("b", 2.0, None, MONDAY))) == 2
    assert named.insert(THINGS, rows(named, ("a", 1.0, None, MONDAY))) == 0
    named.upsert(THINGS, named.staged(THINGS, rows(named, ("b", 2.5, None, MONDAY))))
    named.unstage(THINGS)
    assert content(named) == {"a": (1.0, None, MONDAY), "b": (2.5, None, MONDAY)}
    with pytest.raises(Exception, match="CHECK constraint not_free"):
        named.replace(THINGS, rows(named, ("c", 0.0, None, MONDAY)))
    there = named.spark.sql("SHOW TABLES IN shop").collect()
    assert [row["tableName"] for row in there if not row["isTemporary"]] == ["things"]


def test_a_schema_that_is_not_there_is_said(spark: SparkSession) -> None:
    with pytest.raises(RunError, match=r"spark_catalog\.nowhere"):
        Tables(spark, "spark_catalog.nowhere").prepare()
