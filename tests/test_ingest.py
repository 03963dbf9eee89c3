"""Ingest: which rows are taken and why others aren't; photos from a folder, a path column and a bytes column."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm4rec_spark.errors import UsageError
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.stages import ingest
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from vlm4rec_spark.pipeline import Pipeline

NOW = datetime(2025, 6, 1, tzinfo=UTC)
TEN = datetime(2025, 1, 1, 10)


def write(file: Path, text: str, at: int = 1_700_000_000) -> Path:
    """The file, gzipped if its name says so, as modified at `at`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    os.utime(file, (at, at))
    return file


def items(
    spark: SparkSession, path: Path, **source: object
) -> tuple[dict[str, dict], dict[str, list[str | None]]]:
    """The rows taken by item_id, and the reasons by item_id of those that weren't (None: a repeat, skipped)."""
    parsed = ingest.parse_items(
        reader.read(spark, "ingest.items", Source(path=(str(path),), **source))
    ).collect()
    taken = [row.asDict() for row in parsed if row["reason"] is None and not row["duplicate"]]
    left: dict[str, list[str | None]] = {}
    for row in parsed:
        if row["reason"] is not None or row["duplicate"]:
            left.setdefault(row["item_id"], []).append(row["reason"])
    assert len(taken) + sum(map(len, left.values())) == len(parsed)
    return {
        row["item_id"]: {name: row[name] for name in schemas.ITEMS.columns if name in row}
        for row in taken
    }, left


def test_a_csv_row_in_full(spark: SparkSession, tmp_path: Path) -> None:
    # `title` is mapped, so the source's own column of that name must not get in its way.
    file = write(
        tmp_path / "shop.csv",
        "sku,name,title,price,available,first_seen_at,colour\n"
        'A,"Chair, ""small""\nand red",ignored,12.50,Yes,2025-01-01T11:00:00+01:00,red\n'
        "B,,ignored,,,,\n",
    )
    columns = {"item_id": "sku", "title": "name", "attributes.colour": "colour"}
    taken, left = items(spark, file, columns=columns)
    assert left == {}
    nothing = {"brand": None, "category": None, "parent_id": None, "region": None}
    assert taken == {
        "A": {
            "item_id": "A",
            "title": 'Chair, "small"\nand red',
            "price": 12.5,
            "available": True,
            **nothing,
            "attributes": {"colour": "red"},
            "first_seen_at": TEN,
        },
        "B": {
            "item_id": "B",
            "title": None,
            "price": None,
            "available": True,
            **nothing,
            "attributes": {},
            "first_seen_at": None,
        },
    }


def test_every_reason_of_the_catalogue(spark: SparkSession, tmp_path: Path) -> None:
    file = write(
        tmp_path / "shop.csv",
        "item_id,title,price,available,first_seen_at\n"
        "good,Chair,1,true,\n"
        ",Chair,1,true,\n"
        "word,Chair,on request,true,\n"
        "minus,Chair,-1,true,\n"
        "nan,Chair,NaN,true,\n"
        "maybe,Chair,1,maybe,\n"
        "when,Chair,1,false,last week\n"
        "cells,Chair,1,true,,one too many\n"
        "twice,Chair,1,true,\n"
        "twice,Table,1,true,\n"
        "same,Chair,1,no,\n"
        "same,Chair,1,no,\n",
    )
    taken, left = items(spark, file)
    assert left == {
        None: ["item_id is missing"],
        "word": ["price is not a number"],
        "minus": ["price is not a price"],
        "nan": ["price is not a price"],
        "maybe": ["available is neither true nor false"],
        "when": ["first_seen_at is not a time"],
        "cells": ["the row isn't well formed"],
        "twice": ["item_id stands twice in one file, with different values"],
        "same": [None],
    }
    assert {item: (row["title"], row["available"]) for item, row in taken.items()} == {
        "good": ("Chair", True),
        "twice": ("Chair", True),
        "same": ("Chair", False),
    }


