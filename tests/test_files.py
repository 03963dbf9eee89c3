"""Files on the driver: a local folder by pathlib and the same folder by Hadoop behave alike."""

import os
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from vlm4rec_spark.storage.files import Files, HadoopFiles, LocalFiles, filesystem, qualified


@pytest.fixture
def folder(tmp_path) -> str:
    return (tmp_path / "tables").as_uri()


@pytest.fixture(params=["local", "Hadoop"])
def files(request: pytest.FixtureRequest, folder: str) -> Files:
    if request.param == "local":
        return LocalFiles()
    return HadoopFiles(request.getfixturevalue("spark"), folder)


def test_a_file_is_created_once_and_replaced_and_deleted(files: Files, folder: str):
    first = f"{folder}/1"
    assert files.names(folder) == []
    assert files.create(first, "a")
    assert not files.create(first, "b")
    assert files.create(f"{folder}/2", "c")
    assert sorted(files.names(folder)) == ["1", "2"]
    assert files.read(first) == "a"
    files.replace(first, "äö")
    assert files.read(first) == "äö"
    assert files.read(f"{folder}/2") == "c"
    assert files.read(f"{folder}/3") is None
    files.delete(first)
    files.delete(first)
    assert files.names(folder) == ["2"]


def test_a_folder_has_a_size_and_a_time_and_is_deleted_whole(files: Files, folder: str, tmp_path):
    assert files.folders(folder) == []
    inner = tmp_path / "tables" / "table" / "inner"
    inner.mkdir(parents=True)
    (inner / "part").write_bytes(b"12345")
    (tmp_path / "tables" / "a file").write_bytes(b"678")
    os.utime(inner / "part", (5_000, 5_000))
    assert files.folders(folder) == ["table"]
    assert files.size(folder) == 8
    assert files.last_written(f"{folder}/table") == 5_000
    files.delete(f"{folder}/table")
    assert files.names(folder) == ["a file"]


def test_an_empty_folder_has_its_own_time(files: Files, folder: str, tmp_path):
    (tmp_path / "tables").mkdir()
    os.utime(tmp_path / "tables", (7_000, 7_000))
    assert files.last_written(folder) == 7_000


@pytest.mark.parametrize("uri", ["/tmp/x", "file:/tmp/x", "file:///tmp/x"])
def test_this_machine_needs_no_hadoop(spark: SparkSession, uri: str):
    assert isinstance(filesystem(spark, uri), LocalFiles)


def test_another_scheme_is_hadoops(spark: SparkSession):
    assert isinstance(filesystem(spark, "hdfs://127.0.0.1:9/x"), HadoopFiles)


def test_a_relative_path_is_made_absolute_and_a_uri_stays():
    assert qualified("tables") == str(Path.cwd() / "tables")
    assert qualified("s3a://shop/tables") == "s3a://shop/tables"
