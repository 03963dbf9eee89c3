"""Input that nobody should send: nothing crashes, counts add up, and the good rows among it come out unharmed.

Hypothesis makes whole batches of rows, since a Spark job takes a second however few rows it has.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyspark.sql import functions as F

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.index.build import build_index
from vlm4rec_spark.models.index.searcher import Searcher
from vlm4rec_spark.sources import reader
from vlm4rec_spark.sources.reader import PhotoSource, Source
from vlm4rec_spark.spark.shipping import ship
from vlm4rec_spark.stages import embed, index, ingest, profiles, recommend
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from vlm4rec_spark.pipeline import Pipeline

NOW = datetime(2025, 6, 1, tzinfo=UTC)
TEN = datetime(2025, 1, 1, 10, tzinfo=UTC)

# All different, though some only by case, by a space or by how an accent is written.
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

hostile = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    # No shrinking, at a Spark job for each of its steps.
    phases=(Phase.explicit, Phase.generate),
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


def batches(row: st.SearchStrategy) -> st.SearchStrategy[list]:
    return st.lists(row, min_size=50, max_size=100)


def among(rows: Sequence, good: Sequence) -> list:
    """The rows with the good ones spread among them, one of them first and one last."""
    spread = list(rows)
    for place, row in enumerate(good):
        spread.insert(len(rows) * place // (len(good) - 1) + place, row)
    return spread


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
    """Every row that was read, each one taken, a duplicate, or with a reason."""
    raw = reader.read(spark, "ingest.x", Source(path=(str(path),), format=format, **source))
    # Through Arrow, as in the later stages: it can't hold text that isn't UTF-8, nor Python a time of the year 10000.
    rows = parse(raw).toArrow().to_pylist()
    for row in rows:
        assert row["reason"] is None or row["reason"].strip()
        assert isinstance(json.loads(row["row"]), dict)
    return rows


def events(raw: DataFrame) -> DataFrame:
    return ingest.parse_interactions(raw, NOW)


def taken(rows: Iterable[dict], *columns: str) -> list[tuple]:
    return [
        tuple(row[name] for name in columns)
        for row in rows
        if row["reason"] is None and not row["duplicate"]
    ]


def good_ones(rows: Iterable[dict], *columns: str) -> list[tuple]:
    return sorted(row for row in taken(rows, *columns) if str(row[0]).startswith("good "))


def to_the_letter(rows: list[dict], sent: list, *columns: str) -> bool:
    """No text was trimmed, folded or cut, of the rejected rows neither; an empty cell is none."""
    there = Counter(tuple(row[name] for name in columns) for row in rows)
    return there == Counter(tuple(cell or None for cell in row[: len(columns)]) for row in sent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@hostile
@given(
    rows=batches(
        st.tuples(ids, titles, prices, st.sampled_from(["", "no", "T", "maybe", "\x00"]), times)
    )
)
def test_a_catalogue_of_any_text(spark: SparkSession, folder: Path, rows: list) -> None:
    sent = among(rows, GOOD_ITEMS)
    found = parsed(spark, table(folder / "shop.csv", ITEM, sent), ingest.parse_items)
    assert to_the_letter(found, sent, "item_id", "title")
    assert good_ones(found, *ITEM) == [
        (item, title, 12.5, True, TEN) for item, title, *_ in GOOD_ITEMS
    ]
    assert all(price is None or 0 <= price < float("inf") for (price,) in taken(found, "price"))


@hostile
@given(rows=batches(st.tuples(ids, ids, st.sampled_from(["view", "", "\x00"]) | texts, times)))
def test_a_log_of_any_text(spark: SparkSession, folder: Path, rows: list) -> None:
    sent = among(rows, GOOD_EVENTS)
    found = parsed(spark, table(folder / "log.csv", EVENT, sent), events)
    assert to_the_letter(found, sent, "user_id", "item_id")
    assert good_ones(found, *EVENT) == [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]
    assert all(
        time <= NOW and time.date() == date
        for time, date in taken(found, "event_time", "event_date")
    )


@hostile
@given(
    data=st.binary(max_size=2_000),
    bits=st.lists(st.sampled_from([b'"', b",", b"\n", b"\r", b"\x00", b"\xff"])),
)
def test_a_log_in_csv_that_ends_in_any_bytes(
    spark: SparkSession, folder: Path, data: bytes, bits: list[bytes]
) -> None:
    file = table(folder / "torn.csv", EVENT, GOOD_EVENTS)
    file.write_bytes(file.read_bytes() + b"".join(bits) + data)
    found = parsed(spark, file, events)
    assert good_ones(found, *EVENT) == [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]


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


@hostile
@given(rows=batches(lines))
def test_a_log_in_json_lines_among_any_bytes(
    spark: SparkSession, folder: Path, rows: list[bytes]
) -> None:
    sent = among(
        rows, [json.dumps(dict(zip(EVENT, row, strict=True))).encode() for row in GOOD_EVENTS]
    )
    file = folder / "log.json"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(sent))
    found = parsed(spark, file, events, "json")
    assert len(found) == sum(
        line.decode(errors="replace").strip("\ufeff \t") != "" for line in sent
    )
    assert good_ones(found, *EVENT) == [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]


micros = st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**17), 10**18)


@hostile
@given(
    rows=batches(
        st.tuples(st.binary(max_size=6), st.binary(max_size=6), st.floats(), st.none() | micros)
    )
)
def test_a_catalogue_in_parquet_of_any_bits(spark: SparkSession, folder: Path, rows: list) -> None:
    good = [(f"good {n}".encode(), b"Chair", 12.5, int(TEN.timestamp()) * 10**6) for n in range(5)]
    item, title, price, seen = zip(*among(rows, good), strict=True)
    columns = {
        "item_id": utf8(item),
        "title": utf8(title),
        "price": pa.array(price, pa.float64()),
        "first_seen_at": pa.array(seen, pa.timestamp("us", "UTC")),
        # Names that Spark, or the code, has a use of its own for.
        "_metadata": utf8(title),
        "a`b": utf8(title),
        "source": pa.array(title),
        "brand": pa.array(title),
    }
    pq.write_table(pa.table(columns), folder / "shop.parquet")
    found = parsed(spark, folder / "shop.parquet", ingest.parse_items, "parquet")
    assert len(found) == len(rows) + len(good)
    assert good_ones(found, *ITEM) == [(f"good {n}", "Chair", 12.5, True, TEN) for n in range(5)]


def utf8(values: Sequence[bytes]) -> pa.Array:
    """Bytes under the type of text; nothing sees to it that they are UTF-8."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def test_times_at_the_edges(spark: SparkSession, tmp_path: Path) -> None:
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
    found = parsed(spark, file, events)
    assert {json.loads(row["row"])["event_time"]: row["reason"] for row in found} == expected


