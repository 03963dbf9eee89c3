"""Ingest: which rows are accepted, why others aren't, and photos from folders, paths and bytes."""

import gzip
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from pyspark.sql import DataFrame, SparkSession
from shop import MakePipeline, from_files, rows_of, run_stage, source_counts

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.pipeline import Pipeline, StageResult
from vlm4rec_spark.pipeline.ingest import inputs_fingerprint
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.stages import ingest
from vlm4rec_spark.storage.schemas import IDENTITIES, INGESTED_FILES, ITEMS, PHOTOS, REJECTED, USERS

NOW = datetime(2025, 6, 1, tzinfo=UTC)
TEN = datetime(2025, 1, 1, 10)


def write(file: Path, text: str, at: int = 1_700_000_000) -> Path:
    """The file, gzipped if its name says so, as modified at `at`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    os.utime(file, (at, at))
    return file


class Parsed(NamedTuple):
    accepted: dict[str, dict]
    """By item_id."""
    rest: dict[str, list[str | None]]
    """The reasons by item_id; None for a duplicate."""


def parse(spark: SparkSession, path: Path, **source: object) -> Parsed:
    """The catalogue's rows: each is accepted or in `rest`."""
    raw = reader.read(spark, "ingest.items", Source(path=(str(path),), **source))
    parsed = Parsed({}, {})
    for row in ingest.parse_items(raw).collect():
        if row["reason"] is None and not row["duplicate"]:
            assert row["item_id"] not in parsed.accepted
            columns = [name for name in ITEMS.columns if name in row]
            parsed.accepted[row["item_id"]] = {name: row[name] for name in columns}
        else:
            parsed.rest.setdefault(row["item_id"], []).append(row["reason"])
    return parsed


def read_events(spark: SparkSession, file: Path) -> DataFrame:
    raw = reader.read(spark, "ingest.interactions", Source(path=(str(file),)))
    return ingest.parse_interactions(raw, NOW)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=repr)
def test_lines_of_a_csv_end_in_any_way(spark: SparkSession, tmp_path, ending):
    file = tmp_path / "shop.csv"
    file.write_bytes(ending.join(["item_id,title", "A,Chair", "B,Table", ""]).encode())
    items = parse(spark, file).accepted
    assert {name: item["title"] for name, item in items.items()} == {"A": "Chair", "B": "Table"}


def test_all_fields_of_a_csv_row(spark: SparkSession, tmp_path):
    # `title` is mapped, so the source's own column of that name must not be used.
    file = write(
        tmp_path / "shop.csv",
        "sku,name,title,price,cur,link,available,first_seen_at,colour\n"
        'A,"Chair, ""small""\nand red",ignored,12.50,EUR,https://x/a,Yes,2025-01-01T11:00:00+01:00,'
        "red\nB,,ignored,,,,,,\n",
    )
    columns = {"item_id": "sku", "title": "name", "attributes.colour": "colour"}
    columns |= {"currency": "cur", "url": "link"}
    parsed = parse(spark, file, columns=columns)
    assert parsed.rest == {}
    empty = dict.fromkeys(ITEMS.columns)
    del empty["updated_at"]
    assert parsed.accepted == {
        "A": empty
        | {
            "item_id": "A",
            "title": 'Chair, "small"\nand red',
            "price": 12.5,
            "currency": "EUR",
            "url": "https://x/a",
            "attributes": {"colour": "red"},
            "available": True,
            "first_seen_at": TEN,
        },
        "B": empty | {"item_id": "B", "attributes": {}, "available": True},
    }


