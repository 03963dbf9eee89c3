"""Maintain: what OPTIMIZE and VACUUM do to a table, which index versions may go, and what must never be deleted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.pipeline import maintain
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage import tables as delta
from vlm4rec_spark.storage.index_versions import MaintainSettings, prunable, remove, versions
from vlm4rec_spark.storage.schemas import Table
from vlm4rec_spark.storage.tables import Tables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from vlm4rec_spark.pipeline import Pipeline

DAY = 24 * 3600
MONDAY = datetime(2025, 3, 3, tzinfo=UTC)
THINGS = Table("things", "Things.", "id STRING NOT NULL, size INT", key=("id",), feed=True)


def index(folder: Path, index_id: str, age: float, whole: bool = True) -> Path:
    """A folder that looks like an index version which was written `age` days ago."""
    made = folder / index_id
    (made / "scann").mkdir(parents=True)
    (made / "vectors.npy").write_bytes(b"x" * 1000)
    if whole:
        (made / "manifest.json").write_text(json.dumps({"index_id": index_id}))
    backdate(made, age)
    return made


def backdate(folder: Path, age: float) -> None:
    then = time.time() - age * DAY
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def ids(*letters: str) -> list[str]:
    return [letter * 16 for letter in letters]


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Versions a to e, of five to nine days ago."""
    for age, index_id in enumerate(ids("a", "b", "c", "d", "e"), start=5):
        index(tmp_path, index_id, age)
    return tmp_path


def gone(
    folder: Path, in_force: list[str], named: list[str], keep: int = 1, now: float | None = None
) -> list[str]:
    found = prunable(
        versions(folder), in_force, dict.fromkeys(named, 0.0), keep, now or time.time()
    )
    return sorted(version.index_id for version in found)


def test_the_latest_are_kept_besides_those_in_force(shelf: Path) -> None:
    every = ids("a", "b", "c", "d", "e")
    assert gone(shelf, in_force=ids("c"), named=every, keep=2) == ids("d", "e")
    assert gone(shelf, in_force=ids("e"), named=every, keep=0) == ids("a", "b", "c", "d")
    assert gone(shelf, in_force=every, named=every, keep=0) == []
    # The run that named it last counts, not only when it was written: e was in force until yesterday but one.
    named = dict.fromkeys(every, 0.0) | {"e" * 16: time.time() - 2 * DAY}
    found = prunable(versions(shelf), ids("a"), named, keep=1, now=time.time())
    assert [version.index_id for version in found] == ids("b", "c", "d")


def test_a_version_that_no_run_of_these_tables_named_stays(shelf: Path) -> None:
    assert gone(shelf, in_force=ids("a"), named=ids("a", "d"), keep=0) == ids("d")
    # Nor does it take the place of one of ours.
    assert gone(shelf, in_force=ids("a"), named=ids("a", "d", "e"), keep=1) == ids("e")


def test_half_built_ones_go_after_a_day_and_never_one_in_force(tmp_path: Path) -> None:
    index(tmp_path, "1" * 16, age=0.9, whole=False)
    index(tmp_path, "2" * 16, age=1.1, whole=False)
    index(tmp_path, "3" * 16, age=1.1, whole=False)
    torn = index(tmp_path, "4" * 16, age=9)
    (torn / "manifest.json").write_text('{"index_id"')
    backdate(torn, 9)
    assert gone(tmp_path, in_force=ids("3"), named=[]) == ids("2", "4")


def test_a_whole_one_younger_than_a_day_stays(tmp_path: Path) -> None:
    index(tmp_path, "1" * 16, age=0.9)
    index(tmp_path, "2" * 16, age=1.1)
    assert gone(tmp_path, in_force=[], named=ids("1", "2"), keep=0) == ids("2")


def test_what_is_not_surely_ours_is_not_seen(tmp_path: Path) -> None:
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


def test_killed_while_it_removes_it_leaves_what_nobody_takes_for_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    made = index(tmp_path, "1" * 16, age=9)
    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(versions(tmp_path)[0])
    monkeypatch.undo()
    (left,) = versions(tmp_path)
    assert (left.folder, left.whole) == (made, False)
    assert gone(tmp_path, in_force=[], named=[], now=time.time() + 2 * DAY) == ids("1")
    remove(left)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_have_safe_defaults() -> None:
    assert MaintainSettings().model_dump() == {"retention_hours": 168, "index_versions": 3}
    with pytest.raises(ValueError, match="less than or equal to 720"):
        MaintainSettings(retention_hours=721)


