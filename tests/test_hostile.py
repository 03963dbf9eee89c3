"""Hostile input: nothing crashes, counts add up, and good rows among it come through unchanged.

Hypothesis draws batches of rows. Each batch is a file, and one Spark job reads all files of a test,
since a job takes a second however few rows it has.
"""

import csv
import io
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_photos import one_color
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from shop import MakePipeline, source_counts

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.pipeline import Pipeline, StageResult
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.photo_files import PhotoSource, photo_files
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import embed, index, ingest, profiles, recommend
from vlm4rec_spark.storage.schemas import EXPORT_WIDE, ITEMS, PHOTOS, REJECTED, TABLES, Table

T = TypeVar("T")
NOW = datetime(2025, 6, 1, tzinfo=UTC)
TEN = datetime(2025, 1, 1, 10, tzinfo=UTC)

# All different, some only by case, by a space or by the encoding of an accent.
IDS = (
    "a",
    "A",
    "a ",
    " a",
    "a\u00a0",
    "a\x00",
    "ü",
    "u\u0308",
    "0",
    "00",
    "1e3",
    "NaN",
    "null",
    "None",
    "true",
    "~",
    "-rf",
    "--help",
    "a b",
    "a+b",
    "a#b",
    "a?b",
    "a,b",
    "a;b",
    "a::b",
    "100%",
    "%zz",
    "up%2F..%2F..%2Fbait",
    "a\\b",
    'a"b',
    "a\nb",
    "a\r\nb",
    "\t",
    "*",
    "?",
    "[a-z]",
    "{a,b}",
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://localhost/x",
    "$(id)",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "'; DROP TABLE items; --",
    "`items`",
    "<script>alert('id')</script>",
    "\x1b[31m",
    "\u202egpj",
    "😀\u200d👩",
    "\ufeff",
    "\u2028",
    "\uffff",
    "\U0010ffff",
    "x" * 10_000,
)
TITLES = (
    "<script>alert('title')</script>",
    '" onerror="alert(1)',
    "&lt;img src=x onerror=alert(1)&gt;",
    "{{7*7}}",
    "",
    " ",
    "\x00\x01\x02",
    "\u202eabc",
    "=HYPERLINK(1)",
    "a\nb\rc\r\nd",
    'a"\x00b',
    "&#" + "9" * 5_000 + ";",
    "<" * 100_000,
    "x" * 1_000_000,
    "word " * 20_000,
)
PRICES = (
    "",
    " ",
    "NaN",
    "Infinity",
    "-1",
    "-0.0",
    "1e400",
    "1e308",
    "4.9e-324",
    "1,5",
    "1_000",
    "5d",
    "0x1p3",
    "free",
)
TIMES = (
    "",
    "now",
    "yesterday",
    "10:00",
    "T10:00",
    "-5",
    "0",
    "1e9",
    "1735725600.5",
    "9" * 10,
    "9" * 13,
    "9" * 19,
    "9" * 400,
    "0000-01-01",
    "-0005-01-01",
    "0001-01-01",
    "0001-01-03",
    "1582-10-10",
    "9999-12-31",
    "10000-01-01",
    "+294247-01-10T04:00:54.775807Z",
    "-290308-12-21T19:59:05.224193Z",
    "2025-02-30",
    "2025-01-01T25:00:00Z",
)

