"""Maintain: what OPTIMIZE and VACUUM do, which index versions go, and what is never deleted."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from shop import MakePipeline, from_files, item_row, upsert

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.pipeline import Pipeline, maintain
from vlm4rec_spark.storage import maintenance
from vlm4rec_spark.storage.index_versions import MaintainSettings, prunable, remove, versions
from vlm4rec_spark.storage.schemas import ITEMS, PHOTOS, RECOMMENDATIONS, RUNS, STATE, Table
from vlm4rec_spark.storage.tables import HEAVY, Tables

DAY = 24 * 3600
MONDAY = datetime(2025, 3, 3, tzinfo=UTC)
PRODUCTS = Table("products", "Products.", "id STRING NOT NULL, size INT", key=("id",), feed=True)


def index(
    folder: Path,
    index_id: str,
    age: float,
    whole: bool = True,
) -> Path:
    """A folder that looks like an index version which was written `age` days ago."""
    version = folder / index_id
    (version / "scann").mkdir(parents=True)
    (version / "vectors.npy").write_bytes(b"x" * 1000)
    if whole:
        (version / "manifest.json").write_text(json.dumps({"index_id": index_id}))
    backdate(version, age)
    return version


def backdate(folder: Path, age: float) -> None:
    then = time.time() - age * DAY
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def ids(*letters: str) -> list[str]:
    return [letter * 16 for letter in letters]


@pytest.fixture
def index_folder(tmp_path) -> Path:
    """Versions a to e, of five to nine days ago."""
    for age, index_id in enumerate(ids("a", "b", "c", "d", "e"), start=5):
        index(tmp_path, index_id, age)
    return tmp_path


def pruned(
    folder: Path, in_use: list[str], built: list[str], keep: int = 1, now: float | None = None
) -> list[str]:
    """Ids of the versions that may go, where runs built those of `built` long ago."""
    built_at = dict.fromkeys(built, 0.0)
    removed = prunable(versions(folder), in_use, built_at, keep, now or time.time())
    return sorted(version.index_id for version in removed)


def test_the_latest_stay_besides_those_in_use(index_folder: Path):
    every = ids("a", "b", "c", "d", "e")
    assert pruned(index_folder, in_use=ids("c"), built=every, keep=2) == ids("d", "e")
    assert pruned(index_folder, in_use=ids("e"), built=every, keep=0) == ids("a", "b", "c", "d")
    assert pruned(index_folder, in_use=every, built=every, keep=0) == []
    # The run that built it last counts, not only when it was written: e was built again two days
    # ago.
    built_at = dict.fromkeys(every, 0.0) | {"e" * 16: time.time() - 2 * DAY}
    removed = prunable(versions(index_folder), ids("a"), built_at, keep=1, now=time.time())
    assert [version.index_id for version in removed] == ids("b", "c", "d")


def test_a_version_that_no_run_of_these_tables_built_stays(index_folder: Path):
    assert pruned(index_folder, in_use=ids("a"), built=ids("a", "d"), keep=0) == ids("d")
    # Nor does it count as one of the latest of ours.
    assert pruned(index_folder, in_use=ids("a"), built=ids("a", "d", "e"), keep=1) == ids("e")


def test_half_built_ones_go_after_a_day_and_never_one_in_use(tmp_path):
    index(tmp_path, "1" * 16, age=0.9, whole=False)
    index(tmp_path, "2" * 16, age=1.1, whole=False)
    index(tmp_path, "3" * 16, age=1.1, whole=False)
    damaged = index(tmp_path, "4" * 16, age=9)
    (damaged / "manifest.json").write_text('{"index_id"')
    backdate(damaged, 9)
    assert pruned(tmp_path, in_use=ids("3"), built=[]) == ids("2", "4")


def test_a_whole_one_younger_than_a_day_stays(tmp_path):
    index(tmp_path, "1" * 16, age=0.9)
    index(tmp_path, "2" * 16, age=1.1)
    assert pruned(tmp_path, in_use=[], built=ids("1", "2"), keep=0) == ids("2")


def test_what_is_not_surely_ours_is_not_seen(tmp_path):
    index(tmp_path, "backup", age=9)  # another name
    index(tmp_path, "A" * 16, age=9)
    (index(tmp_path, "1" * 16, age=9, whole=False) / "letters.txt").write_text(
        "mine"
    )  # another content
    (index(tmp_path, "2" * 16, age=9) / "manifest.json").write_text('{"index_id": "other"}')
    (tmp_path / ("2" * 16) / "notes.txt").write_text("mine")
    (tmp_path / ("3" * 16)).symlink_to(index(tmp_path.parent / "elsewhere", "3" * 16, age=9))
    (tmp_path / ("4" * 16)).write_text("a file")
    assert versions(tmp_path) == []
    assert versions(tmp_path / "nowhere") == []


def test_killed_while_it_removes_it_leaves_what_nobody_takes_for_an_index(tmp_path, monkeypatch):
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    folder = index(tmp_path, "1" * 16, age=9)
    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(versions(tmp_path)[0])
    monkeypatch.undo()
    (remaining,) = versions(tmp_path)
    assert (remaining.folder, remaining.whole) == (folder, False)
    assert pruned(tmp_path, in_use=[], built=[], now=time.time() + 2 * DAY) == ids("1")
    remove(remaining)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_have_safe_defaults():
    assert MaintainSettings().model_dump() == {"retention_hours": 168, "index_versions": 3}
    with pytest.raises(ValueError, match="less than or equal to 720"):
        MaintainSettings(retention_hours=721)


@pytest.fixture
def named(spark: SparkSession) -> Iterator[Tables]:
    spark.sql("CREATE SCHEMA attic")
    yield Tables(spark, "spark_catalog.attic")
    spark.sql("DROP SCHEMA attic CASCADE")


def rows(spark: SparkSession, *numbers: int) -> DataFrame:
    return spark.createDataFrame([(f"t{n}", n) for n in numbers], PRODUCTS.schema.simpleString())


def content(tables: Tables) -> list[tuple]:
    return sorted(map(tuple, tables.read(PRODUCTS).collect()))


def parquet(tables: Tables, table: Table) -> list[Path]:
    return sorted((Path(tables.location) / table.name).glob("*.parquet"))


def in_few_tasks(spark: SparkSession, work: Callable[[], int | None]) -> int | None:
    """What `work` returns; none of its Spark stages has many tasks (Delta's VACUUM: 10,000)."""
    spark.sparkContext.setJobGroup("few", "few")
    result = work()
    tracker = spark.sparkContext.statusTracker()
    spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup("few")]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    assert 1 <= max(stage.numTasks for stage in stages if stage) <= 8
    return result


