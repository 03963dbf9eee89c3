"""Tables: what Delta refuses, what each write touches, and the checks before any work."""

import json
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from shop import from_files

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.storage import commits, layout, maintenance, state
from vlm4rec_spark.storage.schemas import PHOTOS, TABLES, Table
from vlm4rec_spark.storage.state import (
    CalibrationState,
    ProfilesState,
    StageOutput,
    StageState,
    TriedEffort,
)
from vlm4rec_spark.storage.tables import Tables

PRODUCTS = Table(
    "products",
    "Products with a price.",
    """id STRING NOT NULL COMMENT 'Id of the product', price DOUBLE COMMENT 'Its price',
    tags MAP<STRING, STRING>, at TIMESTAMP""",
    key=("id",),
    checks=(("not_free", "price > 0"),),
    volatile=("at",),
    feed=True,
    cluster=("id",),
)
MONDAY = datetime(2025, 3, 3)
TUESDAY = datetime(2025, 3, 4)


@pytest.fixture
def tables(spark: SparkSession, tmp_path) -> Tables:
    return Tables(spark, str(tmp_path / "tables"))


@pytest.fixture(scope="module")
def products_folder(spark: SparkSession, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("products")
    tables = Tables(spark, str(folder))
    tables.insert(
        PRODUCTS, rows(tables, ("a", 1.0, {"x": "1", "y": "2"}, MONDAY), ("b", 2.0, None, MONDAY))
    )
    return folder


@pytest.fixture
def products(tables: Tables, products_folder: Path) -> Tables:
    """Table `products` with a and b, as of Monday. It is copied, which is quicker than a write."""
    shutil.copytree(products_folder, tables.location)
    return tables


def rows(tables: Tables, *values: tuple) -> DataFrame:
    return tables.spark.createDataFrame(list(values), PRODUCTS.schema.simpleString())


def content(tables: Tables) -> dict[str, tuple]:
    return {
        row["id"]: (row["price"], row["tags"], row["at"]) for row in tables.read(PRODUCTS).collect()
    }


def changes(tables: Tables, since: int) -> list[tuple[str, str]]:
    """id and kind of every change that the feed holds after version `since`."""
    feed = (
        tables.spark.read.format("delta")
        .options(readChangeFeed=True, startingVersion=0)
        .load(tables.name_of(PRODUCTS))
    )
    new = feed.where(feed["_commit_version"] > since)
    return sorted((row["id"], row["_change_type"]) for row in new.collect())


def version(tables: Tables) -> int:
    tables.forget()
    return tables.versions([PRODUCTS])["products"]


def test_comments_not_null_and_checks_are_part_of_the_table(products: Tables):
    detail = products.spark.sql(f"DESCRIBE DETAIL delta.`{products.name_of(PRODUCTS)}`").collect()[
        0
    ]
    assert detail["description"] == "Products with a price."
    assert detail["properties"]["delta.constraints.not_free"] == "price > 0"
    field = products.read(PRODUCTS).schema["id"]
    assert field.metadata["comment"] == "Id of the product"
    # Not through this package: what any other writer gets.
    for bad, refusal in (
        ((None, 1.0, None, None), "NOT NULL"),
        (("c", 0.0, None, None), "CHECK constraint not_free"),
    ):
        with pytest.raises(Exception, match=refusal):
            rows(products, bad).write.format("delta").mode("append").save(
                products.name_of(PRODUCTS)
            )
    assert products.read(PRODUCTS).count() == 2


def test_insert_adds_only_new_keys(products: Tables):
    delivery = rows(products, ("a", 9.0, None, TUESDAY), ("c", 3.0, None, TUESDAY))
    assert products.insert(PRODUCTS, delivery) == 1
    assert products.insert(PRODUCTS, delivery) == 0
    assert content(products) == {
        "a": (1.0, {"x": "1", "y": "2"}, MONDAY),
        "b": (2.0, None, MONDAY),
        "c": (3.0, None, TUESDAY),
    }


def test_upsert_touches_only_rows_that_differ(products: Tables):
    # a differs in the volatile time and in the order of its map, which is to say not at all.
    new = rows(
        products,
        ("a", 1.0, {"y": "2", "x": "1"}, TUESDAY),
        ("b", 2.5, None, TUESDAY),
        ("c", 3.0, None, TUESDAY),
    )
    before = version(products)
    products.upsert(PRODUCTS, new)
    assert changes(products, before) == [
        ("b", "update_postimage"),
        ("b", "update_preimage"),
        ("c", "insert"),
    ]
    assert content(products)["a"] == (1.0, {"x": "1", "y": "2"}, MONDAY)
    assert content(products)["b"] == (2.5, None, TUESDAY)
    before = version(products)
    products.upsert(PRODUCTS, new)
    for number in range(10):  # with the merge above more commits than are looked at first
        products.spark.sql(
            f"ALTER TABLE {products.sql_name(PRODUCTS)} SET TBLPROPERTIES ('note' = '{number}')"
        )
    assert changes(products, before) == []
    assert version(products) == before
    assert products.version(PRODUCTS) == before + 11


def test_upsert_sees_a_change_inside_a_map_and_from_null(products: Tables):
    before = version(products)
    products.upsert(
        PRODUCTS, rows(products, ("a", 1.0, {"x": "1", "y": "3"}, MONDAY), ("b", 2.0, {}, MONDAY))
    )
    assert {item for item, _ in changes(products, before)} == {"a", "b"}


def test_sync_deletes_what_is_gone_and_touches_nothing_twice(products: Tables):
    new = rows(products, ("a", 1.0, {"x": "1", "y": "2"}, TUESDAY), ("c", 3.0, None, TUESDAY))
    before = version(products)
    products.sync(PRODUCTS, new)
    assert changes(products, before) == [("b", "delete"), ("c", "insert")]
    before = version(products)
    products.sync(PRODUCTS, new)
    assert changes(products, before) == []
    assert version(products) == before


def test_replace_keeps_constraints_and_is_all_or_nothing(products: Tables):
    products.replace(PRODUCTS, rows(products, ("z", 7.0, None, MONDAY)))
    with pytest.raises(Exception, match="CHECK constraint not_free"):
        products.replace(
            PRODUCTS, rows(products, ("y", 1.0, None, MONDAY), ("x", -1.0, None, MONDAY))
        )
    assert content(products) == {"z": (7.0, None, MONDAY)}
    assert products.read(PRODUCTS).schema["id"].metadata["comment"] == "Id of the product"


def test_a_small_table_has_the_same_rows_in_the_driver_as_in_its_files(tables: Tables):
    times = "VALUES ('first', '0001-01-01 00:00:00'), ('last', '9999-12-31 23:59:59.999999')"
    ends = tables.spark.sql(f"SELECT col1 AS id, timestamp(col2) AS at FROM {times}")
    ends = ends.select("id", F.lit(1.0).alias("price"), F.lit(None).alias("tags"), "at")
    tables.insert(PRODUCTS, ends.unionByName(rows(tables, ("x", 1.0, {"k": "v"}, MONDAY))))

    def plain(frame: DataFrame) -> list[tuple]:
        columns = ("id", "price", F.map_entries("tags"), F.unix_micros("at"))
        return sorted(map(tuple, frame.select(*columns).collect()))

    in_driver = tables.read(PRODUCTS)
    assert "LocalRelation" in str(in_driver._jdf.queryExecution().optimizedPlan())
    assert plain(in_driver) == plain(from_files(tables, PRODUCTS))
    assert in_driver.schema.simpleString() == tables.stored_schema(PRODUCTS).simpleString()


def test_a_missing_table_and_an_old_version(tables: Tables):
    assert tables.read(PRODUCTS).count() == 0
    assert tables.versions([PRODUCTS]) == {}
    tables.insert(PRODUCTS, rows(tables, ("a", 1.0, None, MONDAY)))
    first = version(tables)
    tables.insert(PRODUCTS, rows(tables, ("b", 2.0, None, MONDAY)))
    assert tables.read(PRODUCTS, first).count() == 1


def test_a_table_of_another_schema_is_refused(spark: SparkSession, tables: Tables):
    folder = Path(tables.location)
    items = spark.sql("SELECT 'a' AS item_id, '1' AS price")
    items.write.format("delta").save(str(folder / "items"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(RunError, match="price is string, expected double") as refused:
        layout.check(tables)
    assert "title is missing" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(folder.rglob("*")) == before


def test_the_check_leaves_no_trace(tables: Tables):
    layout.check(tables)
    assert not Path(tables.location).exists()


def test_a_table_of_another_layout_is_refused(products: Tables, monkeypatch):
    monkeypatch.setattr(layout, "TABLES", {"products": PRODUCTS})
    name = products.sql_name(PRODUCTS)
    layout.check(products)
    products.spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('vlm4rec.layout' = '4')")
    before = version(products)
    with pytest.raises(RunError) as refused:
        layout.check(products)
    assert str(refused.value) == (
        f"The table {products.name_of(PRODUCTS)} has layout 4; this release reads layout 1 "
        "only. Start in a new folder, with --set tables=…. Captions that were paid for can be "
        "brought over with `vlm4rec import-captions`."
    )
    assert version(products) == before
    products.spark.sql(f"ALTER TABLE {name} UNSET TBLPROPERTIES ('vlm4rec.layout')")
    layout.check(products)


def test_a_write_that_another_writer_overtakes_is_done_again(products: Tables, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("vlm4rec_spark.storage.tables._wait", waited.append)

    def slowly(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            time.sleep(2)
            yield batch

    new = rows(products, ("a", 5.0, None, TUESDAY)).mapInPandas(slowly, PRODUCTS.schema)
    update = f"UPDATE delta.`{products.name_of(PRODUCTS)}` SET price = 7.0 WHERE id = 'b'"
    writer = threading.Timer(1, products.spark.sql, (update,))
    writer.start()
    products.upsert(PRODUCTS, new)
    writer.join()
    # Both rows lie in one file, so one of the two writers had to start again.
    assert len(waited) == 1
    assert content(products) == {"a": (5.0, None, TUESDAY), "b": (7.0, None, MONDAY)}


def test_a_writer_that_never_lets_anybody_pass_is_named(products: Tables, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("vlm4rec_spark.storage.tables._wait", waited.append)

    def overtaken() -> None:
        raise RuntimeError("[DELTA_CONCURRENT_APPEND.WITHOUT_HINT] another was quicker")

    with pytest.raises(
        RunError,
        match=r"keeps writing to .*products at the same time \(DELTA_CONCURRENT_APPEND\)",
    ):
        products.commit(PRODUCTS, overtaken)
    assert waited == sorted(waited)
    assert len(waited) == 5


def test_the_log_says_of_commits_what_sql_says(products: Tables):
    products.upsert(PRODUCTS, rows(products, ("a", 9.0, None, TUESDAY)))
    maintenance.optimize(products, PRODUCTS)
    in_folder = list(products.commits(PRODUCTS))
    by_sql = list(commits.by_sql(products.spark, products.sql_name(PRODUCTS)))
    assert [commit[:1] + commit[2:] for commit in in_folder] == [
        commit[:1] + commit[2:] for commit in by_sql
    ]
    assert [commit.changed for commit in in_folder] == [False, True, True, True]
    assert commits.last_change(iter(in_folder)).version == 2
    assert in_folder[-1].is_creation


def test_staging_tables_of_a_killed_run_are_cleared(tables: Tables):
    tables.staged(PHOTOS, tables.read(PHOTOS))
    assert [folder.name for folder in Path(tables.location).iterdir()] == ["_staging_photos"]
    tables.clear_staging()
    assert list(Path(tables.location).iterdir()) == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
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


def test_a_full_disk_is_reported_and_the_old_rows_stay(spark: SparkSession, small_disk: Path):
    tables = Tables(spark, str(small_disk / "tables"))
    tables.insert(PRODUCTS, rows(tables, ("a", 1.0, None, MONDAY)))
    huge = rows(tables, ("b", 2.0, {"x": secrets.token_hex(2_000_000)}, MONDAY))
    for write in (tables.insert, tables.upsert, tables.sync, tables.replace, tables.staged):
        with pytest.raises(RunError, match=r"The disk that holds .*products is full") as full:
            write(PRODUCTS, huge)
        assert "\n" not in str(full.value)
    assert content(tables) == {"a": (1.0, None, MONDAY)}
    tables.unstage(PRODUCTS)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert tables.insert(PRODUCTS, huge) == 1
    assert content(tables).keys() == {"a", "b"}


@pytest.fixture
def named(spark: SparkSession) -> Iterator[Tables]:
    spark.sql("CREATE SCHEMA shop")
    yield Tables(spark, "spark_catalog.shop")
    spark.sql("DROP SCHEMA shop CASCADE")


def test_tables_named_by_catalog_and_schema(named: Tables):
    layout.check(named)
    two = rows(named, ("a", 1.0, None, MONDAY), ("b", 2.0, None, MONDAY))
    assert named.insert(PRODUCTS, two) == 2
    assert named.insert(PRODUCTS, rows(named, ("a", 1.0, None, MONDAY))) == 0
    named.upsert(PRODUCTS, named.staged(PRODUCTS, rows(named, ("b", 2.5, None, MONDAY))))
    named.unstage(PRODUCTS)
    assert content(named) == {"a": (1.0, None, MONDAY), "b": (2.5, None, MONDAY)}
    with pytest.raises(Exception, match="CHECK constraint not_free"):
        named.replace(PRODUCTS, rows(named, ("c", 0.0, None, MONDAY)))
    shown = named.spark.sql("SHOW TABLES IN shop").collect()
    assert [row["tableName"] for row in shown if not row["isTemporary"]] == ["products"]


def test_a_missing_schema_is_named(spark: SparkSession):
    with pytest.raises(RunError, match=r"spark_catalog\.nowhere"):
        layout.check(Tables(spark, "spark_catalog.nowhere"))


PERSONAL = Table(
    "visits",
    "Visits of users.",
    "user_id STRING NOT NULL, day DATE NOT NULL, shop STRING, open BOOLEAN, tags ARRAY<STRING>",
    key=("user_id", "day"),
    cluster=("day",),
    personal=("user_id",),
)


def test_files_carry_no_statistics_of_users(tables: Tables):
    assert layout.statistics_columns(PERSONAL) == ["day", "shop"]
    visit = (
        "SELECT '{}' AS user_id, DATE'2025-03-0{}' AS day, 'S' AS shop, true AS open, null AS tags"
    )
    for day, user in enumerate(("ann", "ben"), start=1):
        row = tables.spark.sql(visit.format(user, day))
        tables.insert(PERSONAL, row.withColumn("tags", row["tags"].cast("array<string>")))
    maintenance.optimize(tables, PERSONAL)
    all_statistics = statistics_in_log(tables, PERSONAL)
    assert len(all_statistics) == 3
    for statistics in all_statistics:
        assert statistics["minValues"].keys() == {"day", "shop"}
        assert statistics["nullCount"].keys() == {"day", "shop"}
    log = "".join(path.read_text() for path in log_files(tables, PERSONAL))
    assert "ann" not in log
    assert "ben" not in log


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_no_table_has_statistics_of_a_column_with_user_ids(table: Table):
    of_users = {"user_id", "anonymous_id", "event_id"} & set(table.columns)
    assert of_users <= set(table.personal)
    properties = dict(layout.properties_of(table))
    if table.personal:
        columns = set(properties["delta.dataSkippingStatsColumns"].split(","))
        assert not columns & set(table.personal)
        assert set(table.cluster) <= columns


def log_files(tables: Tables, table: Table) -> list[Path]:
    return sorted((Path(tables.name_of(table)) / "_delta_log").glob("*.json"))


def statistics_in_log(tables: Tables, table: Table) -> list[dict]:
    """The statistics of every file that a commit added."""
    actions = [
        json.loads(line)
        for path in log_files(tables, table)
        for line in path.read_text().splitlines()
    ]
    return [json.loads(action["add"]["stats"]) for action in actions if "add" in action]


def test_state_holds_one_typed_row_per_stage(tables: Tables):
    tried = (TriedEffort(1, 10, 0.7, 0.68, 900.0), TriedEffort(4, 20, 0.97, 0.96, 600.0))
    approximate = CalibrationState(0.95, 4, 20, 0.97, 0.96, 1_000, 50.0, tried)
    exact = CalibrationState(0.95, None, None, 1.0, 1.0, 10, None, ())
    index = stage_state("index", StageOutput(representation="caption", index_id="i1"))
    profiles = stage_state("profiles", StageOutput(profiles=ProfilesState("sha", 3, None)))
    before = stage_state("recommend", StageOutput(index_id="i0", calibration=exact))
    after = stage_state("recommend", StageOutput(index_id="i1", calibration=approximate))
    state.write(tables, [before, index])
    state.write(tables, [after, index, profiles])
    assert state.read(tables) == {"index": index, "profiles": profiles, "recommend": after}
    assert approximate.chosen == tried[1]
    assert exact.chosen is None


def stage_state(stage: str, output: StageOutput) -> StageState:
    return StageState(stage, "f" * 64, {"items": 3}, output, "r1", MONDAY.replace(tzinfo=UTC))