def test_of_several_files_the_newest_wins(spark: SparkSession, tmp_path: Path) -> None:
    write(tmp_path / "shop" / "a.csv", "item_id,title\nA,new\nB,only here\n", at=1_700_000_002)
    write(tmp_path / "shop" / "b.csv.gz", "item_id,title\nA,old\nC,packed\n", at=1_700_000_001)
    taken, left = items(spark, tmp_path / "shop" / "*.csv*")
    assert {item: row["title"] for item, row in taken.items()} == {
        "A": "new",
        "B": "only here",
        "C": "packed",
    }
    assert left == {"A": [None]}


def test_files_with_columns_in_another_order_are_not_mixed_up(
    spark: SparkSession, tmp_path: Path
) -> None:
    write(tmp_path / "shop" / "a.csv", "item_id,title\nA,Chair\n")
    write(tmp_path / "shop" / "b.csv", "title,item_id\nTable,B\n")
    with pytest.raises(Exception, match="CSV header does not conform to the schema"):
        items(spark, tmp_path / "shop")
    # pandas writes its index under no name; one such file is fine.
    taken, _ = items(spark, write(tmp_path / "pandas.csv", ",item_id,title\n0,A,Chair\n"))
    assert taken["A"]["title"] == "Chair"


def test_json_lines_with_a_broken_line(spark: SparkSession, tmp_path: Path) -> None:
    file = write(
        tmp_path / "shop.json",
        '{"item_id": "A", "title": "Chair", "price": 3, "available": false}\n{"item_id": "B", "title\n',
    )
    taken, left = items(spark, file, format="json")
    assert (taken["A"]["title"], taken["A"]["price"], taken["A"]["available"]) == (
        "Chair",
        3.0,
        False,
    )
    assert left == {None: ["the row isn't well formed"]}


@pytest.mark.parametrize(
    ("name", "text"), [("csv", ""), ("csv", "item_id,title\n"), ("json", ""), ("json", "{\n")]
)
def test_a_source_without_a_good_row(
    spark: SparkSession, tmp_path: Path, name: str, text: str
) -> None:
    taken, left = items(spark, write(tmp_path / f"shop.{name}", text), format=name)
    assert taken == {}
    assert left == ({None: ["the row isn't well formed"]} if text == "{\n" else {})


@pytest.mark.parametrize("kind", ["parquet", "delta"])
def test_typed_sources(spark: SparkSession, tmp_path: Path, kind: str) -> None:
    rows = spark.createDataFrame(
        [("A", 2.5, False, TEN, 7), ("B", None, None, None, None)],
        "sku STRING, price DOUBLE, available BOOLEAN, first_seen_at TIMESTAMP, size INT",
    )
    rows.write.format(kind).save(str(tmp_path / "shop"))
    columns = {"item_id": "sku", "attributes.size": "size"}
    taken, left = items(spark, tmp_path / "shop", format=kind, columns=columns)
    shown = ("price", "available", "first_seen_at", "attributes")
    assert {item: tuple(row[name] for name in shown) for item, row in taken.items()} == {
        "A": (2.5, False, TEN, {"size": "7"}),
        "B": (None, True, None, {}),
    }
    assert left == {}


def test_a_missing_file_and_a_missing_column_are_wrong_use(
    spark: SparkSession, tmp_path: Path
) -> None:
    file = write(tmp_path / "shop.csv", "sku\nA\n")
    with pytest.raises(UsageError, match="nowhere"):
        reader.read(spark, "ingest.items", Source(path=(str(tmp_path / "nowhere.csv"),)))
    with pytest.raises(
        UsageError, match=r"title ← name: no such column in the source. It has: sku"
    ):
        reader.read(spark, "ingest.items", Source(path=(str(file),), columns={"title": "name"}))