def on_disk(*folders: Path) -> dict[str, int]:
    """Every file and its size, except the file in which VACUUM records when it ran."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {
        str(path): path.stat().st_size for path in files if "_last_vacuum_info" not in path.name
    }


@pytest.fixture
def printed(spark: SparkSession) -> Iterator[Callable[[], str]]:
    """What Delta has printed to the JVM's standard output."""
    jvm: Any = spark._jvm
    console = getattr(getattr(jvm.scala, "Console$"), "MODULE$")
    printed_bytes = jvm.java.io.ByteArrayOutputStream()
    before = console.out()
    console.setOutDirect(jvm.java.io.PrintStream(printed_bytes))

    def read() -> str:
        # So that the test sees that the console is still captured.
        console.println("Deleted none")
        return str(printed_bytes.toString())

    yield read
    console.setOutDirect(before)


@pytest.fixture(scope="module")
def two_files_folder(spark: SparkSession, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two-files")
    for number in range(2):
        Tables(spark, str(folder)).append(PRODUCTS, rows(spark, number))
    return folder


@pytest.fixture
def two_files(
    spark: SparkSession,
    two_files_folder: Path,
    tmp_path,
) -> Tables:
    """Table `products` with one row in each of two files."""
    shutil.copytree(two_files_folder, tmp_path, dirs_exist_ok=True)
    return Tables(spark, str(tmp_path))


def set_retention(tables: Tables, words: str) -> None:
    tables.spark.sql(
        f"ALTER TABLE {tables.sql_name(PRODUCTS)} SET TBLPROPERTIES "
        f"('delta.deletedFileRetentionDuration' = '{words}')"
    )


def test_small_files_are_joined_and_nothing_else_changes(two_files: Tables):
    spark = two_files.spark
    limit = "spark.databricks.delta.optimize.maxFileSize"
    version = two_files.versions([PRODUCTS])
    limit_before = spark.conf.get(limit, None)
    assert maintenance.optimize(two_files, PRODUCTS) == (2, 1)
    assert spark.conf.get(limit, None) == limit_before
    # A stage that compares versions has nothing to do after it, and the change feed is silent.
    assert two_files.versions([PRODUCTS]) == version
    assert two_files.changed_since(PRODUCTS, version["products"]).isEmpty()
    files = on_disk(Path(two_files.location))
    assert maintenance.optimize(two_files, PRODUCTS) == (1, 1)
    assert on_disk(Path(two_files.location)) == files
    assert content(two_files) == [("t0", 0), ("t1", 1)]


def test_replaced_files_go_after_the_configured_time(two_files: Tables, printed: Callable[[], str]):
    maintenance.optimize(two_files, PRODUCTS)
    # With other words than ours somebody chose a retention by hand.
    set_retention(two_files, "interval 20 days")
    vacuum = partial(maintenance.vacuum, two_files, PRODUCTS, 0)
    assert in_few_tasks(two_files.spark, vacuum) == 0
    assert len(parquet(two_files, PRODUCTS)) == 3
    assert maintenance.retention(two_files, PRODUCTS) == "interval 20 days"
    set_retention(two_files, "interval 200 hours")
    assert (vacuum() or 0) > 1000
    assert maintenance.retention(two_files, PRODUCTS) == "interval 0 hours"
    assert len(parquet(two_files, PRODUCTS)) == 1
    assert content(two_files) == [("t0", 0), ("t1", 1)]
    assert printed() == "Deleted none\n"


def test_tables_in_a_catalog_are_maintained_too(named: Tables):
    named.insert(PRODUCTS, rows(named.spark, 0))
    rows(named.spark, 1).write.format("delta").mode("append").saveAsTable(named.name_of(PRODUCTS))
    named.staged(PRODUCTS, rows(named.spark, 1))
    assert maintenance.optimize(named, PRODUCTS) == (2, 1)
    assert (maintenance.vacuum(named, PRODUCTS, 0) or 0) > 0
    footprint = maintenance.footprint(named, PRODUCTS)
    assert footprint is not None
    assert footprint.on_disk is not None
    assert footprint.on_disk > footprint.bytes > 0
    assert content(named) == [("t0", 0), ("t1", 1)]
    assert maintenance.clear_leftovers(named, 24) == []
    backdate(Path(named.folder().removeprefix("file:")) / "_staging_products", 2)
    assert maintenance.clear_leftovers(named, 24) == ["_staging_products"]
    shown = named.spark.sql("SHOW TABLES IN attic").collect()
    assert [row["tableName"] for row in shown if not row["isTemporary"]] == ["products"]


def test_less_than_a_week_is_refused_unless_delta_does_not_check(spark: SparkSession):
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    message = r"^maintain\.retention_hours: 24 hours are less than Delta's minimum, 168\."
    maintenance.check_retention(spark, 168)
    with pytest.raises(UsageError, match=message):
        maintenance.check_retention(spark, 24)
    spark.conf.set(check, "false")
    try:
        maintenance.check_retention(spark, 24)
    finally:
        spark.conf.unset(check)


def test_a_clustered_log_is_not_ordered_again_as_a_whole(
    spark: SparkSession, tmp_path, monkeypatch
):
    threshold = "spark.databricks.delta.optimize.clustering.mergeStrategy.minCubeSize.threshold"
    assert int(maintenance.OPTIMIZE[threshold]) == 2**30
    monkeypatch.setitem(maintenance.OPTIMIZE, threshold, "1")
    log = Table("log", "", "id INT NOT NULL, day DATE", key=("id",), cluster=("day",))
    tables = Tables(spark, str(tmp_path))
    days = [spark.sql(f"SELECT {n} AS id, date'2025-01-01' + {n} AS day") for n in range(3)]
    tables.insert(log, days[0])
    days[1].write.format("delta").mode("append").save(tables.name_of(log))
    assert maintenance.optimize(tables, log) == (2, 1)
    (first,) = from_files(tables, log).inputFiles()
    days[2].write.format("delta").mode("append").save(tables.name_of(log))
    maintenance.optimize(tables, log)
    assert first in from_files(tables, log).inputFiles()


def test_photos_get_small_row_groups(
    spark: SparkSession,
    tmp_path,
    monkeypatch,
):
    assert int(HEAVY["parquet.block.size"]) == 32 * 2**20
    monkeypatch.setitem(HEAVY, "parquet.block.size", str(2**20))
    tables = Tables(spark, str(tmp_path))
    photos = [
        ("i", n, f"{n}.jpg", os.urandom(100_000), f"{n:064}", 100_000, MONDAY, None)
        for n in range(40)
    ]
    frame = spark.createDataFrame(photos, PHOTOS.schema)
    tables.upsert(PHOTOS, tables.staged(PHOTOS, frame))
    for folder in ("photos", "_staging_photos"):
        (file,) = (tmp_path / folder).glob("*.parquet")
        assert 4 <= pq.ParquetFile(file).metadata.num_row_groups <= 10, folder
    assert spark.conf.get("parquet.block.size", None) is None


@pytest.fixture(scope="module")
def shop(pipeline: MakePipeline, tmp_path_factory) -> Pipeline:
    """Items in two files, lists made with index b, and runs that built e, a, d, b and c."""
    folder = tmp_path_factory.mktemp("shop")
    run = pipeline(folder, "maintain.index_versions=1")
    content: dict[Table, list[tuple]] = {
        ITEMS: [item_row("i0")],
        RUNS: [index_run(hour, letter) for hour, letter in enumerate("eadbc")],
        STATE: [("index", 1, None, {}, "caption", "c" * 16, None, None, None, "rc", MONDAY)],
        RECOMMENDATIONS: [("u1", "default", [], 5, "b" * 16, "r1", MONDAY)],
    }
    for table, table_rows in content.items():
        upsert(run, table, table_rows)
    run.tables.append(ITEMS, run.spark.createDataFrame([item_row("i1")], ITEMS.schema))
    for age, letter in enumerate("cbdae", start=5):
        index(folder / "index", letter * 16, age)
    return run


def index_run(hour: int, letter: str) -> tuple:
    columns = {name: 0 if name.startswith("rows_") else None for name in RUNS.columns}
    columns |= {
        "run_id": f"r{letter}",
        "stage": "index",
        "status": "ok",
        "versions": {},
        "config": "{}",
        "started_at": MONDAY.replace(hour=hour),
        "seconds": 1.0,
        "details": {"index_id": letter * 16, "representation": "caption"},
    }
    return tuple(columns.values())


def test_a_wrong_use_is_refused_before_anything_is_done(
    shop: Pipeline, pipeline: MakePipeline, tmp_path
):
    folder = Path(shop.tables.location).parent
    before = on_disk(folder)
    with pytest.raises(UsageError, match="less than Delta's minimum, 168"):
        pipeline(folder, "maintain.retention_hours=24").maintain()
    with pytest.raises(RunError, match=r"There are no tables at .*nowhere yet"):
        pipeline(folder, f"tables={tmp_path}/nowhere").maintain()
    assert on_disk(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_runs_joins_its_many_small_files_itself(shop: Pipeline):
    assert shop.tables.properties(RUNS)["delta.autoOptimize.autoCompact"] == "true"


def test_indexes_in_use_come_first_then_the_latest(shop: Pipeline):
    indexes = [(index.index_id[0], index.used_for) for index in maintain.indexes(shop.context)]
    assert indexes == [("c", "caption"), ("b", "the lists"), ("d", ""), ("a", ""), ("e", "")]


@pytest.fixture
def killed(shop: Pipeline, monkeypatch) -> Row:
    """The row in `runs` of a maintain that was killed before it got to the table `state`."""
    folder = Path(shop.tables.location)
    # Both are of killed writes; neither was committed, so neither is a table.
    for name, age in (("_staging_photos", 2), ("_staging_items", 0.5)):
        (folder / name).mkdir()
        (folder / name / "part-0.parquet").write_bytes(b"x")
        backdate(folder / name, age)
    optimize = maintenance.optimize

    def kill(tables: Tables, table: Table) -> tuple[int, int]:
        if table is STATE:
            raise KeyboardInterrupt
        return optimize(tables, table)

    monkeypatch.setattr(maintenance, "optimize", kill)
    with pytest.raises(KeyboardInterrupt):
        shop.maintain()
    monkeypatch.undo()
    (row,) = shop.tables.read(RUNS).where("stage = 'maintain'").collect()
    return row


def test_maintain_can_be_killed_and_run_twice(
    shop: Pipeline,
    pipeline: MakePipeline,
    killed: Row,
):
    folder = Path(shop.tables.location).parent
    assert (killed["status"], killed["rows_ok"], killed["rows_skipped"]) == ("failed", 1, 1)
    # In force are c and b. Of a, d and e one stays: the run that built d came last.
    assert sorted(path.name for path in (folder / "index").iterdir()) == ids("b", "c", "d")
    details = killed["details"]
    assert details["index_removed"].split() == ids("a", "e")
    assert (details["index_kept"], details["index_bytes_freed"]) == ("3", "2064")
    assert details["leftovers"] == "_staging_photos"
    figures = {name: value for name, value in details.items() if name.startswith("items.")}
    assert figures == {
        "items.files_before": "2",
        "items.files_after": "1",
        "items.bytes_freed": "0",
        "items.retention": "interval 168 hours",
    }
    maintained = [folder / "index"]
    maintained += [folder / "tables" / name for name in ("items", "recommendations")]
    before = on_disk(*maintained)
    result = pipeline(folder, "maintain.index_versions=1").maintain()
    assert on_disk(*maintained) == before
    assert (result.status, result.ok, result.failed, result.skipped) == ("ok", 1, 0, 3)
    assert result.details["runs.files_after"] == "1"