def test_a_header_of_any_names(spark: SparkSession, tmp_path: Path) -> None:
    names = ["a`b", "_metadata", "a.b", "source", "row", "title", "", "\x00", "İ"]
    for header in (["item_id", *names, "price"], ["item_id", *names, *names, "price"]):
        file = table(tmp_path / "shop.csv", header, [("A", *(len(header) - 2) * ["x"], "3")])
        assert taken(parsed(spark, file, ingest.parse_items), "item_id", "price") == [("A", 3.0)]


def test_json_by_other_names_and_over_several_lines(spark: SparkSession, tmp_path: Path) -> None:
    file = tmp_path / "shop.json"
    file.write_text(
        '{"sku": "A", "title": 1}\n[{"sku": "B"},\n{"sku": "C", "name": {"x": 1}},\n{"sku": 1, "sku": 2}\n'
    )
    columns = {"item_id": "sku", "title": "name", "attributes.no": "title"}
    found = parsed(spark, file, ingest.parse_items, "json", columns=columns)
    assert sorted(taken(found, "item_id", "title", "attributes")) == [
        ("A", None, [("no", "1")]),
        ("C", '{"x":1}', []),
    ]
    assert [row["reason"] for row in found if row["reason"]] == 2 * ["the row isn't well formed"]

    file.write_text('[{"sku": "A",\n"title": 1},\n{"sku": "B"}]\n')
    columns, several = {"item_id": "sku"}, {"multiLine": "true"}
    found = parsed(spark, file, ingest.parse_items, "json", columns=columns, options=several)
    assert sorted(taken(found, "item_id", "title")) == [("A", "1"), ("B", None)]
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