@pytest.fixture
def named(spark: SparkSession) -> Iterator[Tables]:
    spark.sql("CREATE SCHEMA attic")
    yield Tables(spark, "spark_catalog.attic")
    spark.sql("DROP SCHEMA attic CASCADE")


def rows(spark: SparkSession, *numbers: int) -> DataFrame:
    return spark.createDataFrame([(f"t{n}", n) for n in numbers], THINGS.schema.simpleString())


def content(tables: Tables) -> list[tuple]:
    return sorted(map(tuple, tables.read(THINGS).collect()))


def parquet(tables: Tables, table: Table) -> list[Path]:
    return sorted((Path(tables.location) / table.name).glob("*.parquet"))


def in_few_tasks(spark: SparkSession, work: Callable[[], int | None]) -> int | None:
    """What `work` returns; not one of its Spark stages has many tasks, as Delta's own VACUUM has 10,000."""
    spark.sparkContext.setJobGroup("few", "few")
    found, tracker = work(), spark.sparkContext.statusTracker()
    spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup("few")]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    assert 1 <= max(stage.numTasks for stage in stages if stage) <= 8
    return found


def on_disk(*folders: Path) -> dict[str, int]:
    """Every file and its size, but for the note in which VACUUM says when it ran."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {
        str(path): path.stat().st_size for path in files if "_last_vacuum_info" not in path.name
    }


@pytest.fixture
def printed(spark: SparkSession) -> Iterator[Callable[[], str]]:
    """What Delta has printed to the JVM's standard output."""
    jvm: Any = spark._jvm
    console, kept = (
        getattr(getattr(jvm.scala, "Console$"), "MODULE$"),
        jvm.java.io.ByteArrayOutputStream(),
    )
    before = console.out()
    console.setOutDirect(jvm.java.io.PrintStream(kept))

    def read() -> str:
        console.println("Deleted none")  # so that it is seen to be listened to, afterwards too
        return str(kept.toString())

    yield read
    console.setOutDirect(before)


def test_small_files_are_joined_and_replaced_ones_go_after_the_stated_time(
    spark: SparkSession, tmp_path: Path, printed: Callable[[], str]
) -> None:
    tables, limit = Tables(spark, str(tmp_path)), "spark.databricks.delta.optimize.maxFileSize"
    tables.insert(THINGS, rows(spark, 0))
    rows(spark, 1).write.format("delta").mode("append").save(tables.name_of(THINGS))
    version, stated = tables.versions([THINGS]), spark.conf.get(limit, None)
    assert tables.optimize(THINGS) == (2, 1)
    assert spark.conf.get(limit, None) == stated
    # A stage that compares versions has nothing to do after it, and the change feed says nothing.
    assert tables.versions([THINGS]) == version
    feed = spark.read.format("delta").options(
        readChangeFeed=True, startingVersion=version["things"] + 1
    )
    assert feed.load(tables.name_of(THINGS)).count() == 0
    there = on_disk(tmp_path)
    assert tables.optimize(THINGS) == (1, 1)
    assert on_disk(tmp_path) == there

    # With other words than ours somebody chose a retention by hand.
    tables.spark.sql(
        f"ALTER TABLE delta.`{tables.name_of(THINGS)}` SET TBLPROPERTIES "
        "('delta.deletedFileRetentionDuration' = 'interval 20 days')"
    )
    assert (
        in_few_tasks(spark, lambda: tables.vacuum(THINGS, 0)),
        len(parquet(tables, THINGS)),
    ) == (0, 3)
    assert tables.retention(THINGS) == "interval 20 days"
    tables.spark.sql(
        f"ALTER TABLE delta.`{tables.name_of(THINGS)}` SET TBLPROPERTIES "
        "('delta.deletedFileRetentionDuration' = 'interval 200 hours')"
    )
    assert (tables.vacuum(THINGS, 0) or 0) > 1000
    assert (tables.retention(THINGS), len(parquet(tables, THINGS))) == ("interval 0 hours", 1)
    assert content(tables) == [("t0", 0), ("t1", 1)]
    assert printed() == "Deleted none\n"


