"""Input that nobody should send: nothing crashes, counts add up, and the good rows among it come out unharmed.

Hypothesis makes whole batches of rows, since a Spark job costs a second however few rows it has.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm4rec_spark import schemas, sources
from vlm4rec_spark.errors import RunError
from vlm4rec_spark.sources import PhotoSource, Source
from vlm4rec_spark.stages import ingest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from vlm4rec_spark.pipeline import Pipeline

NOW = datetime(2025, 6, 1, tzinfo=UTC)
TEN = datetime(2025, 1, 1, 10, tzinfo=UTC)

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
    "-rf",
    "--help",
    "~",
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
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://localhost/x",
    "'; DROP TABLE items; --",
    "`items`",
    "*",
    "?",
    "[a-z]",
    "{a,b}",
    "$(id)",
    "${jndi:ldap://x}",
    "{{7*7}}",
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
"""All different, though some only by case, by a space or by how an accent is written."""

TITLES = (
    "<script>alert('title')</script>",
    '" onerror="alert(1)',
    "&lt;img src=x onerror=alert(1)&gt;",
    "{% raw %}{{7*7}}",
    "",
    "  ",
    "\x00\x01\x02",
    "\u202eabc",
    "=HYPERLINK(1)",
    "a\nb\rc\r\nd",
    "&#" + "9" * 5_000 + ";",
    "<" * 100_000,
    "x" * 1_000_000,
    "word " * 20_000,
)

PRICES = ("", " ", "NaN", "Infinity", "-1", "-0.0", "1e400", "1e308", "4.9e-324", "1,5", "1_000", "5d", "0x1p3", "free")

TIMES = (
    "",
    "0000-01-01",
    "0001-01-01",
    "0001-01-03",
    "1582-10-10",
    "1969-12-31T23:59:59Z",
    "9999-12-31T23:59:59Z",
    "10000-01-01",
    "+10000-01-01",
    "+294247-01-10T04:00:54.775807Z",
    "-290308-12-21T19:59:05.224193Z",
    "-5",
    "-0005-01-01",
    "2025-02-30",
    "2025-01-01T25:00:00Z",
    "2025-01-01T10:00:00+99:00",
    "10:00",
    "T10:00",
    "now",
    "0",
    "-1",
    "9" * 10,
    "9" * 13,
    "9223372036854775807",
    "9" * 400,
    "1e9",
    "1735725600.5",
    "yesterday",
)

hostile = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    # No shrinking, at a Spark job for each of its steps.
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
texts = st.text(max_size=8)
ids = st.sampled_from(IDS) | texts
titles = st.sampled_from(TITLES) | texts
prices = st.sampled_from(PRICES) | st.floats().map(repr) | texts
times = st.sampled_from(TIMES) | st.datetimes().map(datetime.isoformat) | st.integers().map(str) | texts


def batches(row: st.SearchStrategy) -> st.SearchStrategy[list]:
    return st.lists(row, min_size=50, max_size=100)


def among(rows: Sequence, good: Sequence) -> list:
    """The rows with the good ones spread among them, one of them first and one last."""
    spread = list(rows)
    for place, row in enumerate(good):
        spread.insert(len(rows) * place // (len(good) - 1) + place, row)
    return spread


def parsed(spark: SparkSession, path: Path, format: str, parse: Callable[[DataFrame], DataFrame]) -> list[dict]:
    """Every row that was read, each one taken, a duplicate, or with a reason."""
    raw = sources.read(spark, "ingest.x", Source(path=(str(path),), format=format))
    # Through Arrow, as in the later stages: it can't hold text that isn't UTF-8, nor Python a time of the year 10000.
    rows = parse(raw).toArrow().to_pylist()
    for row in rows:
        assert row["reason"] is None or row["reason"].strip()
        assert row["row"] and isinstance(json.loads(row["row"]), dict)
    return rows


def events(raw: DataFrame) -> DataFrame:
    return ingest.parse_interactions(raw, NOW)


def taken(rows: Iterable[dict], *columns: str) -> list[tuple]:
    return [tuple(row[name] for name in columns) for row in rows if row["reason"] is None and not row["duplicate"]]


def table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """A CSV file, every cell in quotes."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([columns, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.getvalue().encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


ITEM = ("item_id", "title", "price", "available", "first_seen_at")
GOOD_ITEMS = [(f"good {n}", f'Chair, "{n}"\n', "12.50", "yes", "2025-01-01T10:00:00Z") for n in range(5)]
EVENT = ("user_id", "item_id", "event_type", "event_time")
GOOD_EVENTS = [(f"good {n}", f"chair {n}", "view", "2025-01-01T12:00:00+02:00") for n in range(5)]


