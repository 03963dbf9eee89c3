"""Files by their URIs without Spark: this machine's, another file system's, and what is refused."""

import os

import fsspec
import pytest

from vlm4rec_spark.models import files


@pytest.mark.parametrize("prefix", ["", "file:", "file://"])
def test_a_local_file(tmp_path, prefix: str):
    path = tmp_path / "a::b.jpg"
    path.write_bytes(b"12345")
    os.utime(path, (5_000, 5_000))
    file = files.at(f"{prefix}{path}")
    assert file.read() == b"12345"
    assert file.size() == 5
    assert file.modified_at() == 5_000_000


def test_a_file_of_another_file_system():
    fsspec.filesystem("memory").pipe("/shop/a.jpg", b"123")
    assert files.at("memory://shop/a.jpg").read() == b"123"


def test_an_http_address_inside_another_address_is_refused():
    with pytest.raises(ValueError, match="an http address inside another address"):
        files.at("zip://a.jpg::http://127.0.0.1/x.zip")