BATCHES = 10
hostile = settings(
    max_examples=BATCHES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
texts = st.text(max_size=8)
ids = st.sampled_from(IDS) | texts
titles = st.sampled_from(TITLES) | texts
prices = st.sampled_from(PRICES) | st.floats().map(repr) | texts
times = (
    st.sampled_from(TIMES) | st.datetimes().map(datetime.isoformat) | st.integers().map(str) | texts
)


ITEM = ("item_id", "title", "price", "available", "first_seen_at")
GOOD_ITEMS = [
    (f"good {n}", f'Chair, "{n}"\n', "12.50", "yes", "2025-01-01T10:00:00Z") for n in range(8)
]
EVENT = ("user_id", "item_id", "event_type", "event_time")
GOOD_EVENTS = [(f"good {n}", f"chair {n}", "view", "2025-01-01T12:00:00+02:00") for n in range(5)]


def drawn(batch: st.SearchStrategy[T]) -> list[T]:
    """Ten batches, the same in every run."""
    batches: list[T] = []

    @hostile
    @given(batch)
    def draw(drawn_batch: T) -> None:
        batches.append(drawn_batch)

    draw()
    assert len(batches) == BATCHES
    return batches


def rows_like(row: st.SearchStrategy[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(row, min_size=50, max_size=100)


def mixed(rows: Sequence, good: Sequence) -> list:
    """The rows with the good ones spread among them, a good one first and last."""
    result = list(rows)
    for n, row in enumerate(good):
        result.insert(len(rows) * n // (len(good) - 1) + n, row)
    return result


def table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """A CSV file, every cell in quotes."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([columns, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.getvalue().encode())
    return path


def parsed(
    spark: SparkSession,
    path: Path,
    parse: Callable[[DataFrame], DataFrame],
    format: str = "csv",
    **source: object,
) -> list[dict]:
    """Every row: accepted, a duplicate, or with a reason."""
    raw = reader.read(spark, "ingest.x", Source(path=(str(path),), format=format, **source))
    # Through Arrow, as in later stages. Arrow can't hold text that isn't UTF-8, and Python can't
    # hold a time in the year 10000.
    rows = parse(raw).toArrow().to_pylist()
    for row in rows:
        assert row["reason"] is None or row["reason"].strip()
        assert isinstance(json.loads(row["row"]), dict)
    return rows


def events(raw: DataFrame) -> DataFrame:
    return ingest.parse_interactions(raw, NOW)


def accepted(rows: Iterable[dict], *columns: str) -> list[tuple]:
    return [
        tuple(row[name] for name in columns)
        for row in rows
        if row["reason"] is None and not row["duplicate"]
    ]


def good_rows(rows: Iterable[dict], *columns: str) -> Counter[tuple]:
    """The good rows and how often they came. All but the first of a kind are duplicates."""
    good = {row[0] for row in [*GOOD_ITEMS, *GOOD_EVENTS]}
    without_reason = (row for row in rows if row["reason"] is None)
    values = (tuple(row[name] for name in columns) for row in without_reason)
    return Counter(row for row in values if row[0] in good)


def times_each(count: int, rows: Iterable[tuple]) -> Counter[tuple]:
    return Counter(dict.fromkeys(rows, count))


def have_texts_of(rows: list[dict], sent: list, *columns: str) -> bool:
    """No text was trimmed, folded or cut, not even of rejected rows. An empty cell is null."""
    texts = Counter(tuple(row[name] for name in columns) for row in rows)
    return texts == Counter(tuple(cell or None for cell in row[: len(columns)]) for row in sent)


def assert_good_events(rows: list[dict], files: int = 1) -> None:
    expected = [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]
    assert good_rows(rows, *EVENT) == times_each(files, expected)
    assert sorted(row for row in accepted(rows, *EVENT) if row in expected) == expected


def write_batches(
    folder: Path, columns: Sequence[str], batches: list[list], good: Sequence
) -> list[Sequence[str]]:
    """A CSV file for each batch, with the good rows in it. Returns the rows of all files."""
    sent: list[Sequence[str]] = []
    for number, batch in enumerate(batches):
        rows = mixed(batch, good)
        table(folder / f"{number}.csv", columns, rows)
        sent += rows
    return sent


def test_a_catalogue_of_any_text(spark: SparkSession, tmp_path):
    available = st.sampled_from(["", "no", "T", "maybe", "\x00"])
    batches = drawn(rows_like(st.tuples(ids, titles, prices, available, times)))
    sent = write_batches(tmp_path / "shop", ITEM, batches, GOOD_ITEMS)
    result = parsed(spark, tmp_path / "shop", ingest.parse_items)
    assert have_texts_of(result, sent, "item_id", "title")
    good = [(item, title, 12.5, True, TEN) for item, title, *_ in GOOD_ITEMS]
    assert good_rows(result, *ITEM) == times_each(BATCHES, good)
    prices_taken = [price for (price,) in accepted(result, "price") if price is not None]
    assert all(0 <= price < float("inf") for price in prices_taken)


def test_a_log_of_any_text(spark: SparkSession, tmp_path):
    event_types = st.sampled_from(["view", "", "\x00"]) | texts
    batches = drawn(rows_like(st.tuples(ids, ids, event_types, times)))
    sent = write_batches(tmp_path / "log", EVENT, batches, GOOD_EVENTS)
    result = parsed(spark, tmp_path / "log", events)
    assert have_texts_of(result, sent, "user_id", "item_id")
    assert_good_events(result, BATCHES)
    assert all(
        time <= NOW and time.date() == date
        for time, date in accepted(result, "event_time", "event_date")
    )


def test_logs_in_csv_that_end_in_any_bytes(spark: SparkSession, tmp_path):
    fragments = st.lists(st.sampled_from([b'"', b",", b"\n", b"\r", b"\x00", b"\xff"]))
    ends = drawn(st.tuples(fragments.map(b"".join), st.binary(max_size=2_000)))
    for number, end in enumerate(ends):
        file = table(tmp_path / "torn" / f"{number}.csv", EVENT, GOOD_EVENTS)
        file.write_bytes(file.read_bytes() + b"".join(end))
    assert_good_events(parsed(spark, tmp_path / "torn", events), BATCHES)


keys = texts | st.sampled_from(
    [*EVENT, "event_id", "EVENT_TIME", "_metadata", "_corrupt_record", "row", "a`b", "a.b"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ids | times,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(keys, values, max_size=5)
lines = st.one_of(
    objects.map(lambda row: json.dumps(row).encode()),
    objects.map(lambda row: json.dumps(row, ensure_ascii=False)[:-1].encode()),
    (st.none() | st.booleans() | st.integers() | texts).map(
        lambda value: json.dumps(value).encode()
    ),
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")),
    st.sampled_from(
        [
            b'{"user_id": "u", "user_id": "v"}',
            b'{"User_id": "u", "user_id": "v"}',
            b'{"user_id": "u"} {"user_id": "v"}',
            b'{"a":' * 900 + b"1" + b"}" * 900,
            b"[" * 2_000,
            b'{"a": ' + b"9" * 2_000 + b"}",
            b'{"' + b"n" * 60_000 + b'": 1}',
            b'{"user_id": "\\ud800", "item_id": "\\u0000"}',
            b'{"user_id": "\xff\xfe"}',
            b"[]",
            b"NaN",
            b"\xef\xbb\xbf{}",
        ]
    ),
)


def test_logs_in_json_lines_among_any_bytes(spark: SparkSession, tmp_path):
    good = [json.dumps(dict(zip(EVENT, row, strict=True))).encode() for row in GOOD_EVENTS]
    (tmp_path / "log").mkdir()
    with_content = 0
    for number, batch in enumerate(drawn(rows_like(lines))):
        sent = mixed(batch, good)
        (tmp_path / "log" / f"{number}.json").write_bytes(b"\xef\xbb\xbf" + b"\n".join(sent))
        with_content += sum(line.decode(errors="replace").strip("\ufeff \t") != "" for line in sent)
    result = parsed(spark, tmp_path / "log", events, "json")
    assert len(result) == with_content
    assert_good_events(result, BATCHES)


micros = st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**17), 10**18)


def test_catalogues_in_parquet_of_any_bytes(spark: SparkSession, tmp_path):
    good = [(f"good {n}".encode(), b"Chair", 12.5, int(TEN.timestamp()) * 10**6) for n in range(5)]
    cells = st.binary(max_size=6)
    rows = st.tuples(cells, cells, st.floats(), st.none() | micros)
    (tmp_path / "shop").mkdir()
    sent = 0
    for number, batch in enumerate(drawn(rows_like(rows))):
        write_parquet(tmp_path / "shop" / f"{number}.parquet", mixed(batch, good))
        sent += len(batch) + len(good)
    result = parsed(spark, tmp_path / "shop", ingest.parse_items, "parquet")
    assert len(result) == sent
    expected = [(f"good {n}", "Chair", 12.5, True, TEN) for n in range(5)]
    assert good_rows(result, *ITEM) == times_each(BATCHES, expected)


def write_parquet(file: Path, rows: list[tuple]) -> None:
    item, title, price, seen = zip(*rows, strict=True)
    columns = {
        "item_id": utf8(item),
        "title": utf8(title),
        "price": pa.array(price, pa.float64()),
        "first_seen_at": pa.array(seen, pa.timestamp("us", "UTC")),
        # Names that Spark or this project uses itself.
        "_metadata": utf8(title),
        "a`b": utf8(title),
        "source": pa.array(title),
        "brand": pa.array(title),
    }
    pq.write_table(pa.table(columns), file)


def utf8(values: Sequence[bytes]) -> pa.Array:
    """Bytes with the type of text; nothing checks that they are UTF-8."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def test_times_at_the_edges(spark: SparkSession, tmp_path):
    late = "event_time lies in the future"
    no_time = "event_time is not a time"
    expected = {
        "0001-01-01": no_time,
        "0001-01-03": None,
        "1582-10-10": None,
        "1969-12-31T23:59:59.999999Z": None,
        "2025-05-31T23:59:59+14:00": None,
        "2025-06-01T00:00:01Z": late,
        "9999-12-30": late,
        "9999-12-31": no_time,
        "+10000-01-01": no_time,
        "-0005-01-01": no_time,
        "0000-01-01": no_time,
        "2025-02-30": no_time,
        "10:00": no_time,
        "0000000000": None,
        "9999999999999": late,
        "-1735725600": no_time,
        "99999999999999999999": no_time,
    }
    file = table(tmp_path / "log.csv", EVENT, [("u", "i", "view", time) for time in expected])
    result = parsed(spark, file, events)
    assert {json.loads(row["row"])["event_time"]: row["reason"] for row in result} == expected


def test_a_header_of_any_names(spark: SparkSession, tmp_path):
    names = ["a`b", "_metadata", "a.b", "source", "row", "title", "", "\x00", "İ"]
    for header in (["item_id", *names, "price"], ["item_id", *names, *names, "price"]):
        file = table(tmp_path / "shop.csv", header, [("A", *(len(header) - 2) * ["x"], "3")])
        assert accepted(parsed(spark, file, ingest.parse_items), "item_id", "price") == [("A", 3.0)]


def test_json_by_other_names_and_over_several_lines(spark: SparkSession, tmp_path):
    file = tmp_path / "shop.json"
    file.write_text(
        '{"sku": "A", "title": 1}\n[{"sku": "B"},\n{"sku": "C", "name": {"x": 1}},\n'
        '{"sku": 1, "sku": 2}\n'
    )
    columns = {"item_id": "sku", "title": "name", "attributes.no": "title"}
    result = parsed(spark, file, ingest.parse_items, "json", columns=columns)
    assert sorted(accepted(result, "item_id", "title", "attributes")) == [
        ("A", None, [("no", "1")]),
        ("C", '{"x":1}', []),
    ]
    assert [row["reason"] for row in result if row["reason"]] == 2 * ["the row isn't well formed"]

    file.write_text('[{"sku": "A",\n"title": 1},\n{"sku": "B"}]\n')
    columns = {"item_id": "sku"}
    several = {"multiLine": "true"}
    result = parsed(spark, file, ingest.parse_items, "json", columns=columns, options=several)
    assert sorted(accepted(result, "item_id", "title")) == [("A", "1"), ("B", None)]
    with pytest.raises(
        UsageError, match=r"title ← Title: no such column in the source. It has: sku, title\."
    ):
        parsed(
            spark,
            file,
            ingest.parse_items,
            "json",
            columns=columns | {"title": "Title"},
            options=several,
        )


def test_a_byte_order_mark_is_no_part_of_the_first_row(spark: SparkSession, tmp_path):
    (tmp_path / "shop.csv").write_text("\ufeffitem_id\nA\n")
    (tmp_path / "shop.json").write_text('\ufeff{"item_id": "A"}\n')
    for format, options in (("csv", {}), ("json", {}), ("json", {"multiLine": "true"})):
        result = parsed(
            spark, tmp_path / f"shop.{format}", ingest.parse_items, format, options=options
        )
        assert accepted(result, "item_id") == [("A",)], (format, options)


def test_a_file_whose_name_is_a_pattern_that_finds_nothing(spark: SparkSession, tmp_path):
    table(tmp_path / "log" / "log [12]{a,b}.csv", EVENT, GOOD_EVENTS)
    result = parsed(spark, tmp_path / "log", events)
    assert_good_events(result)


@pytest.mark.parametrize("path", ["nosuch://place/file", "{a", "a:b:c", "", "\x00"])
@pytest.mark.parametrize("format", ["csv", "json", "parquet", "delta"])
def test_a_path_that_leads_nowhere_is_one_line(spark: SparkSession, format: str, path: str):
    with pytest.raises((RunError, UsageError)) as refused:
        reader.read(spark, "ingest.items", Source(path=(path,), format=format))
    (line,) = str(refused.value).splitlines()
    assert line.startswith("ingest.items") and not line.endswith(": ")


def fits(item: str) -> bool:
    """It can be the beginning of a file's name, and of one that Spark doesn't take for hidden."""
    return not set("/\0") & set(item) and len(item) < 200 and item[0] not in "._"


def fits_pattern(name: str) -> bool:
    """`.` doesn't match the end of a line."""
    return "\n" not in name and "\u2028" not in name


@pytest.fixture
def photo_folder(tmp_path) -> dict[str, bytes]:
    """The content by file name of the photos that were written to tmp_path/photos."""
    content = {f"{item}.jpg": item.encode() for item in IDS if fits(item)}
    content |= {"none%41 +.jpg": b"", "x.1.jpg": b"x 1"}
    # If a part of these names is taken for a scheme or an address, the bait is read instead.
    content |= {"zip::http:x.jpg": b"zip", "http::x.jpg": b"http"}
    content |= dict.fromkeys(("a", "zip", "http"), b"bait")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (tmp_path / "bait.jpg").write_bytes(b"bait")
    # Times that pandas can't hold.
    os.utime(folder / "a#b.jpg", (1e10, 1e10))
    os.utime(folder / "a+b.jpg", (-1e10, -1e10))
    return content


def test_photo_names_of_any_kind(spark: SparkSession, tmp_path, photo_folder: dict[str, bytes]):
    files = photo_files(spark, PhotoSource(folder=f"{tmp_path}/photos"))
    rows = files.select("uri", "item_id").collect()
    item_ids = {row["uri"].rsplit("/", 1)[1]: row["item_id"] for row in rows}
    assert {name: item_ids[f"{name}.jpg"] for name in filter(fits, IDS)} == {
        name: name if fits_pattern(name) else None for name in filter(fits, IDS)
    }
    item_id = F.coalesce("item_id", "uri").alias("item_id")
    changed = ingest.with_stored(
        files.select(item_id, F.lit(0).alias("position"), "uri", "bytes", "modified_at"),
        spark.createDataFrame([], PHOTOS.schema),
        keep=True,
    )
    photos = ingest.read_photos(changed, len(photo_folder), 2, PhotoSource()).toArrow().to_pylist()
    assert [photo["reason"] for photo in photos if photo["reason"]] == []
    read = {photo["uri"].rsplit("/", 1)[1]: photo["image"] for photo in photos}
    assert read == photo_folder


def test_a_photo_position_that_is_none(spark: SparkSession, tmp_path):
    for position in ("front", "-1", "99999999999", "7"):
        (tmp_path / f"A_{position}.jpg").write_bytes(b"x")
    source = PhotoSource(folder=str(tmp_path), file_name=r"(.+)_(.+)\.jpg")
    items = spark.createDataFrame([("A",)], "item_id STRING")
    rows = ingest.photo_rows(photo_files(spark, source), items).collect()
    bad = "the position in the file name is not a number"
    assert Counter((row["position"], row["reason"]) for row in rows) == {
        (None, bad): 2,
        (-1, bad): 1,
        (7, None): 1,
    }
    python_only = source.model_copy(update={"file_name": r"(?P<item>.+)_(?P<position>.+)"})
    with pytest.raises(UsageError, match=r"ingest\.photos\.file_name: .*Unknown inline modifier"):
        photo_files(spark, python_only)


def test_one_long_title_does_not_widen_the_others():
    batch = pd.DataFrame({"text": [f"chair {n}" for n in range(2_000)] + ["x" * 100_000]})
    batch[["item_id", "representation", "content_sha256", "fallback"]] = ("A", "title", "", False)
    encode = embed._text_udf(embed.EmbedSettings(encoder="fake"))
    tracemalloc.start()
    (rows,) = encode(iter([batch]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 2_001
    assert peak < 50_000_000


@pytest.fixture
def empty_tables(spark: SparkSession) -> dict[str, DataFrame]:
    return {name: spark.createDataFrame([], table.schema) for name, table in TABLES.items()}


@pytest.fixture
def open_searcher(
    spark: SparkSession, tmp_path, empty_tables: dict[str, DataFrame], one_item: DataFrame
) -> Callable[[], Searcher]:
    """Of an index with one item."""
    texts = embed.item_texts(one_item, empty_tables["item_captions"], empty_tables["captions"])
    pending = embed.marked_texts(texts, empty_tables["embeddings"], "fake", 256)
    vectors = embed.embed(pending, "fake", embed.EmbedSettings(encoder="fake"))
    indexed = index.index_vectors(vectors, "title", "fake")
    rows = index.index_rows(indexed, texts, "title").toArrow()
    built = build_index(rows, "title", "fake", tmp_path, ann_min_items=20_000)
    return ship(spark, built, 1.0, Searcher.open)


@pytest.fixture
def one_item(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([("../i", "A lamp")], "item_id STRING, title STRING")


def test_one_item_without_and_with_an_event(
    spark: SparkSession,
    empty_tables: dict[str, DataFrame],
    one_item: DataFrame,
    open_searcher: Callable[[], Searcher],
):
    settings = profiles.ProfileSettings()
    no_events = empty_tables["interactions"]
    assert profiles.histories(no_events, one_item, settings).isEmpty()
    event = ("e", "../u", "../i", "view", TEN, TEN.date())
    log = spark.createDataFrame([event], no_events.schema)
    histories = profiles.histories(log, one_item, settings)
    users = profiles.with_embedding(histories, "title", open_searcher)
    rules = recommend.all_items_except(open_searcher(), [])
    lists = recommend.recommend(users, open_searcher, rules, 3, None).collect()
    assert [(row["user_id"], row["items"]) for row in lists] == [("../u", [])]


BAD_ITEMS = [
    ("", "x", "1", "", ""),
    ("nan", "x", "NaN", "", ""),
    ("minus", "x", "-1", "", ""),
    ("never", "x", "1", "", "0000-00-00"),
    ("year", "x", "1", "", "+10000-01-01"),
]
CAPTION = "<script>alert('caption')</script><img src=x onerror=alert(1)> & a chair"


def hostile_log() -> list[tuple[str, str, str, str]]:
    """Events of all hostile ids and times, and of four good users with two items each."""
    following = (*IDS[1:], IDS[0])
    log = [(user, item, "view", "2025-01-01") for user, item in zip(IDS, following, strict=True)]
    log += [(user, "good 1", user, TIMES[n % len(TIMES)]) for n, user in enumerate(IDS)]
    log += [(user, "good 2", "view", time) for user, time in zip(IDS, TIMES, strict=False)]
    for n in range(4):
        log.append((f"good user {n}", f"good {n}", "view", "2025-02-01"))
        log.append((f"good user {n}", f"good {n + 2}", "view", "2025-02-03"))
    return log


def write_photos(folder: Path) -> None:
    folder.mkdir()
    for n, (item, *_) in enumerate(GOOD_ITEMS):
        (folder / f"{item}.png").write_bytes(one_color((20 * n, 40, 90)))
    for n, item in enumerate(filter(fits, IDS)):
        contents = (one_color((90, 3 * n, 40)), b"<script>alert('photo')</script>", b"")
        (folder / f"{item}.png").write_bytes(contents[n % 3])


@pytest.fixture
def hostile_shop(pipeline: MakePipeline, tmp_path) -> Pipeline:
    """Catalogue, log, captions and photos of everything hostile, and of some good rows."""
    items = [(item, TITLES[n % len(TITLES)], "", "", "") for n, item in enumerate(IDS)]
    table(tmp_path / "shop.csv", ITEM, mixed([*items, *BAD_ITEMS], GOOD_ITEMS))
    # A name that Spark would take for a glob, and a file that matches this glob.
    table(tmp_path / "log" / "log [12]{a,b}*.csv", EVENT, hostile_log())
    last_event = ("good user 4", "good 7", "view", "2025-02-01")
    table(tmp_path / "log" / "log 1a.csv", EVENT, [last_event])
    write_photos(tmp_path / "photos")
    (tmp_path / "bait.png").write_bytes(one_color((1, 2, 3)))
    captions = [
        ("good 1", CAPTION),
        ("../../etc/passwd", CAPTION),
        ("good 9", "of no item"),
        ("'; DROP TABLE items; --", "  "),
    ]
    table(tmp_path / "captions.csv", ("item_id", "text"), captions)
    return pipeline(
        tmp_path,
        f"ingest.items.path=[{tmp_path}/shop.csv]",
        f"ingest.interactions.path=[{tmp_path}/log]",
        "recommend.k=3",
        f"ingest.photos.folder={tmp_path}/photos",
        "caption.max_failed_share=1",
    )


def all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_stages(hostile_shop: Pipeline, tmp_path):
    before = all_files(tmp_path)
    (ingested,) = hostile_shop.run(["ingest"])
    imported = hostile_shop.import_captions(Source(path=(str(tmp_path / "captions.csv"),)))
    assert [imported.ok, imported.failed] == [2, 2]
    stages = ["caption", "embed", "index", "profiles", "recommend", "publish", "report"]
    results = hostile_shop.run(stages)
    assert [result.status for result in results] == 7 * ["ok"]
    rejected = check_ingested(hostile_shop, before)
    check_counts(ingested, len(BAD_ITEMS), rejected - imported.failed)
    check_lists(hostile_shop)
    # No file was changed, or made elsewhere.
    after = all_files(tmp_path)
    assert {path: after.get(path) for path in before} == before
    new_folders = {path.relative_to(tmp_path).parts[0] for path in after.keys() - before}
    assert new_folders == {"tables", "index", "report.html"}
    check_page(after[tmp_path / "report.html"].decode())


def read_rows(run: Pipeline, table: Table) -> list[dict]:
    return run.tables.read(table).toArrow().to_pylist()


def check_ingested(run: Pipeline, files: dict[Path, bytes]) -> int:
    """Rows in the tables are the rows that were sent. Returns how many were rejected."""
    items = {row["item_id"]: row for row in read_rows(run, ITEMS)}
    assert set(items) == {*IDS, *(item for item, *_ in GOOD_ITEMS)}
    assert [tuple(items[item][name] for name in ITEM) for item, *_ in GOOD_ITEMS] == [
        (item, title, 12.5, True, TEN) for item, title, *_ in GOOD_ITEMS
    ]
    photos = read_rows(run, PHOTOS)
    assert {f"{photo['item_id']}.png": photo["image"] for photo in photos} == {
        path.name: data
        for path, data in files.items()
        if path.parent.name == "photos" and fits_pattern(path.name)
    }
    rejected = read_rows(run, REJECTED)
    assert all(row["reason"].strip() for row in rejected)
    return sum(row["occurrences"] for row in rejected)


def check_counts(ingested: StageResult, rejected_items: int, rejected: int) -> None:
    sources = ("items", "interactions", "photos")
    counts = {name: source_counts(ingested, name) for name in sources}
    for count in counts.values():
        assert count["in"] == count["ok"] + count["rejected"] + count["skipped"]
    assert counts["items"]["ok"] == len(IDS) + len(GOOD_ITEMS)
    assert counts["items"]["rejected"] == rejected_items
    assert sum(count["rejected"] for count in counts.values()) == rejected


def check_lists(run: Pipeline) -> None:
    """Good users have full lists without the items that they have seen."""
    items = {row["item_id"] for row in read_rows(run, ITEMS)}
    lists = {row["user_id"]: row["item_ids"] for row in read_rows(run, EXPORT_WIDE)}
    for n in range(5):
        seen = {"good 7"} if n == 4 else {f"good {n}", f"good {n + 2}"}
        listed = set(lists[f"good user {n}"])
        assert len(listed) == 3
        assert listed <= items - seen


def check_page(page: str) -> None:
    """The page runs no script and loads nothing."""
    assert "&lt;script&gt;alert(&#39;caption&#39;)&lt;/script&gt;" in page
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names
    assert [name for name in tags.attributes if name.startswith("on")] == []
    assert all(target.startswith(("#", "data:image/jpeg;base64,")) for target in tags.targets)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets |= {
            value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")
        }