@hostile
@given(rows=batches(st.tuples(ids, titles, prices, st.sampled_from(["", "no", "T", "maybe", "\x00"]), times)))
def test_a_catalogue_of_any_text(spark: SparkSession, folder: Path, rows: list) -> None:
    sent = among(rows, GOOD_ITEMS)
    got = parsed(spark, table(folder / "shop.csv", ITEM, sent), "csv", ingest.parse_items)
    # To the letter, the rejected ones too: no id is trimmed, folded or cut.
    assert Counter((row["item_id"], row["title"]) for row in got) == Counter(
        (a or None, b or None) for a, b, *_ in sent
    )
    good = [row for row in taken(got, *ITEM) if str(row[0]).startswith("good ")]
    assert sorted(good) == [(item, title, 12.5, True, TEN) for item, title, *_ in GOOD_ITEMS]
    assert all(price is None or 0 <= price < float("inf") for (price,) in taken(got, "price"))
    assert {item for (item,) in taken(got, "item_id")} <= {row[0] for row in sent} - {""}


@hostile
@given(rows=batches(st.tuples(ids, ids, st.sampled_from(["view", "", "\x00"]) | texts, times)))
def test_a_log_of_any_text(spark: SparkSession, folder: Path, rows: list) -> None:
    sent = among(rows, GOOD_EVENTS)
    got = parsed(spark, table(folder / "log.csv", EVENT, sent), "csv", events)
    assert Counter((row["user_id"], row["item_id"]) for row in got) == Counter(
        (a or None, b or None) for a, b, *_ in sent
    )
    good = [row for row in taken(got, *EVENT) if str(row[0]).startswith("good ")]
    assert sorted(good) == [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]
    for time, date in taken(got, "event_time", "event_date"):
        assert datetime(1, 1, 3, tzinfo=UTC) <= time <= NOW and date == time.date()