def test_every_reason_of_the_log(spark: SparkSession, tmp_path: Path) -> None:
    file = write(
        tmp_path / "log.csv",
        "user_id,item_id,event_type,event_time\n"
        "u1,A,view,2025-01-01T10:00:00Z\n"
        "u1,A,view,2025-01-01T10:00:00Z\n"
        "u2,A,view,2025-01-01T12:00:00+02:00\n"
        "u3,A,view,1735725600\n"
        "u4,A,view,1735725600000\n"
        ",A,view,2025-01-01T10:00:00Z\n"
        "u1,,view,2025-01-01T10:00:00Z\n"
        "u1,A,,2025-01-01T10:00:00Z\n"
        "u1,A,view,\n"
        "u1,A,view,yesterday\n"
        "u1,A,view,2099-01-01T00:00:00Z\n",
    )
    parsed = ingest.parse_interactions(
        reader.read(spark, "ingest.interactions", Source(path=(str(file),))), NOW
    )
    rows = parsed.collect()
    assert sorted(row["reason"] for row in rows if row["reason"]) == [
        "event_time is missing",
        "event_time is not a time",
        "event_time lies in the future",
        "event_type is missing",
        "item_id is missing",
        "user_id is missing",
    ]
    assert [row["user_id"] for row in rows if row["duplicate"]] == ["u1"]
    taken = ingest.taken(parsed).collect()
    assert sorted((row["user_id"], row["event_time"]) for row in taken) == [
        (f"u{n}", TEN) for n in (1, 2, 3, 4)
    ]
    assert {str(row["event_date"]) for row in taken} == {"2025-01-01"}
    assert len({row["event_id"] for row in taken}) == 4
    refused = ingest.rejected(parsed, "interactions").collect()
    assert {row["source"] for row in refused} == {f"interactions file:{file}"}
    future = next(json.loads(row["row"]) for row in refused if "future" in row["reason"])
    assert (future["user_id"], future["event_time"]) == ("u1", "2099-01-01T00:00:00Z")


def test_given_event_ids_count_once_and_rejected_copies_are_counted(
    spark: SparkSession, tmp_path: Path
) -> None:
    file = write(
        tmp_path / "log.csv",
        "event_id,user_id,item_id,event_type,event_time\n"
        "e1,u1,A,view,2025-01-02T10:00:00Z\n"
        "e1,u1,A,view,2025-01-01T10:00:00Z\n" + 3 * "e2,u1,A,view,soon\n",
    )
    parsed = ingest.parse_interactions(
        reader.read(spark, "ingest.interactions", Source(path=(str(file),))), NOW
    )
    assert [(row["event_id"], row["event_time"]) for row in ingest.taken(parsed).collect()] == [
        ("e1", TEN)
    ]
    assert [row["occurrences"] for row in ingest.rejected(parsed, "interactions").collect()] == [3]


def photos(run: Pipeline) -> dict[tuple[str, int], bytes]:
    rows = run.tables.read(schemas.PHOTOS).collect()
    for row in rows:
        assert (row["image_sha256"], row["bytes"]) == (
            hashlib.sha256(row["image"]).hexdigest(),
            len(row["image"]),
        )
    return {(row["item_id"], row["position"]): bytes(row["image"]) for row in rows}


def figures(outcome: object, name: str) -> dict[str, int]:
    found = json.loads(outcome.details[name])  # type: ignore[attr-defined]
    assert found["in"] == found["ok"] + found["rejected"] + found["skipped"]
    return found


def rejected(run: Pipeline, source: str) -> dict[str, str]:
    """Reason by the raw row's file name or id, for the source."""
    rows = [
        row
        for row in run.tables.read(schemas.REJECTED).collect()
        if row["source"].startswith(source)
    ]
    return {Path(json.loads(row["row"]).get("uri", "")).name: row["reason"] for row in rows}


def items_by_file(run: Pipeline) -> list[set[str]]:
    """The items whose photos each file of the table holds; a chunk of captioning reads some files and not all."""
    files: dict[str, set[str]] = {}
    for row in run.tables.read(schemas.PHOTOS).select("_metadata.file_name", "item_id").collect():
        files.setdefault(row["file_name"], set()).add(row["item_id"])
    return sorted(files.values(), key=min)


