"""Tables: what Delta refuses, what each way of writing touches, and who is refused before any work."""

from __future__ import annotations

import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.tables import CONFLICTS, Tables

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
    cluster=("id",),
)
MONDAY, TUESDAY = datetime(2025, 3, 3), datetime(2025, 3, 4)


@pytest.fixture
def tables(spark: SparkSession, tmp_path: Path) -> Tables:
    return Tables(spark, str(tmp_path / "tables"))


@pytest.fixture
def things(tables: Tables) -> Tables:
    """Table `things` with a and b, as of Monday."""
    tables.insert(
        THINGS, rows(tables, ("a", 1.0, {"x": "1", "y": "2"}, MONDAY), ("b", 2.0, None, MONDAY))
    )
    return tables


def rows(tables: Tables, *values: tuple) -> DataFrame:
    return tables.spark.createDataFrame(list(values), THINGS.schema.simpleString())


def content(tables: Tables) -> dict[str, tuple]:
    return {
        row["id"]: (row["price"], row["tags"], row["at"]) for row in tables.read(THINGS).collect()
    }


def changes(tables: Tables, since: int) -> list[tuple[str, str]]:
    """id and kind of every change that the feed holds after version `since`."""
    feed = (
        tables.spark.read.format("delta")
        .options(readChangeFeed=True, startingVersion=0)
        .load(tables.name_of(THINGS))
    )
    new = feed.where(feed["_commit_version"] > since)
    return sorted((row["id"], row["_change_type"]) for row in new.collect())


def version(tables: Tables) -> int:
    tables.forget()
    return tables.versions([THINGS])["things"]


def test_comments_not_null_and_checks_are_part_of_the_table(things: Tables) -> None:
    detail = things.spark.sql(f"DESCRIBE DETAIL delta.`{things.name_of(THINGS)}`").collect()[0]
    assert detail["description"] == "Things with a price."
    assert detail["properties"]["delta.constraints.not_free"] == "price > 0"
    field = things.read(THINGS).schema["id"]
    assert field.metadata["comment"] == "Id of the thing"
    # Not through this package: what any other writer gets.
    for bad, refusal in (
        ((None, 1.0, None, None), "NOT NULL"),
        (("c", 0.0, None, None), "CHECK constraint not_free"),
    ):
        with pytest.raises(Exception, match=refusal):
            rows(things, bad).write.format("delta").mode("append").save(things.name_of(THINGS))
    assert things.read(THINGS).count() == 2


def test_insert_adds_only_new_keys(things: Tables) -> None:
    again = rows(things, ("a", 9.0, None, TUESDAY), ("c", 3.0, None, TUESDAY))
    assert things.insert(THINGS, again) == 1
    assert things.insert(THINGS, again) == 0
    assert content(things) == {
        "a": (1.0, {"x": "1", "y": "2"}, MONDAY),
        "b": (2.0, None, MONDAY),
        "c": (3.0, None, TUESDAY),
    }


def test_upsert_touches_only_rows_that_differ(things: Tables) -> None:
    # a differs in the volatile time and in the order of its map, which is to say not at all.
    new = rows(
        things,
        ("a", 1.0, {"y": "2", "x": "1"}, TUESDAY),
        ("b", 2.5, None, TUESDAY),
        ("c", 3.0, None, TUESDAY),
    )
    before = version(things)
    things.upsert(THINGS, new)
    assert changes(things, before) == [
        ("b", "update_postimage"),
        ("b", "update_preimage"),
        ("c", "insert"),
    ]
    assert content(things)["a"] == (1.0, {"x": "1", "y": "2"}, MONDAY)
    assert content(things)["b"] == (2.5, None, TUESDAY)
    before = version(things)
    for _ in range(11):  # more than are looked at first
        things.upsert(THINGS, new)
    assert changes(things, before) == []
    assert version(things) == before
    assert (
        things.spark.sql(f"DESCRIBE HISTORY delta.`{things.name_of(THINGS)}`").head()["version"]
        == before + 11
    )


def test_upsert_sees_a_change_inside_a_map_and_from_null(things: Tables) -> None:
    before = version(things)
    things.upsert(
        THINGS, rows(things, ("a", 1.0, {"x": "1", "y": "3"}, MONDAY), ("b", 2.0, {}, MONDAY))
    )
    assert {item for item, _ in changes(things, before)} == {"a", "b"}