keys = (
    st.sampled_from([*EVENT, "event_id", "EVENT_TIME", "_metadata", "_corrupt_record", "row", "a`b", "a.b", ""]) | texts
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ids | times,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
lines = st.one_of(
    st.dictionaries(keys, values, max_size=5).map(lambda row: json.dumps(row).encode()),
    st.dictionaries(keys, values, max_size=5).map(lambda row: json.dumps(row, ensure_ascii=False)[:-1].encode()),
    (st.none() | st.booleans() | st.integers() | texts).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")),
    st.sampled_from(
        [
            b'{"user_id": "u", "user_id": "v"}',
            b'{"User_id": "u", "user_id": "v"}',
            b'{"user_id": "u"} {"user_id": "v"}',
            b"[" * 2_000,
            b'{"a":' * 900 + b"1" + b"}" * 900,
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
def test_a_log_in_json_lines_among_any_bytes(spark: SparkSession, folder: Path, rows: list[bytes]) -> None:
    good = [json.dumps(dict(zip(EVENT, row, strict=True))).encode() for row in GOOD_EVENTS]
    sent = among(rows, good)
    file = folder / "log.json"
    file.write_bytes(b"\n".join(sent) + b"\n")
    got = parsed(spark, file, "json", events)
    assert len(got) == sum(line.decode(errors="replace").strip("\ufeff \t") != "" for line in sent)
    found = [row for row in taken(got, *EVENT) if str(row[0]).startswith("good ")]
    assert sorted(found) == [(user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS]


micros = st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**17), 10**18)


@hostile
@given(rows=batches(st.tuples(st.binary(max_size=6), st.binary(max_size=6), st.floats(), st.none() | micros)))
def test_a_catalogue_in_parquet_with_any_bits(spark: SparkSession, folder: Path, rows: list) -> None:
    good = [(f"good {n}".encode(), b"Chair", 12.5, int(TEN.timestamp()) * 10**6) for n in range(5)]
    item, title, price, seen = zip(*among(rows, good), strict=True)
    content = {
        # Text by its type, but nothing sees to it that it is UTF-8.
        "item_id": _text(item),
        "title": _text(title),
        "price": pa.array(price, pa.float64()),
        "first_seen_at": pa.array(seen, pa.timestamp("us", "UTC")),
        "_metadata": _text(title),
        "a`b": _text(title),
        "source": pa.array(title, pa.binary()),
    }
    pq.write_table(pa.table(content), folder / "shop.parquet")
    got = parsed(spark, folder / "shop.parquet", "parquet", ingest.parse_items)
    assert len(got) == len(rows) + len(good)
    found = [row for row in taken(got, "item_id", "title", "price", "first_seen_at") if str(row[0]).startswith("good ")]
    assert sorted(found) == [(f"good {n}", "Chair", 12.5, TEN) for n in range(5)]


def _text(values: Sequence[bytes]) -> pa.Array:
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


@hostile
@given(data=st.binary(max_size=2_000), bits=st.lists(st.sampled_from([b'"', b",", b"\n", b"\r", b"\x00", b"\xff"])))
def test_a_log_in_csv_that_ends_in_any_bytes(spark: SparkSession, folder: Path, data: bytes, bits: list[bytes]) -> None:
    file = table(folder / "torn.csv", EVENT, GOOD_EVENTS)
    file.write_bytes(file.read_bytes() + b"".join(bits) + data)
    got = parsed(spark, file, "csv", events)
    assert [row for row in sorted(taken(got, *EVENT)) if row[0].startswith("good ")] == [
        (user, item, "view", TEN) for user, item, *_ in GOOD_EVENTS
    ]


def test_photo_names_of_any_kind(spark: SparkSession, tmp_path: Path) -> None:
    content = {f"{item}.jpg": item.encode() for item in IDS if fits(item)} | {"none%41 +.jpg": b"", "x.1.jpg": b"x 1"}
    # What a name means to a file system, a shell or an address: each of these files would be read for another one.
    content |= {"a": b"bait", "up": b"bait", "http": b"bait", "zip::http:x.jpg": b"zip", "http::x.jpg": b"http"}
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (tmp_path / "bait.jpg").write_bytes(b"bait")
    # Times that pandas can't hold.
    os.utime(folder / "a#b.jpg", (1e10, 1e10))
    os.utime(folder / "a+b.jpg", (-1e10, -1e10))
    files = sources.photo_files(spark, PhotoSource(folder=str(folder)))
    rows = files.select("uri", "item_id", "position").collect()
    assert {row["uri"].rsplit("/", 1)[1] for row in rows} == set(content)
    assert {row["item_id"] for row in rows} >= {
        item for item in IDS if fits(item) and "\n" not in item and item != "\u2028"
    }
    changed = ingest.changed_photos(
        files.select("item_id", "position", "uri"), files, spark.createDataFrame([], schemas.PHOTOS.schema)
    )
    photos = ingest.read_photos(changed.fillna({"item_id": "none", "position": 0})).toArrow().to_pylist()
    assert {photo["uri"].rsplit("/", 1)[1]: (photo["image"], photo["reason"]) for photo in photos} == {
        name: (data, None) for name, data in content.items()
    }


def fits(item: str) -> bool:
    """It can be the beginning of a file's name, and of one that Spark doesn't take for hidden."""
    return not set("/\0") & set(item) and len(item) < 200 and item[0] not in "._"


@pytest.mark.parametrize("name", ["front", "-1", "99999999999"])
def test_a_position_that_is_none(spark: SparkSession, tmp_path: Path, name: str) -> None:
    (tmp_path / f"A_{name}.jpg").write_bytes(b"x")
    files = sources.photo_files(spark, PhotoSource(folder=str(tmp_path), file_name=r"(.+)_(.+)\.jpg"))
    items = spark.createDataFrame([("A",)], "item_id STRING")
    assert [row["reason"] for row in ingest.photo_rows(files, items).collect()] == [
        "the position in the file name is not a number"
    ]


BAD_ITEMS = [
    ("", "x", "1", "", ""),
    ("nan", "x", "NaN", "", ""),
    ("minus", "x", "-1", "", ""),
    ("year", "x", "1", "", "+10000-01-01"),
    ("null time", "x", "1", "", "0000-00-00"),
]
SHOP = [(f"good {n}", f"A good chair of kind {n}", "12.50", "yes", "2025-01-01T10:00:00Z") for n in range(8)]


def shop(place: Path) -> tuple[str, ...]:
    """Catalogue, log and photos of all that is hostile and of a few good ones; the settings that read them."""
    strange = [(item, TITLES[n % len(TITLES)], "", "", "") for n, item in enumerate(IDS)]
    table(place / "shop.csv", ITEM, among([*strange, *BAD_ITEMS], SHOP))
    log = [(user, item, "view", "2025-01-01") for user, item in zip(IDS, (*IDS[1:], IDS[0]), strict=True)]
    log += [(user, "good 1", user, TIMES[n % len(TIMES)]) for n, user in enumerate(IDS)]
    log += [(user, "good 2", "view", time) for user, time in zip(IDS, TIMES, strict=False)]
    log += [(f"good user {n}", f"good {n + more}", "view", f"2025-02-0{1 + more}") for n in range(4) for more in (0, 2)]
    # A name that Spark would take for a pattern, and a file that this pattern finds instead.
    table(place / "log" / "log [12]{a,b}?*.csv", EVENT, log)
    table(place / "log" / "log 1a.csv", EVENT, [("good user 4", "good 7", "view", "2025-02-01")])
    (place / "photos").mkdir()
    for n, (item, *_) in enumerate(SHOP):
        (place / "photos" / f"{item}.png").write_bytes(png((20 * n, 40, 90)))
    for n, item in enumerate(filter(fits, IDS)):
        (place / "photos" / f"{item}.png").write_bytes(
            (png((90, 3 * n, 40)), b"<script>alert('photo')</script>", b"")[n % 3]
        )
    (place / "bait.png").write_bytes(png((1, 2, 3)))
    return (
        f"ingest.items.path=[{place}/shop.csv]",
        f"ingest.interactions.path=[{place}/log]",
        f"ingest.photos.folder={place}/photos",
        "caption.max_failed_share=1",
        "recommend.k=3",
    )


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


CAPTION = "<script>alert('caption')</script><img src=x onerror=alert(1)> & a chair"


def test_all_the_way(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    arrangement = shop(tmp_path)
    captions = table(
        tmp_path / "captions.csv",
        ("item_id", "text"),
        [
            ("good 1", CAPTION),
            ("../../etc/passwd", CAPTION),
            ("good 9", "no such item"),
            ("'; DROP TABLE items; --", "  "),
        ],
    )
    before = everything(tmp_path)
    run = pipeline(tmp_path, *arrangement)
    (ingested,) = run.run(["ingest"])
    imported = run.import_captions(Source(path=(str(captions),)))
    assert (imported.ok, imported.failed) == (2, 2)
    outcomes = run.run(["caption", "embed", "index", "profiles", "recommend", "export", "report"])
    assert [outcome.status for outcome in outcomes] == 7 * ["ok"]

    counts = {name: json.loads(ingested.details[name]) for name in ("items", "interactions", "photos")}
    for found in counts.values():
        assert found["in"] == found["ok"] + found["rejected"] + found["skipped"]
    items = {row["item_id"]: row for row in run.tables.read(schemas.ITEMS).toArrow().to_pylist()}
    assert set(items) == {*IDS, *(item for item, *_ in SHOP)}
    assert counts["items"] == {
        "in": len(items) + len(BAD_ITEMS),
        "ok": len(items),
        "rejected": len(BAD_ITEMS),
        "skipped": 0,
    }
    assert [tuple(items[row[0]][name] for name in ITEM) for row in SHOP] == [
        (item, title, 12.5, True, TEN) for item, title, *_ in SHOP
    ]
    photos = run.tables.read(schemas.PHOTOS).select("item_id", "image").toArrow().to_pylist()
    assert {f"{row['item_id']}.png": row["image"] for row in photos} == {
        file.name: file.read_bytes() for file in (tmp_path / "photos").iterdir() if fits_pattern(file.name)
    }
    rejected = run.tables.read(schemas.REJECTED).toArrow().to_pylist()
    assert sum(row["copies"] for row in rejected) == 2 + sum(found["rejected"] for found in counts.values())
    assert all(row["reason"] for row in rejected)

    lists = {row["user_id"]: row["item_ids"] for row in run.tables.read(schemas.EXPORT_WIDE).toArrow().to_pylist()}
    for n in range(4):
        assert len(set(lists[f"good user {n}"])) == 3
        assert not {f"good {n}", f"good {n + 2}"} & set(lists[f"good user {n}"])
    assert len(lists["good user 4"]) == 3
    assert all(set(found) <= set(items) for found in lists.values())

    assert {path: data for path, data in everything(tmp_path).items() if path in before} == before
    made = {path.relative_to(tmp_path).parts[0] for path in set(everything(tmp_path)) - set(before)}
    assert made == {"tables", "index", "report.html"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(&#39;caption&#39;)&lt;/script&gt;" in page
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names and not [name for name in tags.attributes if name.startswith("on")]
    assert all(target.startswith(("#", "data:image/jpeg;base64,")) for target in tags.targets)


def everything(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def fits_pattern(name: str) -> bool:
    """`.` doesn't match the end of a line."""
    return "\n" not in name and "\u2028" not in name


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets |= {value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")}


def test_one_item_and_no_event_then_one_user(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    table(tmp_path / "shop.csv", ("item_id", "title"), [("'; DROP TABLE items; --", "A lamp")])
    table(tmp_path / "log" / "1.csv", EVENT, [])
    arrangement = (f"ingest.items.path=[{tmp_path}/shop.csv]", f"ingest.interactions.path=[{tmp_path}/log]")
    run = pipeline(tmp_path, *arrangement, "representation=title")
    ingested, *_ = run.run(["ingest", "embed", "index"])
    assert json.loads(ingested.details["interactions"]) == {"in": 0, "ok": 0, "rejected": 0, "skipped": 0}
    with pytest.raises(RunError, match="no user has an event that counts"):
        run.run(["profiles"])
    table(tmp_path / "log" / "2.csv", EVENT, [("../u", "'; DROP TABLE items; --", "view", "2025-01-01")])
    run.run(["ingest", "profiles", "recommend"])
    lists = run.tables.read(schemas.RECOMMENDATIONS).collect()
    assert [(row["user_id"], row["items"]) for row in lists] == [("../u", [])]