def test_every_reason_of_the_catalogue(spark: SparkSession, tmp_path):
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
    parsed = parse(spark, file)
    assert parsed.rest == {
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
    assert {item: (row["title"], row["available"]) for item, row in parsed.accepted.items()} == {
        "good": ("Chair", True),
        "twice": ("Chair", True),
        "same": ("Chair", False),
    }


def test_the_newest_of_several_files_wins(spark: SparkSession, tmp_path):
    write(tmp_path / "shop" / "a.csv", "item_id,title\nA,new\nB,only here\n", at=1_700_000_002)
    write(tmp_path / "shop" / "b.csv.gz", "item_id,title\nA,old\nC,packed\n", at=1_700_000_001)
    parsed = parse(spark, tmp_path / "shop" / "*.csv*")
    assert {item: row["title"] for item, row in parsed.accepted.items()} == {
        "A": "new",
        "B": "only here",
        "C": "packed",
    }
    assert parsed.rest == {"A": [None]}


def test_files_with_columns_in_another_order_are_not_mixed_up(spark: SparkSession, tmp_path):
    write(tmp_path / "shop" / "a.csv", "item_id,title\nA,Chair\n")
    write(tmp_path / "shop" / "b.csv", "title,item_id\nTable,B\n")
    with pytest.raises(Exception, match="CSV header does not conform to the schema"):
        parse(spark, tmp_path / "shop")
    # pandas writes its index under no name; one such file is fine.
    parsed = parse(spark, write(tmp_path / "pandas.csv", ",item_id,title\n0,A,Chair\n"))
    assert parsed.accepted["A"]["title"] == "Chair"


def spark_jobs(spark: SparkSession) -> int:
    """How many this session has started."""
    return spark.sparkContext._jsc.sc().dagScheduler().numTotalJobs()


def test_a_header_is_read_without_a_job(spark: SparkSession, tmp_path):
    # The empty file has no header. A folder's name may hold a column.
    write(tmp_path / "shop" / "day=1" / "a.csv", "")
    text = '\n"sku";"näme\nin two lines"\nA;Stuhl\n'.encode("utf-16")
    (tmp_path / "shop" / "day=1" / "b.csv.gz").write_bytes(gzip.compress(text))
    options = {"SEP": ";", "Encoding": "UTF-16"}
    columns = {"item_id": "sku", "title": "näme\nin two lines", "attributes.day": "day"}
    source = Source(path=(f"{tmp_path}/shop",), options=options, columns=columns)
    before = spark_jobs(spark)
    raw = reader.read(spark, "ingest.items", source)
    assert reader.has_field(raw, "title") and not reader.has_field(raw, "price")
    assert spark_jobs(spark) == before
    (row,) = ingest.parse_items(raw).collect()
    assert (row["item_id"], row["title"], row["attributes"]) == ("A", "Stuhl", {"day": "1"})


def test_a_comment_may_come_before_the_header(spark: SparkSession, tmp_path):
    file = write(tmp_path / "shop.csv", "# exported\nitem_id,title\nA,Chair\nB\n")
    parsed = parse(spark, file, options={"comment": "#"})
    assert parsed.accepted.keys() == {"A"}
    assert parsed.rest == {"B": ["the row isn't well formed"]}


def test_json_lines_with_a_broken_line(spark: SparkSession, tmp_path):
    file = write(
        tmp_path / "shop.json",
        '{"item_id": "A", "title": "Chair", "price": 3, "available": false}\n'
        '{"item_id": "B", "title\n',
    )
    parsed = parse(spark, file, format="json")
    chair = parsed.accepted["A"]
    assert [chair["title"], chair["price"], chair["available"]] == ["Chair", 3.0, False]
    assert parsed.rest == {None: ["the row isn't well formed"]}


@pytest.mark.parametrize(
    ("name", "text"), [("csv", ""), ("csv", "item_id,title\n"), ("json", ""), ("json", "{\n")]
)
def test_a_source_without_a_good_row(spark: SparkSession, tmp_path, name: str, text: str):
    parsed = parse(spark, write(tmp_path / f"shop.{name}", text), format=name)
    assert parsed.accepted == {}
    assert parsed.rest == ({None: ["the row isn't well formed"]} if text == "{\n" else {})


@pytest.mark.parametrize("kind", ["parquet", "delta"])
def test_typed_sources(spark: SparkSession, tmp_path, kind: str):
    rows = spark.createDataFrame(
        [("A", 2.5, False, TEN, 7), ("B", None, None, None, None)],
        "sku STRING, price DOUBLE, available BOOLEAN, first_seen_at TIMESTAMP, size INT",
    )
    rows.write.format(kind).save(str(tmp_path / "shop"))
    columns = {"item_id": "sku", "attributes.size": "size"}
    parsed = parse(spark, tmp_path / "shop", format=kind, columns=columns)
    columns = ("price", "available", "first_seen_at", "attributes")
    assert {
        item: tuple(row[name] for name in columns) for item, row in parsed.accepted.items()
    } == {
        "A": (2.5, False, TEN, {"size": "7"}),
        "B": (None, True, None, {}),
    }
    assert parsed.rest == {}


def test_a_missing_file_and_a_missing_column_are_wrong_use(spark: SparkSession, tmp_path):
    file = write(tmp_path / "shop.csv", "sku\nA\n")
    with pytest.raises(UsageError, match="nowhere"):
        reader.read(spark, "ingest.items", Source(path=(str(tmp_path / "nowhere.csv"),)))
    with pytest.raises(
        UsageError, match=r"title ← name: no such column in the source. It has: sku"
    ):
        reader.read(spark, "ingest.items", Source(path=(str(file),), columns={"title": "name"}))


def test_every_reason_of_the_log(spark: SparkSession, tmp_path):
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
    parsed = read_events(spark, file)
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
    accepted = ingest.accepted(parsed).collect()
    assert sorted((row["user_id"], row["event_time"]) for row in accepted) == [
        (f"u{n}", TEN) for n in (1, 2, 3, 4)
    ]
    assert {str(row["event_date"]) for row in accepted} == {"2025-01-01"}
    assert len({row["event_id"] for row in accepted}) == 4
    bad = ingest.rejected(parsed, "interactions").collect()
    assert {row["source"] for row in bad} == {f"interactions file:{file}"}
    future = next(json.loads(row["row"]) for row in bad if "future" in row["reason"])
    assert (future["user_id"], future["event_time"]) == ("u1", "2099-01-01T00:00:00Z")


def test_event_ids_count_once_and_identical_rejected_rows_are_counted(
    spark: SparkSession, tmp_path
):
    file = write(
        tmp_path / "log.csv",
        "event_id,user_id,item_id,event_type,event_time\n"
        "e1,u1,A,view,2025-01-02T10:00:00Z\n"
        "e1,u1,A,view,2025-01-01T10:00:00Z\n" + 3 * "e2,u1,A,view,soon\n",
    )
    parsed = read_events(spark, file)
    accepted = ingest.accepted(parsed).collect()
    assert [(row["event_id"], row["event_time"]) for row in accepted] == [("e1", TEN)]
    (bad,) = ingest.rejected(parsed, "interactions").collect()
    assert bad["occurrences"] == 3


def photos(run: Pipeline) -> dict[tuple[str, int], bytes]:
    rows = rows_of(run, PHOTOS)
    for row in rows:
        assert row["image_sha256"] == hashlib.sha256(row["image"]).hexdigest()
        assert row["bytes"] == len(row["image"])
    return {(row["item_id"], row["position"]): bytes(row["image"]) for row in rows}


def figures(result: StageResult, source: str) -> tuple[int, int, int]:
    """Of the source's rows: ok, rejected, skipped."""
    counts = source_counts(result, source)
    assert counts["in"] == counts["ok"] + counts["rejected"] + counts["skipped"]
    return counts["ok"], counts["rejected"], counts["skipped"]


def ingest_photos(run: Pipeline) -> tuple[int, int, int]:
    return figures(run_stage(run, "ingest"), "photos")


def rejected_photos(run: Pipeline) -> dict[str, str]:
    """Reason by the photo's file name."""
    rows = run.tables.read(REJECTED).where("source = 'photos'").collect()
    return {Path(json.loads(row["row"])["uri"]).name: row["reason"] for row in rows}


def items_by_file(run: Pipeline) -> list[set[str]]:
    """The items in each file of the table photos. A chunk of captioning reads only some files."""
    files: dict[str, set[str]] = {}
    photos = from_files(run.tables, PHOTOS)
    for row in photos.select("_metadata.file_name", "item_id").collect():
        files.setdefault(row["file_name"], set()).add(row["item_id"])
    return sorted(files.values(), key=min)


EVENTS = "user_id,item_id,event_type,event_time\n"


@pytest.fixture
def folder_shop(pipeline: MakePipeline, tmp_path, monkeypatch) -> Pipeline:
    """A catalogue, a log of one file and a folder of photos, two of which fill a file of photos."""
    monkeypatch.setattr("vlm4rec_spark.stages.ingest._PHOTOS_PER_FILE", 2)
    write(tmp_path / "shop.csv", "item_id,title\nA,Chair\nB,Table\nC,Lamp\n,Nothing\n")
    write(
        tmp_path / "log-1.csv",
        f"{EVENTS}u1,A,view,2025-01-01\n,A,view,2025-01-01\nu1,gone,view,2025-01-01\n",
    )
    for name, text in {
        "A.jpg": "a zero",
        "A.1.jpg": "a one",
        "B.jpg": "b jpg",
        "B.png": "b png",
        "deep +/ü/C.jpg": "",
        "Z.jpg": "z",
        "README": "no",
    }.items():
        write(tmp_path / "photos" / name, text)
    return pipeline(
        tmp_path,
        f"ingest.items.path=[{tmp_path}/shop.csv]",
        f"ingest.interactions.path=['{tmp_path}/log-*.csv']",
        f"ingest.photos.folder={tmp_path}/photos",
    )


FOLDER_PHOTOS = {
    ("A", 0): b"a zero",
    ("A", 1): b"a one",
    ("B", 0): b"b jpg",
    ("C", 0): b"",
}


def test_catalogue_log_and_photo_folder(folder_shop: Pipeline):
    # These photos would fit one task's file; as many real photos wouldn't.
    folder_shop.spark.conf.set("spark.sql.files.maxPartitionBytes", "1m")
    try:
        result = run_stage(folder_shop, "ingest")
    finally:
        folder_shop.spark.conf.unset("spark.sql.files.maxPartitionBytes")
    assert figures(result, "items") == (3, 1, 0)
    assert figures(result, "interactions") == (2, 1, 0)
    assert figures(result, "photos") == (4, 3, 0)
    assert [result.rows_in, result.ok, result.failed] == [14, 9, 5]
    gaps = {"unknown_item_events": "1", "items_without_photo": "0", "untouched_items": "2"}
    assert {name: result.details[name] for name in gaps} == gaps
    assert photos(folder_shop) == FOLDER_PHOTOS
    assert items_by_file(folder_shop) == [{"A"}, {"B", "C"}]  # two photos each
    assert rejected_photos(folder_shop) == {
        "B.png": "the item has another photo at this position",
        "Z.jpg": "no such item in the catalogue",
        "README": "the file name doesn't fit ingest.photos.file_name",
    }


def test_only_new_files_and_changed_photos_are_read(folder_shop: Pipeline, tmp_path):
    folder_shop.run(["ingest"])
    # Other bytes of the same size and time, which must not be read.
    write(tmp_path / "photos" / "A.jpg", "A ZERO")
    write(tmp_path / "photos" / "B.jpg", "B JPG", at=1_700_000_009)
    write(
        tmp_path / "log-2 [+].csv",
        f"{EVENTS}u1,A,view,2025-01-01\nu2,A,view,2025-01-01\nu2,A,view,2025-01-01\n",
    )
    result = run_stage(folder_shop, "ingest")
    assert figures(result, "photos") == (1, 3, 3)
    assert photos(folder_shop) == FOLDER_PHOTOS | {("B", 0): b"B JPG"}
    # One event of the second file is in the first, which isn't opened again.
    assert figures(result, "interactions") == (1, 0, 2)
    ledger = rows_of(folder_shop, INGESTED_FILES)
    counts = ("rows_read", "rows_taken", "rows_rejected", "rows_repeated")
    assert {Path(row["file"]).name: [row[name] for name in counts] for row in ledger} == {
        "log-1.csv": [3, 2, 1, 0],
        "log-2 [+].csv": [3, 1, 0, 2],
    }


def test_what_has_not_changed_is_known_by_two_jobs(folder_shop: Pipeline, tmp_path):
    context = folder_shop.context
    context.begin()
    before = spark_jobs(context.spark)
    fingerprint = inputs_fingerprint(context)
    assert inputs_fingerprint(context) == fingerprint
    assert spark_jobs(context.spark) <= before + 2
    write(tmp_path / "photos" / "empty.jpg", "")
    context.begin()
    assert inputs_fingerprint(context) != fingerprint


def test_a_file_that_comes_during_a_run_is_for_the_next(folder_shop: Pipeline, tmp_path):
    def write_late(_: str, stage: str) -> None:
        if stage == "ingest":
            write(tmp_path / "log-2.csv", f"{EVENTS}u2,A,view,2025-01-01\n")

    context = folder_shop.context
    context.reporter = replace(context.reporter, stage=write_late)
    assert figures(run_stage(folder_shop, "ingest"), "interactions") == (2, 1, 0)
    assert figures(run_stage(folder_shop, "ingest"), "interactions") == (1, 0, 0)
    assert run_stage(folder_shop, "ingest").status == "unchanged"


def test_users_of_whom_none_is_usable_are_refused(
    pipeline: MakePipeline, user_tables: tuple[str, ...], tmp_path
):
    write(tmp_path / "users.csv", "user_id,consent\n,yes\nu1,perhaps\n")
    run = pipeline(tmp_path, *user_tables)
    with pytest.raises(RunError, match=r"ingest.users: the source has no usable row \(2 rejected"):
        run.run(["ingest"])
    assert not run.tables.exists(ITEMS)


@pytest.fixture
def user_tables(tmp_path) -> tuple[str, ...]:
    write(tmp_path / "shop.csv", "item_id,title\nA,Lamp\n")
    write(
        tmp_path / "users.csv",
        "id,segment,consent\nu1,club,Yes\nu2,,\n,club,no\nu3,club,perhaps\nu1,club,Yes\n",
    )
    write(tmp_path / "ids.csv", "anonymous_id,user_id\nv1,u1\nv2,u1\nv3,\n,u2\nv2,u2\n")
    return (
        f"ingest.items.path=[{tmp_path}/shop.csv]",
        f"ingest.users.path=[{tmp_path}/users.csv]",
        f"ingest.identities.path=[{tmp_path}/ids.csv]",
    )


def users(run: Pipeline) -> dict[str, list[object]]:
    """segment and consent by user_id."""
    rows = rows_of(run, USERS)
    return {row["user_id"]: [row["segment"], row["consent"]] for row in rows}


def test_users_and_identities(pipeline: MakePipeline, user_tables: tuple[str, ...], tmp_path):
    run = pipeline(tmp_path, *user_tables, "ingest.users.columns={user_id: id}")
    result = run_stage(run, "ingest")
    assert figures(result, "users") == (2, 2, 1)
    assert figures(result, "identities") == (2, 3, 0)
    assert users(run) == {"u1": ["club", True], "u2": [None, None]}
    identities = rows_of(run, IDENTITIES)
    assert {row["anonymous_id"]: row["user_id"] for row in identities} == {"v1": "u1", "v2": "u1"}
    reasons = {row["reason"] for row in rows_of(run, REJECTED)}
    assert reasons == {
        "user_id is missing",
        "consent is neither true nor false",
        "anonymous_id is missing",
        "anonymous_id stands twice in one file, with different values",
    }

    # Another delivery changes a user, and keeps those whom it doesn't name.
    write(tmp_path / "users.csv", "id,segment\nu2,new\n", at=1_700_000_009)
    run.run(["ingest"])
    assert users(run) == {"u1": ["club", True], "u2": ["new", None]}


def test_users_without_the_key_column_are_refused(
    pipeline: MakePipeline, user_tables: tuple[str, ...], tmp_path
):
    message = r"ingest.users: the source has no column user_id with a value"
    with pytest.raises(UsageError, match=message):
        pipeline(tmp_path, *user_tables).check(["ingest"])


def test_photos_from_a_path_column(pipeline: MakePipeline, tmp_path):
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
    assert ingest_photos(run) == (2, 1, 0)
    assert photos(run) == {("A", 0): b"new.jpg", ("B", 0): b"b.jpg"}
    ((name, reason),) = rejected_photos(run).items()
    assert name == "gone.jpg"
    assert reason.startswith("the photo can't be read: ")

    write(tmp_path / "b.jpg", "B.JPG")
    write(tmp_path / "new.jpg", "new too", at=1_700_000_009)
    assert ingest_photos(run) == (1, 1, 1)
    assert photos(run) == {("A", 0): b"new too", ("B", 0): b"b.jpg"}

    message = "the catalogue has no column 'photos' with a path in it"
    with pytest.raises(UsageError, match=message):
        pipeline(tmp_path, shop, "ingest.photos.path_column=photos").check(["ingest"])


def test_large_photos_leave_the_worker_in_small_batches(monkeypatch):
    monkeypatch.setattr(ingest, "_BYTES_PER_BATCH", 100)
    sizes = [10] * 33 + [60, 60, 101, None]  # the last one couldn't be read
    images = [None if size is None else b"x" * size for size in sizes]
    photos = [{"item_id": str(n), "image": image} for n, image in enumerate(images)]
    batches = list(ingest._small_batches(iter([None, *photos, None])))
    assert [len(batch) for batch in batches] == [11, 11, 11, 2, 1, 1]
    item_ids = [item for batch in batches for item in batch["item_id"]]
    assert item_ids == [photo["item_id"] for photo in photos]
    empty = ingest._small_batches(iter(40 * [{"image": b""}]))
    assert [len(batch) for batch in empty] == [32, 8]


class PhotoServer(ThreadingHTTPServer):
    """Serves a folder's files with their times. /undated has no time."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.folder = folder
        self.statuses: dict[str, int] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def take_statuses(self) -> dict[str, int]:
        """The status of each requested path since the last call."""
        statuses = self.statuses
        self.statuses = {}
        return statuses


class Handler(SimpleHTTPRequestHandler):
    """Answers 304 for a file that hasn't changed."""

    server: PhotoServer

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        path = self.path.partition("?")[0]
        assert path not in self.server.statuses
        self.server.statuses[path] = int(code)

    def log_message(self, *_: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if not (keyword == "Last-Modified" and self.path == "/undated"):
            super().send_header(keyword, value)

    def do_GET(self) -> None:
        if self.path == "/undated":
            del self.headers["If-Modified-Since"]
        super().do_GET()


@pytest.fixture
def photo_server(tmp_path) -> Iterator[PhotoServer]:
    folder = tmp_path / "photos"
    for name in ("a", "b", "c", "undated"):
        write(folder / name, f"photo {name}")
    write(folder / "huge", "x" * 2_001)
    with PhotoServer(folder) as server:
        yield server
        server.shutdown()


@pytest.fixture
def uris(photo_server: PhotoServer, tmp_path) -> dict[str, str]:
    """Addresses by item: photos of the server, one in a file, and four that can't be read."""
    cdn = f"HTTP://ann:s3cret@127.0.0.1:{photo_server.server_port}"
    return {
        "A": f"{cdn}/a",
        "B": f"{cdn}/b?sig=s3cret",
        "C": f"{cdn}/c",
        "U": f"{cdn}/undated",
        "F": str(write(tmp_path / "file.jpg", "a file")),
        "G": f"{cdn}/gone",
        "H": f"{cdn}/huge",
        "M": "http://169.254.169.254/meta",
        "N": f"zip://x.jpg::{cdn}/n.zip",
    }


@pytest.fixture
def url_shop(pipeline: MakePipeline, uris: dict[str, str], tmp_path) -> Pipeline:
    rows = "".join(f"{item},{uri}\n" for item, uri in uris.items())
    write(tmp_path / "shop.csv", f"item_id,photo\n{rows}")
    return pipeline(
        tmp_path,
        f"ingest.items.path=['{tmp_path}/shop.csv']",
        "ingest.photos.path_column=photo",
        "ingest.photos.http.private_addresses=true",
        "ingest.photos.http.max_mb=0.002",
    )


ALL_READ = {"/a": 200, "/b": 200, "/c": 200, "/undated": 200, "/gone": 404, "/huge": 200}
URL_PHOTOS = {
    ("A", 0): b"photo a",
    ("B", 0): b"photo b",
    ("C", 0): b"photo c",
    ("U", 0): b"photo undated",
    ("F", 0): b"a file",
}


def test_photos_from_urls(url_shop: Pipeline, photo_server: PhotoServer, uris: dict[str, str]):
    assert ingest_photos(url_shop) == (5, 4, 0)
    assert photos(url_shop) == URL_PHOTOS
    rows = {row["item_id"]: row for row in rows_of(url_shop, PHOTOS)}
    assert {item: row["uri"] for item, row in rows.items()} == {
        item: uris[item] for item, _ in URL_PHOTOS
    }
    assert rows["A"]["modified_at"] == datetime(2023, 11, 14, 22, 13, 20)
    assert rejected_photos(url_shop) == {
        "gone": "the photo can't be read: HTTP 404",
        "huge": "the photo can't be read: larger than 0.002 MB",
        "meta": "the photo can't be read: the address is link-local (169.254.169.254)",
        "n.zip": "the photo can't be read: an http address inside another address",
    }
    assert photo_server.take_statuses() == ALL_READ


def test_only_changed_photos_are_downloaded_again(url_shop: Pipeline, photo_server: PhotoServer):
    url_shop.run(["ingest"])
    photo_server.take_statuses()
    # Photo b is another one with a new time, photo c the same one with a new time.
    write(photo_server.folder / "b", "PHOTO B", at=1_700_000_009)
    write(photo_server.folder / "c", "photo c", at=1_700_000_009)
    assert ingest_photos(url_shop) == (2, 4, 3)
    assert photos(url_shop) == URL_PHOTOS | {("B", 0): b"PHOTO B"}
    assert photo_server.take_statuses() == ALL_READ | {"/a": 304}

    version = url_shop.tables.versions([PHOTOS])
    assert ingest_photos(url_shop) == (0, 4, 5)
    assert photo_server.take_statuses() == ALL_READ | {"/a": 304, "/b": 304, "/c": 304}
    url_shop.tables.forget()
    assert url_shop.tables.versions([PHOTOS]) == version


def test_photos_from_a_bytes_column(pipeline: MakePipeline, spark: SparkSession, tmp_path):
    schema = "item_id STRING, title STRING, photo BINARY"
    rows = [("A", "Chair", b"a"), ("B", "Table", None), (None, "Lamp", b"c")]
    spark.createDataFrame(rows, schema).coalesce(1).write.parquet(str(tmp_path / "shop"))
    source = (f"ingest.items.path=[{tmp_path}/shop]", "ingest.items.format=parquet")
    run = pipeline(tmp_path, *source, "ingest.photos.bytes_column=photo")
    assert ingest_photos(run) == (1, 0, 0)
    assert photos(run) == {("A", 0): b"a"}
    with pytest.raises(UsageError, match="the catalogue has no binary column 'image'"):
        pipeline(tmp_path, *source, "ingest.photos.bytes_column=image").check(["ingest"])