def test_sync_deletes_what_is_gone_and_touches_nothing_twice(things: Tables) -> None:
    new = rows(things, ("a", 1.0, {"x": "1", "y": "2"}, TUESDAY), ("c", 3.0, None, TUESDAY))
    before = version(things)
    things.sync(THINGS, new)
    assert changes(things, before) == [("b", "delete"), ("c", "insert")]
    before = version(things)
    things.sync(THINGS, new)
    assert changes(things, before) == []
    assert version(things) == before


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
    spark.sql("SELECT 'a' AS item_id, '1' AS price").write.format("delta").save(
        str(place / "items")
    )
    before = sorted(place.rglob("*"))
    with pytest.raises(RunError, match="price is string, expected double") as refused:
        tables.prepare()
    assert "title is missing" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(place.rglob("*")) == before


def test_prepare_leaves_no_trace(tables: Tables) -> None:
    tables.prepare()
    assert not Path(tables.location).exists()


def test_prepare_refuses_a_table_of_another_layout(
    things: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm4rec_spark.storage.tables.TABLES", {"things": THINGS})
    place = f"delta.`{things.name_of(THINGS)}`"
    things.prepare()
    things.spark.sql(f"ALTER TABLE {place} SET TBLPROPERTIES ('vlm4rec.layout' = '4')")
    before = version(things)
    with pytest.raises(RunError) as refused:
        things.prepare()
    assert str(refused.value) == (
        f"The table {things.name_of(THINGS)} has layout 4; this release reads layout 1 only. Start in a new folder, with "
        "--set tables=…. Captions that were paid for can be brought over with `vlm4rec import-captions`."
    )
    assert version(things) == before
    things.spark.sql(f"ALTER TABLE {place} UNSET TBLPROPERTIES ('vlm4rec.layout')")
    things.prepare()


def test_a_write_that_another_writer_overtakes_is_done_again(
    things: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("vlm4rec_spark.storage.tables._wait", waited.append)

    def slowly(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            time.sleep(2)
            yield batch

    new = rows(things, ("a", 5.0, None, TUESDAY)).mapInPandas(slowly, THINGS.schema)
    update = f"UPDATE delta.`{things.name_of(THINGS)}` SET price = 7.0 WHERE id = 'b'"
    other = threading.Timer(1, things.spark.sql, (update,))
    other.start()
    things.upsert(THINGS, new)
    other.join()
    # Both rows lie in one file, so one of the two writers had to start again.
    assert len(waited) == 1
    assert content(things) == {"a": (5.0, None, TUESDAY), "b": (7.0, None, MONDAY)}


def test_a_writer_that_never_lets_anybody_pass_is_named(
    things: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("vlm4rec_spark.storage.tables._wait", waited.append)

    def overtaken() -> None:
        raise CONFLICTS[0]("another was quicker")

    with pytest.raises(
        RunError, match=r"keeps writing to .*things at the same time \(ConcurrentAppendException\)"
    ):
        things._commit(THINGS, overtaken)
    assert waited == sorted(waited)
    assert len(waited) == 5


def test_what_a_killed_run_has_staged_is_cleared(tables: Tables) -> None:
    tables.staged(schemas.PHOTOS, tables.read(schemas.PHOTOS))
    assert [folder.name for folder in Path(tables.location).iterdir()] == ["_staging_photos"]
    tables.clear_staging()
    assert list(Path(tables.location).iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_said_and_what_was_there_stays(
    spark: SparkSession, small_disk: Path
) -> None:
    tables = Tables(spark, str(small_disk / "tables"))
    tables.insert(THINGS, rows(tables, ("a", 1.0, None, MONDAY)))
    huge = rows(tables, ("b", 2.0, {"x": secrets.token_hex(2_000_000)}, MONDAY))
    for write in (tables.insert, tables.upsert, tables.sync, tables.replace, tables.staged):
        with pytest.raises(RunError, match=r"The disk that holds .*things is full") as full:
            write(THINGS, huge)
        assert "\n" not in str(full.value)
    assert content(tables) == {"a": (1.0, None, MONDAY)}
    tables.unstage(THINGS)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert tables.insert(THINGS, huge) == 1
    assert content(tables).keys() == {"a", "b"}


@pytest.fixture
def named(spark: SparkSession) -> Iterator[Tables]:
    spark.sql("CREATE SCHEMA shop")
    yield Tables(spark, "spark_catalog.shop")
    spark.sql("DROP SCHEMA shop CASCADE")


def test_tables_named_by_catalog_and_schema(named: Tables) -> None:
    named.prepare()
    assert (
        named.insert(THINGS, rows(named, ("a", 1.0, None, MONDAY), ("b", 2.0, None, MONDAY))) == 2
    )
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