def test_a_byte_order_mark_is_no_part_of_the_first_row(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text("\ufeffitem_id\nA\n")
    (tmp_path / "shop.json").write_text('\ufeff{"item_id": "A"}\n')
    for format, options in (("csv", {}), ("json", {}), ("json", {"multiLine": "true"})):
        found = parsed(
            spark, tmp_path / f"shop.{format}", ingest.parse_items, format, options=options
        )
        assert taken(found, "item_id") == [("A",)], (format, options)


def test_a_file_whose_name_is_a_pattern_that_finds_nothing(
    spark: SparkSession, tmp_path: Path
) -> None:
    table(tmp_path / "log" / "log [12]{a,b}.csv", EVENT, GOOD_EVENTS)
    found = parsed(spark, tmp_path / "log", events)
    assert good_ones(found, *EVENT) == [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]


@pytest.mark.parametrize("path", ["nosuch://place/file", "{a", "a:b:c", "", "\x00"])
@pytest.mark.parametrize("format", ["csv", "json", "parquet", "delta"])
def test_a_path_that_leads_nowhere_is_one_line(spark: SparkSession, format: str, path: str) -> None:
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


def test_photo_names_of_any_kind(spark: SparkSession, tmp_path: Path) -> None:
    content = {f"{item}.jpg": item.encode() for item in IDS if fits(item)} | {
        "none%41 +.jpg": b"",
        "x.1.jpg": b"x 1",
    }
    # Where a name means something to a file system or an address, one of these is what would be read instead.
    content |= {
        "zip::http:x.jpg": b"zip",
        "http::x.jpg": b"http",
        "a": b"bait",
        "zip": b"bait",
        "http": b"bait",
    }
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (tmp_path / "bait.jpg").write_bytes(b"bait")
    # Times that pandas can't hold.
    os.utime(folder / "a#b.jpg", (1e10, 1e10))
    os.utime(folder / "a+b.jpg", (-1e10, -1e10))
    files = reader.photo_files(spark, PhotoSource(folder=str(folder)))
    rows = {
        row["uri"].rsplit("/", 1)[1]: row["item_id"]
        for row in files.select("uri", "item_id").collect()
    }
    assert {name: rows[f"{name}.jpg"] for name in filter(fits, IDS)} == {
        name: name if fits_pattern(name) else None for name in filter(fits, IDS)
    }
    changed = ingest.changed_photos(
        files.select(
            F.coalesce("item_id", "uri").alias("item_id"), F.lit(0).alias("position"), "uri"
        ),
        files,
        spark.createDataFrame([], schemas.PHOTOS.schema),
        keep=True,
    )
    photos = ingest.read_photos(changed, len(content), 2, PhotoSource()).toArrow().to_pylist()
    assert {
        photo["uri"].rsplit("/", 1)[1]: (photo["image"], photo["reason"]) for photo in photos
    } == {name: (data, None) for name, data in content.items()}


def test_a_photo_position_that_is_none(spark: SparkSession, tmp_path: Path) -> None:
    for position in ("front", "-1", "99999999999", "7"):
        (tmp_path / f"A_{position}.jpg").write_bytes(b"x")
    files = reader.photo_files(
        spark, PhotoSource(folder=str(tmp_path), file_name=r"(.+)_(.+)\.jpg")
    )
    rows = ingest.photo_rows(files, spark.createDataFrame([("A",)], "item_id STRING")).collect()
    bad = "the position in the file name is not a number"
    assert Counter((row["position"], row["reason"]) for row in rows) == {
        (None, bad): 2,
        (-1, bad): 1,
        (7, None): 1,
    }
    with pytest.raises(UsageError, match=r"ingest\.photos\.file_name: .*Unknown inline modifier"):
        reader.photo_files(
            spark, PhotoSource(folder=str(tmp_path), file_name=r"(?P<item>.+)_(?P<position>.+)")
        )


def test_one_long_title_does_not_widen_the_others() -> None:
    batch = pd.DataFrame({"text": [f"chair {n}" for n in range(2_000)] + ["x" * 100_000]})
    batch[["item_id", "representation", "content_sha256", "fallback"]] = ("A", "title", "", False)
    encode = embed._embedder_udf(embed.EmbedSettings(encoder="fake"))
    tracemalloc.start()
    (made,) = encode(iter([batch]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == 2_001
    assert most < 50_000_000


def test_one_item_and_no_event_then_one(spark: SparkSession, tmp_path: Path) -> None:
    items = spark.createDataFrame([("../i", "A lamp")], "item_id STRING, title STRING")
    nothing = {
        name: spark.createDataFrame([], found.schema) for name, found in schemas.TABLES.items()
    }
    texts = embed.item_texts(items, nothing["item_captions"], nothing["captions"])
    pending = embed.pending_texts(texts, nothing["embeddings"], "fake", 256)
    vectors = embed.embed(pending, "fake", embed.EmbedSettings(encoder="fake"))
    rows = index.index_rows(vectors, texts, "title", "fake").toArrow()
    built = build_index(rows, "title", "fake", tmp_path, ann_min_items=20_000)
    open_searcher = ship(spark, built, 1.0, Searcher.open)
    usual = profiles.ProfileSettings()
    assert profiles.histories(nothing["interactions"], items, usual).isEmpty()
    event = ("e", "../u", "../i", "view", TEN, TEN.date())
    log = spark.createDataFrame([event], nothing["interactions"].schema)
    known = profiles.with_embedding(profiles.histories(log, items, usual), "title", open_searcher)
    lists = recommend.recommend(
        known, open_searcher, recommend.all_items_except(open_searcher(), []), 3, None
    ).collect()
    assert [(row["user_id"], row["items"]) for row in lists] == [("../u", [])]


BAD_ITEMS = [
    ("", "x", "1", "", ""),
    ("nan", "x", "NaN", "", ""),
    ("minus", "x", "-1", "", ""),
    ("never", "x", "1", "", "0000-00-00"),
    ("year", "x", "1", "", "+10000-01-01"),
]
CAPTION = "<script>alert('caption')</script><img src=x onerror=alert(1)> & a chair"


def shop(place: Path) -> tuple[str, ...]:
    """Catalogue, log and photos of all that is hostile and of a few good ones; the settings that read them."""
    strange = [(item, TITLES[n % len(TITLES)], "", "", "") for n, item in enumerate(IDS)]
    table(place / "shop.csv", ITEM, among([*strange, *BAD_ITEMS], GOOD_ITEMS))
    log = [
        (user, item, "view", "2025-01-01")
        for user, item in zip(IDS, (*IDS[1:], IDS[0]), strict=True)
    ]
    log += [(user, "good 1", user, TIMES[n % len(TIMES)]) for n, user in enumerate(IDS)]
    log += [(user, "good 2", "view", time) for user, time in zip(IDS, TIMES, strict=False)]
    log += [
        (f"good user {n}", f"good {n + more}", "view", f"2025-02-0{1 + more}")
        for n in range(4)
        for more in (0, 2)
    ]
    # A name that Spark would take for a pattern, and a file that this pattern finds.
    table(place / "log" / "log [12]{a,b}*.csv", EVENT, log)
    table(place / "log" / "log 1a.csv", EVENT, [("good user 4", "good 7", "view", "2025-02-01")])
    (place / "photos").mkdir()
    for n, (item, *_) in enumerate(GOOD_ITEMS):
        (place / "photos" / f"{item}.png").write_bytes(png((20 * n, 40, 90)))
    for n, item in enumerate(filter(fits, IDS)):
        kinds = (png((90, 3 * n, 40)), b"<script>alert('photo')</script>", b"")
        (place / "photos" / f"{item}.png").write_bytes(kinds[n % 3])
    (place / "bait.png").write_bytes(png((1, 2, 3)))
    table(
        place / "captions.csv",
        ("item_id", "text"),
        [
            ("good 1", CAPTION),
            ("../../etc/passwd", CAPTION),
            ("good 9", "of no item"),
            ("'; DROP TABLE items; --", "  "),
        ],
    )
    return (
        f"ingest.items.path=[{place}/shop.csv]",
        f"ingest.interactions.path=[{place}/log]",
        "recommend.k=3",
        f"ingest.photos.folder={place}/photos",
        "caption.max_failed_share=1",
    )


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    image = Image.new("RGB", (8, 8), colour)
    image.putpixel((0, 0), (255, 255, 255))  # a photo of one colour all over shows nothing
    image.save(out, "PNG")
    return out.getvalue()


def everything(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_all_the_way(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    run = pipeline(tmp_path, *shop(tmp_path))
    before = everything(tmp_path)
    (ingested,) = run.run(["ingest"])
    imported = run.import_captions(Source(path=(str(tmp_path / "captions.csv"),)))
    assert (imported.ok, imported.failed) == (2, 2)
    outcomes = run.run(["caption", "embed", "index", "profiles", "recommend", "publish", "report"])
    assert [outcome.status for outcome in outcomes] == 7 * ["ok"]

    def rows(table: schemas.Table) -> list[dict]:
        return run.tables.read(table).toArrow().to_pylist()

    # What was taken is what was sent, and the rest has reasons.
    counts = {
        name: json.loads(ingested.details[name]) for name in ("items", "interactions", "photos")
    }
    for found in counts.values():
        assert found["in"] == found["ok"] + found["rejected"] + found["skipped"]
    items = {row["item_id"]: row for row in rows(schemas.ITEMS)}
    assert set(items) == {*IDS, *(item for item, *_ in GOOD_ITEMS)}
    assert (counts["items"]["ok"], counts["items"]["rejected"]) == (len(items), len(BAD_ITEMS))
    assert [tuple(items[item][name] for name in ITEM) for item, *_ in GOOD_ITEMS] == [
        (item, title, 12.5, True, TEN) for item, title, *_ in GOOD_ITEMS
    ]
    assert {f"{row['item_id']}.png": row["image"] for row in rows(schemas.PHOTOS)} == {
        path.name: data
        for path, data in before.items()
        if path.parent.name == "photos" and fits_pattern(path.name)
    }
    rejected = rows(schemas.REJECTED)
    assert sum(row["copies"] for row in rejected) == 2 + sum(
        found["rejected"] for found in counts.values()
    )
    assert all(row["reason"].strip() for row in rejected)

    # Good users have their lists.
    lists = {row["user_id"]: row["item_ids"] for row in rows(schemas.EXPORT_WIDE)}
    for n in range(5):
        assert len(set(lists[f"good user {n}"])) == 3
        seen = {"good 7"} if n == 4 else {f"good {n}", f"good {n + 2}"}
        assert set(lists[f"good user {n}"]) <= set(items) - seen

    # Nothing was touched or made elsewhere, and the page runs and asks for nothing.
    after = everything(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert {path.relative_to(tmp_path).parts[0] for path in after.keys() - before} == {
        "tables",
        "index",
        "report.html",
    }
    page = after[tmp_path / "report.html"].decode()
    assert "&lt;script&gt;alert(&#39;caption&#39;)&lt;/script&gt;" in page
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names and not [
        name for name in tags.attributes if name.startswith("on")
    ]
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