def test_catalogue_log_and_photo_folder_twice(
    pipeline: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm4rec_spark.stages.ingest._PHOTOS_PER_FILE", 2)
    write(tmp_path / "shop.csv", "item_id,title\nA,Chair\nB,Table\nC,Lamp\n,Nothing\n")
    write(
        tmp_path / "log-1.csv",
        "user_id,item_id,event_type,event_time\nu1,A,view,2025-01-01\n,A,view,2025-01-01\n"
        "u1,gone,view,2025-01-01\n",
    )
    folder = tmp_path / "photos"
    for name, text in (
        ("A.jpg", "a zero"),
        ("A.1.jpg", "a one"),
        ("B.jpg", "b jpg"),
        ("B.png", "b png"),
        ("deep +/ü/C.jpg", ""),
        ("Z.jpg", "z"),
        ("README", "no"),
    ):
        write(folder / name, text)
    run = pipeline(
        tmp_path,
        f"ingest.items.path=[{tmp_path}/shop.csv]",
        f"ingest.interactions.path=['{tmp_path}/log-*.csv']",
        f"ingest.photos.folder={folder}",
    )
    # These photos would be one task's to write; as many real ones as a file has aren't.
    run.spark.conf.set("spark.sql.files.maxPartitionBytes", "1m")
    try:
        first = run.run(["ingest"])[0]
    finally:
        run.spark.conf.unset("spark.sql.files.maxPartitionBytes")
    assert figures(first, "items") == {"in": 4, "ok": 3, "rejected": 1, "skipped": 0}
    assert figures(first, "interactions") == {"in": 3, "ok": 2, "rejected": 1, "skipped": 0}
    assert figures(first, "photos") == {"in": 7, "ok": 4, "rejected": 3, "skipped": 0}
    assert (first.rows_in, first.ok, first.failed) == (14, 9, 5)
    gaps = {"unknown_item_events": "1", "items_without_photo": "0", "untouched_items": "2"}
    assert {name: first.details[name] for name in gaps} == gaps
    assert photos(run) == {
        ("A", 0): b"a zero",
        ("A", 1): b"a one",
        ("B", 0): b"b jpg",
        ("C", 0): b"",
    }
    assert items_by_file(run) == [{"A"}, {"B", "C"}]  # two photos each
    assert rejected(run, "photos") == {
        "B.png": "the item has another photo at this position",
        "Z.jpg": "no such item in the catalogue",
        "README": "the file name doesn't fit ingest.photos.file_name",
    }

    # Other bytes of the same size and time: if the photo were read again, this would show.
    write(folder / "A.jpg", "A ZERO")
    write(folder / "B.jpg", "B JPG", at=1_700_000_009)
    write(
        tmp_path / "log-2.csv",
        "user_id,item_id,event_type,event_time\nu1,A,view,2025-01-01\nu2,A,view,2025-01-01\n",
    )
    again = run.run(["ingest"])[0]
    assert figures(again, "photos") == {"in": 7, "ok": 1, "rejected": 3, "skipped": 3}
    assert photos(run) == {
        ("A", 0): b"a zero",
        ("A", 1): b"a one",
        ("B", 0): b"B JPG",
        ("C", 0): b"",
    }
    # One event of the second file is the first file's, redelivered; the first file itself isn't opened.
    assert figures(again, "interactions") == {"in": 2, "ok": 1, "rejected": 0, "skipped": 1}


def test_users_and_who_was_who(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    write(tmp_path / "shop.csv", "item_id,title\nA,Lamp\n")
    write(
        tmp_path / "users.csv",
        "id,segment,consent\nu1,club,Yes\nu2,,\n,club,no\nu3,club,perhaps\nu1,club,Yes\n",
    )
    write(tmp_path / "who.csv", "anonymous_id,user_id\nv1,u1\nv2,u1\nv3,\n,u2\nv2,u2\n")
    settings = (
        f"ingest.items.path=[{tmp_path}/shop.csv]",
        f"ingest.users.path=[{tmp_path}/users.csv]",
        f"ingest.identities.path=[{tmp_path}/who.csv]",
    )
    run = pipeline(tmp_path, *settings, "ingest.users.columns={user_id: id}")
    first = run.run(["ingest"])[0]
    assert figures(first, "users") == {"in": 5, "ok": 2, "rejected": 2, "skipped": 1}
    assert figures(first, "identities") == {"in": 5, "ok": 2, "rejected": 3, "skipped": 0}
    users = run.tables.read(schemas.USERS).orderBy("user_id").collect()
    assert [tuple(row) for row in users] == [("u1", "club", None, True), ("u2", None, None, None)]
    known = run.tables.read(schemas.IDENTITIES).collect()
    assert {row["anonymous_id"]: row["user_id"] for row in known} == {"v1": "u1", "v2": "u1"}
    reasons = {row["reason"] for row in run.tables.read(schemas.REJECTED).collect()}
    assert reasons == {
        "user_id is missing",
        "consent is neither true nor false",
        "anonymous_id is missing",
        "anonymous_id stands twice in one file, with different values",
    }
    with pytest.raises(
        UsageError, match=r"ingest.users: the source has no column user_id with a value"
    ):
        pipeline(tmp_path, *settings).run(["ingest"])
    # Another delivery changes a user, and leaves those alone that it doesn't name.
    write(tmp_path / "users.csv", "id,segment\nu2,new\n", at=1_700_000_009)
    run.run(["ingest"])
    users = run.tables.read(schemas.USERS).orderBy("user_id").collect()
    assert [(row["user_id"], row["segment"]) for row in users] == [("u1", "club"), ("u2", "new")]


def test_photos_named_by_a_column(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    for name in ("old.jpg", "new.jpg", "b.jpg"):
        write(tmp_path / name, name)
    write(
        tmp_path / "1.csv",
        f"item_id,photo\nA,{tmp_path}/old.jpg\nB,{tmp_path}/b.jpg\n,{tmp_path}/b.jpg\n",
        at=1,
    )
    write(
        tmp_path / "2.csv",
        f"item_id,photo\nA,{tmp_path}/new.jpg\nC,{tmp_path}/gone.jpg\nD,\n",
        at=2,
    )
    shop = f"ingest.items.path=['{tmp_path}/*.csv']"
    run = pipeline(tmp_path, shop, "ingest.photos.path_column=photo")
    assert figures(run.run(["ingest"])[0], "photos") == {
        "in": 3,
        "ok": 2,
        "rejected": 1,
        "skipped": 0,
    }
    assert photos(run) == {("A", 0): b"new.jpg", ("B", 0): b"b.jpg"}
    assert list(rejected(run, "photos")) == ["gone.jpg"]
    assert rejected(run, "photos")["gone.jpg"].startswith("the photo can't be read: ")

    write(tmp_path / "b.jpg", "B.JPG")
    write(tmp_path / "new.jpg", "new too", at=1_700_000_009)
    assert figures(run.run(["ingest"])[0], "photos") == {
        "in": 3,
        "ok": 1,
        "rejected": 1,
        "skipped": 1,
    }
    assert photos(run) == {("A", 0): b"new too", ("B", 0): b"b.jpg"}

    with pytest.raises(UsageError, match="the catalogue has no column 'photos' with a path in it"):
        pipeline(tmp_path, shop, "ingest.photos.path_column=photos").check(["ingest"])


def test_large_photos_leave_the_worker_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_PART_BYTES", 100)
    sizes = [10] * 33 + [60, 60, 101, None]  # the last one couldn't be read
    images = [None if size is None else b"x" * size for size in sizes]
    read = [None, *({"item_id": str(n), "image": image} for n, image in enumerate(images)), None]
    parts = list(ingest._in_parts(iter(read)))
    assert [len(part) for part in parts] == [11, 11, 11, 2, 1, 1]
    assert [item for part in parts for item in part["item_id"]] == [
        str(n) for n in range(len(sizes))
    ]
    assert [len(part) for part in ingest._in_parts(iter(40 * [{"image": b""}]))] == [32, 8]


class Files(SimpleHTTPRequestHandler):
    """A folder's files, with their times, and 304 for those that haven't changed; /undated has no times."""

    sent: list[tuple[str, int]]

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.sent.append((self.path.partition("?")[0], int(code)))

    def log_message(self, *_: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if not (keyword == "Last-Modified" and self.path == "/undated"):
            super().send_header(keyword, value)

    def do_GET(self) -> None:
        if self.path == "/undated":
            del self.headers["If-Modified-Since"]
        super().do_GET()


def test_photos_named_by_urls(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    folder, sent = tmp_path / "photos", []
    for name in ("a", "b", "c", "undated"):
        write(folder / name, f"photo {name}")
    write(folder / "huge", "x" * 2_001)
    write(tmp_path / "file.jpg", "a file")
    handler = type("Handler", (Files,), {"sent": sent})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        cdn = f"HTTP://ann:s3cret@127.0.0.1:{server.server_port}"
        photo = {
            "A": f"{cdn}/a",
            "B": f"{cdn}/b?sig=s3cret",
            "C": f"{cdn}/c",
            "U": f"{cdn}/undated",
            "G": f"{cdn}/gone",
            "H": f"{cdn}/huge",
            "M": "http://169.254.169.254/meta",
            "N": f"zip://x.jpg::{cdn}/n.zip",
            "F": f"{tmp_path}/file.jpg",
        }
        write(
            tmp_path / "shop.csv",
            "item_id,photo\n" + "".join(f"{item},{uri}\n" for item, uri in photo.items()),
        )
        run = pipeline(
            tmp_path,
            f"ingest.items.path=['{tmp_path}/shop.csv']",
            "ingest.photos.path_column=photo",
            "ingest.photos.http.private_addresses=true",
            "ingest.photos.http.max_mb=0.002",
        )

        assert figures(run.run(["ingest"])[0], "photos") == {
            "in": 9,
            "ok": 5,
            "rejected": 4,
            "skipped": 0,
        }
        first = photos(run)
        assert first == {
            ("A", 0): b"photo a",
            ("B", 0): b"photo b",
            ("C", 0): b"photo c",
            ("U", 0): b"photo undated",
            ("F", 0): b"a file",
        }
        rows = {row["item_id"]: row for row in run.tables.read(schemas.PHOTOS).collect()}
        assert {item: row["uri"] for item, row in rows.items()} == {
            item: photo[item] for item in "ABCUF"
        }
        assert rows["A"]["modified_at"] == datetime(2023, 11, 14, 22, 13, 20)
        assert rejected(run, "photos") == {
            "gone": "the photo can't be read: HTTP 404",
            "huge": "the photo can't be read: larger than 0.002 MB",
            "meta": "the photo can't be read: the address is link-local (169.254.169.254)",
            "n.zip": "the photo can't be read: an http address inside another address",
        }
        every = {"/a": 200, "/b": 200, "/c": 200, "/undated": 200, "/gone": 404, "/huge": 200}
        assert sorted(sent) == sorted(every.items())

        # Photo b is another one with a new time, photo c the same one with a new time.
        write(folder / "b", "PHOTO B", at=1_700_000_009)
        write(folder / "c", "photo c", at=1_700_000_009)
        sent.clear()
        assert figures(run.run(["ingest"])[0], "photos") == {
            "in": 9,
            "ok": 2,
            "rejected": 4,
            "skipped": 3,
        }
        assert photos(run) == first | {("B", 0): b"PHOTO B"}
        assert sorted(sent) == sorted((every | {"/a": 304}).items())

        sent.clear()
        written = run.tables.versions([schemas.PHOTOS])
        assert figures(run.run(["ingest"])[0], "photos") == {
            "in": 9,
            "ok": 0,
            "rejected": 4,
            "skipped": 5,
        }
        assert sorted(sent) == sorted((every | {"/a": 304, "/b": 304, "/c": 304}).items())
        run.tables.forget()
        assert run.tables.versions([schemas.PHOTOS]) == written
        server.shutdown()


def test_photos_in_a_bytes_column(
    pipeline: Callable[..., Pipeline], spark: SparkSession, tmp_path: Path
) -> None:
    schema = "item_id STRING, title STRING, photo BINARY"
    rows = [("A", "Chair", b"a"), ("B", "Table", None), (None, "Lamp", b"c")]
    spark.createDataFrame(rows, schema).coalesce(1).write.parquet(str(tmp_path / "shop"))
    source = (f"ingest.items.path=[{tmp_path}/shop]", "ingest.items.format=parquet")
    run = pipeline(tmp_path, *source, "ingest.photos.bytes_column=photo")
    assert figures(run.run(["ingest"])[0], "photos") == {
        "in": 1,
        "ok": 1,
        "rejected": 0,
        "skipped": 0,
    }
    assert photos(run) == {("A", 0): b"a"}
    with pytest.raises(UsageError, match="the catalogue has no binary column 'image'"):
        pipeline(tmp_path, *source, "ingest.photos.bytes_column=image").check(["ingest"])
