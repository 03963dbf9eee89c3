"""Caption: what is captioned, how often the model is called, and what a photo or a model that fails leaves behind."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from vlm4rec_spark import schemas
from vlm4rec_spark.caption.worker import caption_batch
from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioners.fake import FakeCaptioner
from vlm4rec_spark.sources import Source

if TYPE_CHECKING:
    from vlm4rec_spark.pipeline import Pipeline


def photo(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, GREEN, BLUE, GREY = (photo(colour) for colour in ("red", "green", "blue", "grey"))
HTML = b"<!DOCTYPE html><html><body>404</body></html>"
GREEN_TEXT = "A thing of red 0, green 4 and blue 0."


def batch(faults: str, *images: bytes) -> list[tuple[str, str | None, int]]:
    """status, error_class and attempts per photo of one batch."""
    rows = [{"caption_key": str(n), "image_sha256": str(n), "image": image} for n, image in enumerate(images)]
    results = caption_batch(FakeCaptioner(faults), rows, "Describe.", 672)
    assert [result["caption_key"] for result in results] == [row["caption_key"] for row in rows]
    return [(result["status"], result["error_class"], result["attempts"]) for result in results]


def test_a_bad_photo_is_a_row_with_its_error_class() -> None:
    assert batch("none", GREEN, b"", HTML, GREEN[:-40], b"\x00" * 99) == [
        ("ok", None, 1), ("failed", "empty", 1), ("failed", "not_an_image", 1), ("failed", "truncated", 1),
        ("failed", "not_an_image", 1),
    ]  # fmt: skip


def test_a_model_that_raises_costs_only_the_culprit() -> None:
    assert batch("raise", GREEN, RED, BLUE) == [("ok", None, 2), ("failed", "RuntimeError", 2), ("ok", None, 2)]


def test_an_empty_answer_is_rejected() -> None:
    assert batch("empty", GREEN, BLUE) == [("ok", None, 1), ("rejected", "empty_caption", 1)]


def store(run: Pipeline, images: dict[str, bytes], price: float = 1.0) -> None:
    """Items and their photos, straight into the tables."""
    spark, now = run.spark, datetime(2025, 1, 1)
    items: list[Any] = [
        (item, f"Title {item}", None, None, None, None, price, None, True, None, now) for item in [*images, "bare"]
    ]
    run.tables.upsert(schemas.ITEMS, spark.createDataFrame(items, schemas.ITEMS.schema))
    rows = [
        (item, 0, None, image, hashlib.sha256(image).hexdigest(), len(image), None) for item, image in images.items()
    ]
    run.tables.upsert(schemas.PHOTOS, spark.createDataFrame(rows, schemas.PHOTOS.schema))


def captions(run: Pipeline) -> dict[str, str]:
    """Caption in force by item."""
    links = run.tables.read(schemas.ITEM_CAPTIONS)
    rows = links.join(run.tables.read(schemas.CAPTIONS), on="caption_key", how="inner").collect()
    return {row["item_id"]: row["caption"] for row in rows}


def test_each_content_is_captioned_once_and_only_what_changed_again(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    model = f"caption.model.model=count={calls}"
    images = {"a": GREEN, "twin": GREEN, "b": BLUE, "html": HTML, "empty": b""}
    run = pipeline(tmp_path, model, "caption.max_failed_share=0.5")

    def caption(run: Pipeline) -> tuple[int, int, int, int]:
        """Calls of the model, and rows ok, failed and skipped, of one run of the stage."""
        before = calls.stat().st_size if calls.exists() else 0
        outcome = run.run(["caption"])[0]
        return (calls.stat().st_size - before) // 2, outcome.ok, outcome.failed, outcome.skipped

    store(run, images)
    # Five photos of four contents: the model sees the two that are photos.
    assert caption(run) == (2, 2, 2, 1)
    assert captions(run) == {
        "a": GREEN_TEXT, "twin": GREEN_TEXT, "b": "A thing of red 0, green 0 and blue 7.",
    }  # fmt: skip
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    assert len(rows) == 4
    failed = rows[hashlib.sha256(HTML).hexdigest()]
    assert (failed["status"], failed["error_class"], failed["caption"]) == ("failed", "not_an_image", None)
    assert rows[hashlib.sha256(b"").hexdigest()]["error_class"] == "empty"
    assert rows[hashlib.sha256(GREEN).hexdigest()]["prompt_id"] == "describe.1"

    # A price and one photo change.
    store(run, images | {"a": GREY}, price=2.0)
    assert caption(run) == (1, 1, 0, 4)
    assert captions(run)["a"] == "A thing of red 4, green 4 and blue 4."
    assert captions(run)["twin"] == GREEN_TEXT

    # Another prompt is other content.
    prompt = tmp_path / "short.1.txt"
    prompt.write_text("Say it in one word.")
    other = pipeline(tmp_path, model, "caption.max_failed_share=0.5", f"caption.prompt={prompt}")
    assert caption(other) == (3, 3, 2, 0)

    # The old prompt's captions are still there: the same run again calls nobody.
    assert caption(run) == (0, 0, 0, 5)


def test_imported_captions_take_the_place_of_the_model(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    run = pipeline(tmp_path)
    store(run, {"a": GREEN, "b": BLUE})
    file = tmp_path / "captions.csv"
    file.write_text('sku,text\na,"  A green chair, rather old "\nbare,Seen by nobody\ngone,Lost\nb,\na,A second text\n')
    source = Source(path=(str(file),), columns={"item_id": "sku"})
    outcome = run.import_captions(source)
    assert (outcome.ok, outcome.failed, outcome.skipped) == (2, 3, 0)
    assert captions(run) == {"a": "A green chair, rather old", "bare": "Seen by nobody"}
    refused = {json.loads(row["row"])["sku"]: row["reason"] for row in run.tables.read(schemas.REJECTED).collect()}
    assert refused == {
        "gone": "no such item in the catalogue", "b": "the text is empty", "a": "the item has another text",
    }  # fmt: skip

    # The stage describes what is left, and leaves what was imported alone.
    outcome = run.run(["caption"])[0]
    assert (outcome.ok, outcome.skipped) == (1, 0)
    assert captions(run) == {
        "a": "A green chair, rather old", "bare": "Seen by nobody", "b": "A thing of red 0, green 0 and blue 7.",
    }  # fmt: skip
    kinds = {row["caption"]: row["status"] for row in run.tables.read(schemas.CAPTIONS).collect()}
    assert set(kinds.values()) == {"imported", "ok"}

    again = run.import_captions(source)
    assert (again.ok, again.failed, again.skipped) == (0, 3, 2)
    with pytest.raises(UsageError, match="the source has no column item_id with a value"):
        run.import_captions(Source(path=(str(file),)))


def test_too_many_failures_fail_the_run_loudly(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    run = pipeline(tmp_path, "caption.model.model=raise+empty", "caption.max_failed_share=0.5")
    store(run, {"red": RED, "green": GREEN, "blue": BLUE})
    with pytest.raises(RunError, match="caption: 2 of 3 photos failed") as loud:
        run.run(["caption"])[0]
    assert "\n" not in str(loud.value)
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    shown = ("status", "error_class", "attempts")
    assert {colour: tuple(rows[hashlib.sha256(image).hexdigest()][name] for name in shown)
            for colour, image in (("red", RED), ("green", GREEN), ("blue", BLUE))} == {
        "red": ("failed", "RuntimeError", 2), "green": ("ok", None, 2), "blue": ("rejected", "empty_caption", 2),
    }  # fmt: skip
    # What was paid for is kept.
    assert captions(run) == {"green": GREEN_TEXT}
    (record,) = run.tables.read(schemas.RUNS).collect()
    assert (record["stage"], record["status"], record["rows_ok"], record["rows_failed"]) == ("caption", "failed", 1, 2)