def test_tables_in_a_catalog_are_kept_in_order_too(named: Tables) -> None:
    named.insert(THINGS, rows(named.spark, 0))
    rows(named.spark, 1).write.format("delta").mode("append").saveAsTable(named.name_of(THINGS))
    named.staged(THINGS, rows(named.spark, 1))
    assert named.optimize(THINGS) == (2, 1)
    assert (named.vacuum(THINGS, 0) or 0) > 0
    found = named.footprint(THINGS)
    assert found is not None and found.on_disk is not None
    assert (found.on_disk > found.bytes > 0, content(named)) == (True, [("t0", 0), ("t1", 1)])
    assert named.clear_leftovers(24) == []
    backdate(Path(named.folder().removeprefix("file:")) / "_staging_things", 2)
    assert named.clear_leftovers(24) == ["_staging_things"]
    there = named.spark.sql("SHOW TABLES IN attic").collect()
    assert [row["tableName"] for row in there if not row["isTemporary"]] == ["things"]


def test_less_than_a_week_is_refused_unless_delta_is_told_not_to_look(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables, check = (
        Tables(spark, str(tmp_path)),
        "spark.databricks.delta.retentionDurationCheck.enabled",
    )
    tables.check_retention(168)
    with pytest.raises(
        UsageError, match=r"^maintain\.retention_hours: 24 hours are less than Delta's least, 168\."
    ):
        tables.check_retention(24)
    spark.conf.set(check, "false")
    try:
        tables.check_retention(24)
    finally:
        spark.conf.unset(check)


def test_a_clustered_log_is_not_ordered_again_as_a_whole(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = "spark.databricks.delta.optimize.clustering.mergeStrategy.minCubeSize.threshold"
    assert int(delta._OPTIMIZE[threshold]) == 2**30
    monkeypatch.setitem(delta._OPTIMIZE, threshold, "1")
    log = Table("log", "", "id INT NOT NULL, day DATE", key=("id",), cluster=("day",))
    tables = Tables(spark, str(tmp_path))
    days = [spark.sql(f"SELECT {n} AS id, date'2025-01-01' + {n} AS day") for n in range(3)]
    tables.insert(log, days[0])
    days[1].write.format("delta").mode("append").save(tables.name_of(log))
    assert tables.optimize(log) == (2, 1)
    (first,) = tables.read(log).inputFiles()
    days[2].write.format("delta").mode("append").save(tables.name_of(log))
    tables.optimize(log)
    assert first in tables.read(log).inputFiles()


def test_photos_get_small_row_groups(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert int(delta._HEAVY["parquet.block.size"]) == 32 * 2**20
    monkeypatch.setitem(delta._HEAVY, "parquet.block.size", str(2**20))
    tables = Tables(spark, str(tmp_path))
    photos = [
        ("i", n, f"{n}.jpg", os.urandom(100_000), f"{n:064}", 100_000, MONDAY) for n in range(40)
    ]
    frame = spark.createDataFrame(photos, schemas.PHOTOS.schema)
    tables.upsert(schemas.PHOTOS, tables.staged(schemas.PHOTOS, frame))
    for folder in ("photos", "_staging_photos"):
        (file,) = (tmp_path / folder).glob("*.parquet")
        assert 4 <= pq.ParquetFile(file).metadata.num_row_groups <= 10, folder
    assert spark.conf.get("parquet.block.size", None) is None


@pytest.fixture(scope="module")
def shop(pipeline: Callable[..., Pipeline], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Items in two files, lists made with index b, and runs that built e, a, b and c, and d of the titles."""
    folder = tmp_path_factory.mktemp("shop")
    made = pipeline(folder, "maintain.index_versions=1")
    item = ("i0", "Mug", None, None, None, None, 1.0, {}, True, None, MONDAY)
    lists = [("u1", [], 5, "b" * 16, "r1", MONDAY)]
    runs = [index_run(hour, letter) for hour, letter in enumerate("eabc")] + [
        index_run(0, "d", "title")
    ]
    for table, content in (
        (schemas.ITEMS, [item]),
        (schemas.RUNS, runs),
        (schemas.RECOMMENDATIONS, lists),
    ):
        made.tables.insert(table, made.spark.createDataFrame(content, table.schema))
    more = made.spark.createDataFrame([("i1", *item[1:])], schemas.ITEMS.schema)
    more.write.format("delta").mode("append").save(made.tables.name_of(schemas.ITEMS))
    for age, letter in enumerate("cbdae", start=5):
        index(folder / "index", letter * 16, age)
    return made


def index_run(hour: int, letter: str, representation: str = "caption") -> tuple:
    details = {"index_id": letter * 16, "representation": representation}
    known = {
        "run_id": f"r{letter}",
        "stage": "index",
        "status": "ok",
        "versions": {},
        "config": "{}",
        "started_at": MONDAY.replace(hour=hour),
        "seconds": 1.0,
        "details": details,
    }
    return tuple(
        known.get(name, 0 if name.startswith("rows_") else None) for name in schemas.RUNS.columns
    )


def test_a_wrong_use_is_said_before_anything_is_done(
    shop: Pipeline, pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    folder = Path(shop.tables.location).parent
    before = on_disk(folder)
    with pytest.raises(UsageError, match="less than Delta's least, 168"):
        pipeline(folder, "maintain.retention_hours=24").maintain()
    with pytest.raises(RunError, match=r"There are no tables at .*nowhere yet"):
        pipeline(folder, f"tables={tmp_path}/nowhere").maintain()
    assert on_disk(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_runs_joins_its_many_small_files_itself(shop: Pipeline) -> None:
    detail = shop.spark.sql(
        f"DESCRIBE DETAIL delta.`{shop.tables.name_of(schemas.RUNS)}`"
    ).collect()[0]
    assert detail["properties"]["delta.autoOptimize.autoCompact"] == "true"


def test_maintain_can_be_killed_and_run_twice(
    shop: Pipeline, pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shop.tables.location).parent
    assert {one.index_id: one.in_force_for for one in maintain.indexes(shop.context)} == {
        "c" * 16: "caption",
        "d" * 16: "title",
        "b" * 16: "the lists",
        "a" * 16: "",
        "e" * 16: "",
    }
    # Both are of killed writes; neither was committed, so that neither is a table.
    for name, age in (("_staging_photos", 2), ("_staging_items", 0.5)):
        (folder / "tables" / name).mkdir()
        (folder / "tables" / name / "part-0.parquet").write_bytes(b"x")
        backdate(folder / "tables" / name, age)
    optimize = Tables.optimize

    def killed(tables: Tables, table: Table) -> tuple[int, int]:
        if table is schemas.RUNS:
            raise KeyboardInterrupt
        return optimize(tables, table)

    monkeypatch.setattr(Tables, "optimize", killed)
    with pytest.raises(KeyboardInterrupt):
        shop.maintain()
    monkeypatch.undo()
    (row,) = shop.tables.read(schemas.RUNS).where("stage = 'maintain'").collect()
    assert (row["status"], row["rows_ok"], row["rows_skipped"]) == ("failed", 1, 1)
    # In force are c, d and b. Of a and e one stays: the run that built a came later.
    assert sorted(path.name for path in (folder / "index").iterdir()) == ids("a", "b", "c", "d")
    assert [
        row["details"][name] for name in ("index_removed", "index_kept", "index_bytes_freed")
    ] == [
        json.dumps(ids("e")),
        "4",
        "1032",
    ]
    assert json.loads(row["details"]["leftovers"]) == ["_staging_photos"]
    assert json.loads(row["details"]["items"]) == {
        "files_before": 2,
        "files_after": 1,
        "bytes_freed": 0,
        "retention": "interval 168 hours",
    }

    places = [folder / "index", folder / "tables" / "items", folder / "tables" / "recommendations"]
    before = on_disk(*places)
    outcome = pipeline(folder, "maintain.index_versions=1").maintain()
    assert on_disk(*places) == before
    assert (outcome.status, outcome.ok, outcome.failed, outcome.skipped) == ("ok", 1, 0, 2)
    assert json.loads(outcome.details["runs"])["files_after"] == 1
