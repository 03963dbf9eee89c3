"""The counts and examples of the report, from a few literal rows in every table."""

from datetime import datetime

import pytest
from shop import MakePipeline, item_row, photo_row, upsert

from vlm4rec_spark.report.figures import Figures
from vlm4rec_spark.storage import schemas
from vlm4rec_spark.storage.tables import Tables

AT = datetime(2025, 3, 3)
PHOTOS = [
    photo_row("a", b"shared"),
    photo_row("b", b"shared"),
    photo_row("c", b""),
    photo_row("d", b""),
    photo_row("e", b"own"),
]
SHA = {item_id: sha for item_id, _, _, _, sha, *_ in PHOTOS}


def caption(
    key: str, item_id: str, text: str | None, kind: str | None, error_class: str | None = None
) -> tuple:
    attributes = {"kind": kind, "mood": "calm"} if kind else None
    status = "failed" if text is None else "ok"
    made_with = (SHA[item_id], "describe.1", "llava@1")
    rest = (None, None, status, error_class, None, 1, AT, "r1")
    return (key, *made_with, text, attributes, *rest)


@pytest.fixture(scope="module")
def tables(pipeline: MakePipeline, tmp_path_factory) -> Tables:
    run = pipeline(tmp_path_factory.mktemp("figures"))
    upsert(run, schemas.ITEMS, [item_row(item_id) for item_id in SHA])
    upsert(run, schemas.PHOTOS, PHOTOS)
    captions = [
        caption("k1", "a", "A mug.", "Mug"),
        caption("k2", "e", "A cup.", None),
        caption("k3", "c", None, None, "empty"),
    ]
    upsert(run, schemas.CAPTIONS, captions)
    links = [("a", 0, "k1"), ("b", 0, "k1"), ("e", 0, "k2"), ("e", 1, "k1"), ("b", 1, "k3")]
    upsert(run, schemas.ITEM_CAPTIONS, links)
    rejected = [
        ("items shop.csv", "row 1", "no id: line 1", 2),
        ("items shop.csv", "row 0", "no id: line 7", 1),
        ("items shop.csv", "row 2", "no title", 1),
        ("photos", "row 3", "too large", 4),
    ]
    upsert(run, schemas.REJECTED, rejected)
    return run.tables


@pytest.fixture(scope="module")
def figures(tables: Tables) -> Figures:
    return Figures(tables, (), 10)


def test_rows_are_counted_by_table_and_by_status(figures: Figures):
    assert figures.counts("tables") == {"items": 5, "photos": 5}
    assert figures.counts("statuses") == {"ok": 2, "failed": 1}


def test_contents_that_several_items_share_are_counted_unless_they_are_empty(figures: Figures):
    assert figures.counts("shared") == {"photos": 2, "contents": 1}


def test_reasons_come_by_source_the_commonest_first_with_the_first_example(figures: Figures):
    reasons = {
        source: [(row["key"], row["rows"], row["example"]) for row in rows]
        for source, rows in figures.by_name("rejected").items()
    }
    assert reasons == {
        "items": [("no id", 3, "row 0"), ("no title", 1, "row 2")],
        "photos": [("too large", 4, "row 3")],
    }


def test_an_item_with_several_captions_counts_once(figures: Figures):
    assert figures.counts("captioned") == {"": 3}
    # A photo's caption counts once for each photo that has it.
    (kind,) = figures.by_name("values")["kind"]
    assert (kind["key"], kind["rows"]) == ("mug", 3)
    assert figures.by_name("values").keys() == {"kind"}


def test_a_caption_is_shown_with_its_first_photo_and_a_failure_with_each(figures: Figures):
    samples = {row["key"]: tuple(row["photo"]) for row in figures.of("samples")}
    assert samples == {"k1": ("k1", "a", 0), "k2": ("k2", "e", 0)}
    assert figures.counts("failed") == {"empty": 2}
    failures = [tuple(row["photo"]) for row in figures.by_name("failures")["empty"]]
    assert failures == [("k3", "c", 0), ("k3", "d", 0)]


def test_as_many_keys_are_read_as_are_asked_for(tables: Tables):
    few = Figures(tables, (), 1)
    assert [row["key"] for row in few.by_name("rejected")["items"]] == ["no id"]
    assert len(few.of("samples")) == len(few.by_name("failures")["empty"]) == 1
