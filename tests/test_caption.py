"""Caption: what is captioned, how often the model is called, and what a photo or a model that fails leaves behind."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hostile_photos import GOOD, HOSTILE
from PIL import Image
from pyspark.sql import functions as F
from rich.console import Console

from vlm4rec_spark.caption.estimate import Rates
from vlm4rec_spark.caption.plan import in_order, queue, with_photos
from vlm4rec_spark.caption.progress_channel import Address, ProgressClient, ProgressServer
from vlm4rec_spark.caption.settings import Budget, Prices
from vlm4rec_spark.cli import main, show
from vlm4rec_spark.errors import Resumable, RunError, UsageError
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.storage import schemas

if TYPE_CHECKING:
    from vlm4rec_spark.pipeline import Pipeline


def photo(colour: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (16, 16), colour)
    image.putpixel((0, 0), (255, 255, 255))  # a photo of one colour all over shows nothing
    image.save(buffer, "PNG")
    return buffer.getvalue()


RED, GREEN, BLUE, GREY = (photo(colour) for colour in ("red", "green", "blue", "grey"))
HTML = b"<!DOCTYPE html><html><body>404</body></html>"
GREEN_TEXT = "A thing of red 0, green 4 and blue 0."
BLUE_TEXT, RED_TEXT = (
    "A thing of red 0, green 0 and blue 7.",
    "A thing of red 7, green 0 and blue 0.",
)


def store(run: Pipeline, images: dict[str, bytes], price: float = 1.0) -> None:
    """Items and their photos, straight into the tables."""
    spark, now = run.spark, datetime(2025, 1, 1)
    items: list[Any] = [
        (item, f"Title {item}", None, None, None, None, price, None, None, None, True, None, now)
        for item in [*images, "bare"]
    ]
    run.tables.upsert(schemas.ITEMS, spark.createDataFrame(items, schemas.ITEMS.schema))
    rows = [
        (item, 0, None, image, hashlib.sha256(image).hexdigest(), len(image), None, None)
        for item, image in images.items()
    ]
    run.tables.upsert(schemas.PHOTOS, spark.createDataFrame(rows, schemas.PHOTOS.schema))


def captions(run: Pipeline) -> dict[str, str]:
    """Caption in force by item."""
    links = run.tables.read(schemas.ITEM_CAPTIONS)
    rows = links.join(run.tables.read(schemas.CAPTIONS), on="caption_key", how="inner").collect()
    return {row["item_id"]: row["caption"] for row in rows}


class Counted:
    """Runs of the caption stage with a fake that counts its calls."""

    def __init__(self, make: Callable[..., Pipeline], folder: Path, requests: str = ""):
        self.make, self.folder, self.calls, self.requests = make, folder, folder / "calls", requests

    def run(self, *settings: str) -> Pipeline:
        return self.make(
            self.folder, f"caption.model.model=count={self.calls}{self.requests}", *settings
        )

    def caption(self, run: Pipeline) -> tuple[int, int, int, int]:
        """Calls of the model, and rows ok, failed and skipped; the plan has said how many photos there are to do."""
        planned, before = run.plan(), self.count()
        (outcome,) = run.run(["caption"])
        assert outcome.ok + outcome.failed == planned.now
        skipped = planned.wanted if outcome.status == "unchanged" else outcome.skipped
        assert skipped == planned.wanted - planned.now
        total = (
            planned.reused
            + planned.kept
            + planned.given_up
            + planned.duplicates
            + planned.to_caption
        )
        assert total == planned.wanted
        return self.count() - before, outcome.ok, outcome.failed, skipped

    def count(self) -> int:
        return self.calls.stat().st_size // 2 if self.calls.exists() else 0


def test_each_content_is_captioned_once_and_only_what_changed_again(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path)
    images = {"a": GREEN, "twin": GREEN, "b": BLUE, "html": HTML, "empty": b""}
    run = counted.run("caption.max_failed_share=0.5")
    store(run, images)
    planned = run.plan()
    assert (planned.wanted, planned.duplicates, planned.reasons) == (5, 1, {"new": 4})
    # Five photos of four contents: the model sees the two that are photos.
    assert counted.caption(run) == (2, 2, 2, 1)
    assert captions(run) == {
        "a": GREEN_TEXT,
        "twin": GREEN_TEXT,
        "b": "A thing of red 0, green 0 and blue 7.",
    }
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    assert len(rows) == 4
    failed = rows[hashlib.sha256(HTML).hexdigest()]
    assert (failed["status"], failed["error_class"], failed["caption"]) == (
        "failed",
        "html_page",
        None,
    )
    assert rows[hashlib.sha256(b"").hexdigest()]["error_class"] == "empty"
    assert rows[hashlib.sha256(GREEN).hexdigest()]["prompt_id"] == "describe.1"

    # Another prompt is other content; so are another model and other parameters.
    prompt = tmp_path / "short.1.txt"
    prompt.write_text("Say it in one word.")
    other = counted.run("caption.max_failed_share=0.5", f"caption.prompt={prompt}")
    assert other.plan().reasons == {"new": 2, "prompt_changed": 2}
    assert counted.caption(other) == (2, 2, 2, 1)
    assert pipeline(tmp_path, "caption.model.model=another").plan().reasons == {
        "new": 2,
        "model_changed": 2,
    }
    longer = counted.run("caption.model.max_new_tokens=9", f"caption.prompt={prompt}")
    assert longer.plan().reasons == {"new": 2, "settings_changed": 2}

    # The old prompt's captions are still there: the same run again calls nobody.
    assert counted.caption(run) == (0, 0, 0, 5)


def test_of_500_photos_exactly_what_changed_is_captioned(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path)
    run = counted.run("caption.chunk_photos=300")
    images = {f"i{n:03}": photo(f"#{n % 256:02x}{n // 256:02x}80") for n in range(500)}
    store(run, images)
    assert counted.caption(run) == (500, 500, 0, 0)
    assert counted.caption(run) == (0, 0, 0, 500)
    store(run, images | {"i007": GREEN})
    assert counted.caption(run) == (1, 1, 0, 499)
    store(run, {"more": GREEN}, price=3.0)
    assert counted.caption(run) == (0, 0, 0, 501)
    prompt = tmp_path / "short.2.txt"
    prompt.write_text("Say it.")
    other = counted.run("caption.chunk_photos=300", f"caption.prompt={prompt}")
    assert counted.caption(other) == (500, 500, 0, 1)
    assert run.tables.read(schemas.CAPTIONS).count() == 500 + 1 + 500


def test_captions_of_another_prompt_stay_where_they_are_to_be_kept(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path)
    run = counted.run()
    store(run, {"a": GREEN, "b": GREY})
    assert counted.caption(run) == (2, 2, 0, 0)
    other = counted.run(
        "caption.on_change=keep", "caption.model.max_side=99", "caption.max_failed_share=1"
    )
    store(other, {"a": GREEN, "b": BLUE, "c": GREY})
    planned = other.plan()
    # A new item is described as the config says, though the old way has a caption of its photo.
    assert (planned.kept, planned.reasons) == (1, {"new": 1, "photo_changed": 1})
    assert counted.caption(other) == (2, 2, 0, 1)
    assert set(captions(other)) == {"a", "b", "c"}
    assert captions(other)["b"] == "A thing of red 0, green 0 and blue 7."
    # Of a photo that isn't there any more no caption stays, whatever became of the new one.
    store(other, {"a": HTML, "b": BLUE, "c": GREY})
    assert counted.caption(other) == (0, 0, 1, 2)
    assert set(captions(other)) == {"b", "c"}


def events(run: Pipeline, counts: dict[str, int]) -> None:
    day = datetime(2025, 1, 1)
    rows: list[Any] = [
        (f"{item}-{n}", "u", item, "view", day, day.date())
        for item, count in counts.items()
        for n in range(count)
    ]
    run.tables.upsert(
        schemas.INTERACTIONS, run.spark.createDataFrame(rows, schemas.INTERACTIONS.schema)
    )


def test_a_budget_is_spent_on_what_is_wanted_most_night_by_night(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path)
    run = counted.run("caption.budget.photos=2")
    store(run, {"dull": GREEN, "hot": GREY, "warm": BLUE, "twin": BLUE, "bare": RED})
    events(run, {"hot": 5, "warm": 2, "twin": 2, "dull": 3})
    assert (run.plan().to_caption, run.plan().now) == (4, 2)
    assert counted.caption(run) == (2, 2, 0, 3)
    assert set(captions(run)) == {"hot", "warm", "twin"}
    # Nothing has changed, and yet there is something to do.
    assert counted.caption(run) == (2, 2, 0, 3)
    assert set(captions(run)) == {"hot", "warm", "twin", "dull", "bare"}
    assert counted.caption(run) == (0, 0, 0, 5)
    assert [outcome.status for outcome in run.run(["caption"])] == ["unchanged"]

    # Money: at 1 a token, and as many tokens as the captions so far took with another prompt.
    prices = ("caption.prices.million_input_tokens=1000000", "caption.budget.money=70")
    prompt = tmp_path / "four.1.txt"
    prompt.write_text("Say it in four.")
    paid = counted.run(*prices, f"caption.prompt={prompt}")
    planned = paid.plan()
    asked = len(load_prompt("describe.1").text.split())
    assert (planned.rates.tokens, planned.rates.input_tokens) == ("measured", asked)
    assert (planned.to_caption, planned.now, planned.cost) == (4, 1, asked)


def test_a_chunk_reads_the_files_of_its_items_and_the_most_wanted_come_first(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    run = pipeline(tmp_path)
    # Four loads, each in its own file.
    for shelf in "abcd":
        store(run, {f"{shelf}{n}": photo(f"#{n:02x}{ord(shelf):02x}00") for n in range(4)})
    photos = run.tables.read(schemas.PHOTOS)
    assert len(photos.inputFiles()) == 4
    events(run, {"d3": 9, "b1": 8})
    judged = photos.select(
        "item_id",
        "position",
        F.lit("new").alias("reason"),
        F.lit(0).alias("attempts"),
        F.lit(None).cast("string").alias("prompt"),
        F.col("image_sha256").alias("caption_key"),
    )
    ordered = in_order(
        queue(judged, run.tables.read(schemas.INTERACTIONS)), now=15, first=2
    ).persist()
    rows = ordered.orderBy("rank").collect()
    assert [row["rank"] for row in rows] == list(range(15))
    assert [row["tier"] for row in rows] == [0] * 2 + [1] * 4 + [2] * 8 + [3]
    items = [row["item_id"] for row in rows]
    assert items[:2] == ["b1", "d3"]
    assert items[2:6] == sorted(items[2:6])
    assert items[6:14] == sorted(items[6:14])

    def read(first: int, last: int) -> tuple[set[str], int]:
        part = with_photos(ordered.where(F.col("rank").between(first, last)), photos)
        files = {
            re.search(r"part-\d+-[^/]+$", file)[0]
            for file in part.inputFiles()
            if "/photos/" in file
        }
        return {row["item_id"] for row in part.collect()}, len(files)

    assert read(0, 0) == ({"b1"}, 1)
    assert read(0, 1) == ({"b1", "d3"}, 3)
    # The end of one tier and the beginning of the next: not all that lies between.
    shelves = {item[0] for item in (items[5], items[6])}
    assert read(5, 6) == ({items[5], items[6]}, len(shelves))


def test_what_a_budget_buys() -> None:
    rates, prices = (
        Rates(2.0, 1_000, 100, "assumed", "assumed"),
        Prices(device_hour=3.6, million_output_tokens=5),
    )
    assert rates.cost(1_000, prices) == pytest.approx(0.5 + 0.5)
    assert rates.affordable(5_000, Budget(), prices) == 5_000
    assert rates.affordable(5_000, Budget(money=1), prices) == 1_000
    assert rates.affordable(5_000, Budget(money=1, photos=70), prices) == 70
    assert rates.affordable(50, Budget(money=1), prices) == 50
    assert rates.affordable(50, Budget(money=0), prices) == 0


def test_the_models_failures_are_tried_again_and_a_bad_photo_is_not(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path, "+raise+empty")
    run = counted.run("caption.max_failed_share=1", "caption.max_attempts=2")
    store(run, {"red": RED, "green": GREEN, "blue": BLUE, "html": HTML})

    def attempts() -> dict[str, int]:
        rows = run.tables.read(schemas.CAPTIONS).collect()
        return {row["error_class"]: row["attempts"] for row in rows if row["error_class"]}

    run.run(["caption"])
    assert attempts() == {"RuntimeError": 1, "empty_caption": 1, "html_page": 1}
    assert run.plan().reasons == {"retry": 1}
    assert counted.caption(run) == (1, 0, 1, 3)
    assert attempts() == {"RuntimeError": 2, "empty_caption": 1, "html_page": 1}
    assert counted.caption(run) == (0, 0, 0, 4)
    assert run.run(["caption"])[0].status == "unchanged"

    run.context.retry = "empty_caption"
    assert counted.caption(run) == (1, 0, 1, 3)
    run.context.retry = ""
    assert run.plan().reasons == {"retry": 3}
    run.run(["caption"])
    assert attempts() == {"RuntimeError": 3, "empty_caption": 3, "html_page": 2}
    assert captions(run) == {"green": GREEN_TEXT}


def test_each_of_a_folder_of_hostile_photos_has_its_class_and_every_good_one_its_caption(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    run = pipeline(tmp_path, "caption.max_failed_share=1", "caption.batch_size=4")
    store(
        run,
        {f"bad {name}": data for name, (data, _) in HOSTILE.items()}
        | {f"good {n}": GOOD[n] for n in GOOD},
    )
    (outcome,) = run.run(["caption"])
    assert len(HOSTILE) >= 40
    assert (outcome.ok, outcome.failed) == (len(GOOD), len(HOSTILE))
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    found = {
        name: rows[hashlib.sha256(data).hexdigest()]["error_class"]
        for name, (data, _) in HOSTILE.items()
    }
    assert found == {name: error_class for name, (_, error_class) in HOSTILE.items()}
    assert set(captions(run)) == {f"good {name}" for name in GOOD}


def test_a_prompt_with_a_title_is_asked_again_where_the_title_has_changed_and_nowhere_else(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    prompt = tmp_path / "titled.txt"
    prompt.write_text("{title}: what is it?")
    # The fake says its prompt back over what is green.
    counted = Counted(pipeline, tmp_path, "+echo:green")
    run = counted.run(f"caption.prompt={prompt}", "caption.max_failed_share=1")
    store(run, {"a": GREEN, "twin": GREEN, "b": BLUE})
    # The same photo under two titles is two questions.
    assert counted.caption(run) == (3, 1, 2, 0)
    errors = {
        row["error"]
        for row in run.tables.read(schemas.CAPTIONS).where("status = 'rejected'").collect()
    }
    assert errors == {
        f"the model repeated the prompt: Title {item}: what is it?" for item in ("a", "twin")
    }
    store(run, {"a": GREEN, "twin": GREEN, "b": BLUE}, price=2.0)
    assert counted.caption(run) == (0, 0, 0, 3)
    items = (
        run.tables.read(schemas.ITEMS).where("item_id = 'b'").withColumn("title", F.lit("Another"))
    )
    run.tables.upsert(schemas.ITEMS, items)
    assert run.plan().reasons == {"prompt_changed": 1}
    assert counted.caption(run) == (1, 1, 0, 2)


class Describer(BaseHTTPRequestHandler):
    """A server of OpenAI's protocol that says how red a photo is, and refuses the reddest.

    Where JSON is asked for it obeys: every key that is required is there.
    """

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = asked["messages"][0]["content"]
        jpeg = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        red = Image.open(io.BytesIO(jpeg)).resize((1, 1)).getpixel((0, 0))[0]  # type: ignore[index]
        text_said = f"{asked['model']} saw a red of {red // 32}."
        if "response_format" in asked and red // 32:
            keys = asked["response_format"]["json_schema"]["schema"]["required"]
            text_said = json.dumps(
                dict.fromkeys(keys, "") | {"kind": "Round tile", "colour": f"red {red // 32}"}
            )
        content = {"content": text_said}
        message = content if red < 200 else {"refusal": "Not that one."}
        usage = {"prompt_tokens": len(text["text"].split()), "completion_tokens": 7}
        body = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_captions_come_from_an_endpoint(pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Describer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = pipeline(
            tmp_path,
            "caption.model.backend=endpoint",
            "caption.model.model=gpt",
            "caption.max_failed_share=0.9",
            f"caption.model.endpoint.url=http://127.0.0.1:{server.server_port}/v1",
        )
        store(run, {"red": RED, "green": GREEN, "grey": GREY, "html": HTML})
        (outcome,) = run.run(["caption"])
        server.shutdown()
    assert (outcome.ok, outcome.failed) == (2, 2)
    assert captions(run) == {"green": "gpt saw a red of 0.", "grey": "gpt saw a red of 4."}
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    red = rows[hashlib.sha256(RED).hexdigest()]
    assert (red["status"], red["error_class"], red["model"]) == (
        "rejected",
        "refusal",
        "gpt@endpoint",
    )
    assert (rows[hashlib.sha256(GREY).hexdigest()]["output_tokens"], run.plan().reasons) == (7, {})


def test_what_a_structured_prompt_is_told_stands_in_columns_in_the_report_and_where_an_item_is_shown(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Describer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = pipeline(
            tmp_path,
            "caption.model.backend=endpoint",
            "caption.model.model=gpt",
            "caption.max_failed_share=0.9",
            f"caption.model.endpoint.url=http://127.0.0.1:{server.server_port}/v1",
            "caption.prompt=structured.1",
            f"report.path={tmp_path}/report.html",
        )
        # The server answers in prose over what has no red in it.
        store(run, {"green": GREEN, "grey": GREY, "twin": GREY})
        (outcome,) = run.run(["caption"])
        server.shutdown()
    assert (outcome.ok, outcome.failed) == (1, 1)
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    grey, green = (rows[hashlib.sha256(data).hexdigest()] for data in (GREY, GREEN))
    assert (grey["caption"], grey["attributes"]) == (
        "Round tile, red 4.",
        {"kind": "Round tile", "colour": "red 4"},
    )
    assert (green["status"], green["error_class"], green["attributes"]) == (
        "rejected",
        "bad_attributes",
        None,
    )
    assert green["error"] == "no JSON object: gpt saw a red of 0."
    run.run(["report"])
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("<dt>kind</dt><dd>Round tile</dd><dt>colour</dt><dd>red 4</dd>") == 3
    )  # sample, shortest, longest
    assert 'aria-label="kind: round tile 2"' in page
    console = Console(file=io.StringIO(), width=200)
    show.item(run, "twin", console)
    assert "attributes in it: kind: Round tile, colour: red 4" in console.file.getvalue()  # type: ignore[attr-defined]


def test_photos_that_are_not_kept_are_read_at_their_place(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    images = {"a": GREEN, "b": BLUE, "c": GREEN, "d": GREY}
    for item, image in images.items():
        (folder / f"{item}.png").write_bytes(image)
    handler = partial(Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        places = [f"a,{folder}/a.png", f"b,{folder}/b.png", f"c,{url}/c.png", f"d,{url}/d.png"]
        (tmp_path / "items.csv").write_text("\n".join(["item_id,photo", *places]))
        settings = (
            f"ingest.items.path=[{tmp_path}/items.csv]",
            "ingest.photos.path_column=photo",
            "ingest.photos.http.private_addresses=true",
            "ingest.photos.http.tries=1",
            "caption.max_failed_share=1",
        )
        run = pipeline(tmp_path, *settings, "ingest.photos.keep=false")
        run.run(["ingest"])
        assert [row["image"] for row in run.tables.read(schemas.PHOTOS).collect()] == [None] * 4
        (folder / "c.png").write_bytes(RED)
        os.utime(
            folder / "c.png", (time.time() + 100,) * 2
        )  # a server says what is newer, by the second
        (folder / "d.png").unlink()
        run.run(["caption"])

        def failures() -> dict[str, int]:
            rows = run.tables.read(schemas.CAPTIONS).where("status <> 'ok'").collect()
            return {row["error_class"]: row["attempts"] for row in rows}

        # Of two items with the same bytes one is read, and a is the first.
        assert captions(run) == {"a": GREEN_TEXT, "b": BLUE_TEXT, "c": GREEN_TEXT}
        assert failures() == {"unreadable": 1}
        (folder / "a.png").write_bytes(BLUE)
        run.spark.sql(
            f"DELETE FROM delta.`{tmp_path}/tables/captions` WHERE caption = '{GREEN_TEXT}'"
        )
        run.run(["caption"])
        assert failures() == {"unreadable": 2, "changed_since": 1}
        run.run(["ingest"])
        run.run(["caption"])
        server.shutdown()
    assert captions(run) == {"a": BLUE_TEXT, "b": BLUE_TEXT, "c": RED_TEXT}


def test_photos_that_end_hang_or_fill_the_model_are_quarantined_and_cost_no_other_photo(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    model = "caption.model.model=exit:red+hang:green+eat:blue"
    run = pipeline(
        tmp_path, model, "caption.batch_seconds=2", "caption.memory_gb=0.4", "caption.batch_size=8"
    )
    greys = {f"grey{n}": photo(f"#{n + 70:02x}{n + 70:02x}{n + 70:02x}") for n in range(37)}
    store(run, {"red": RED, "green": GREEN, "blue": BLUE} | greys)
    # Spark's local mode tries no task twice: one that failed would fail the run.
    (outcome,) = run.run(["caption"])
    assert (outcome.ok, outcome.failed) == (37, 3)
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    classes = {"red": "model_died", "green": "model_hung", "blue": "out_of_memory"}
    assert {
        c: rows[hashlib.sha256(photo(c)).hexdigest()]["error_class"] for c in classes
    } == classes
    assert set(captions(run)) == set(greys)


def test_a_run_that_is_told_to_stop_keeps_what_it_has_and_the_next_goes_on(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path, "+ms=300")
    run = counted.run("caption.batch_size=4", "caption.chunk_minutes=0.6")
    images = {f"i{n:03}": photo(f"#{n:02x}0080") for n in range(160)}
    store(run, images)
    # The first half of a chunk, which is 36: it is committed before the third is begun.
    hot = {f"i{n:03}" for n in range(100, 118)}
    events(run, dict.fromkeys(hot, 1))

    def tell() -> None:
        while counted.count() < 40:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(
        Resumable, match=r"stopped by SIGTERM. \d+ photos are done and committed, \d+ are left"
    ) as told:
        run.run(["caption"])
    assert told.value.exit_code == 75
    done = run.tables.read(schemas.CAPTIONS).count()
    assert 40 <= done < 120
    assert len(captions(run)) == done == counted.count()
    assert hot <= set(captions(run))
    quick = counted.run("caption.batch_size=4")
    assert counted.caption(quick) == (160 - done, 160 - done, 0, done)


def test_the_line_counts_what_tasks_say_and_tells_them_to_stop() -> None:
    line = ProgressServer("127.0.0.1")
    try:
        first, second = ProgressClient(line.address), ProgressClient(line.address)
        first.say({"photos": 3, "failed": 1})
        second.say({"photos": 2})
        assert line.counts == {"photos": 5, "failed": 1}
        assert not first.stopped
        line.stop = True
        first.flush()
        assert first.stopped
        stranger = ProgressClient(Address("127.0.0.1", line.address.port, "guessed"))
        stranger.say({"photos": 1_000})
        assert line.counts["photos"] == 5
        for caller in (first, second, stranger):
            caller.close()
    finally:
        line.close()
    # Where nobody listens, work goes on.
    alone = ProgressClient(line.address)
    alone.say({"photos": 1})
    assert not alone.stopped
    alone.close()


def test_a_task_whose_line_breaks_leaves_no_socket_open() -> None:
    line = ProgressServer("127.0.0.1")
    caller = ProgressClient(line.address)
    wire = caller._socket
    assert wire is not None
    wire.shutdown(socket.SHUT_WR)
    caller.say({"photos": 1})
    assert (wire.fileno(), caller.stopped) == (-1, False)
    caller.close()
    line.close()


def test_imported_captions_take_the_place_of_the_model(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    run = pipeline(tmp_path)
    store(run, {"a": GREEN, "b": BLUE})
    file = tmp_path / "captions.csv"
    file.write_text(
        'sku,text\na,"  A green chair, rather old "\nbare,Seen by nobody\ngone,Lost\nb,\na,A second text\n'
    )
    source = Source(path=(str(file),), columns={"item_id": "sku"})
    outcome = run.import_captions(source)
    assert (outcome.ok, outcome.failed, outcome.skipped) == (2, 3, 0)
    assert captions(run) == {"a": "A green chair, rather old", "bare": "Seen by nobody"}
    refused = {
        json.loads(row["row"])["sku"]: row["reason"]
        for row in run.tables.read(schemas.REJECTED).collect()
    }
    assert refused == {
        "gone": "no such item in the catalogue",
        "b": "the text is empty",
        "a": "the item has another text",
    }

    # The stage describes what is left, and leaves what was imported alone.
    outcome = run.run(["caption"])[0]
    assert (outcome.ok, outcome.skipped) == (1, 0)
    assert captions(run) == {
        "a": "A green chair, rather old",
        "bare": "Seen by nobody",
        "b": "A thing of red 0, green 0 and blue 7.",
    }
    kinds = {row["caption"]: row["status"] for row in run.tables.read(schemas.CAPTIONS).collect()}
    assert set(kinds.values()) == {"imported", "ok"}

    again = run.import_captions(source)
    assert (again.ok, again.failed, again.skipped) == (0, 3, 2)
    with pytest.raises(UsageError, match="the source has no column item_id with a value"):
        run.import_captions(Source(path=(str(file),)))


def test_too_many_failures_fail_the_run_loudly(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    run = pipeline(tmp_path, "caption.model.model=raise+empty", "caption.max_failed_share=0.5")
    store(run, {"red": RED, "green": GREEN, "blue": BLUE})
    with pytest.raises(RunError, match="caption: 2 of 3 photos failed") as loud:
        run.run(["caption"])[0]
    assert "\n" not in str(loud.value)
    assert "red: the fake was asked to fail on this photo" in str(loud.value)
    rows = {row["image_sha256"]: row for row in run.tables.read(schemas.CAPTIONS).collect()}
    shown = ("status", "error_class", "attempts")
    assert {
        colour: tuple(rows[hashlib.sha256(image).hexdigest()][name] for name in shown)
        for colour, image in (("red", RED), ("green", GREEN), ("blue", BLUE))
    } == {
        "red": ("failed", "RuntimeError", 1),
        "green": ("ok", None, 1),
        "blue": ("rejected", "empty_caption", 1),
    }
    # What was paid for is kept.
    assert captions(run) == {"green": GREEN_TEXT}
    (record,) = run.tables.read(schemas.RUNS).collect()
    assert (record["stage"], record["status"], record["rows_ok"], record["rows_failed"]) == (
        "caption",
        "failed",
        1,
        2,
    )


def test_a_model_that_fails_on_everything_is_stopped_long_before_the_end(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    counted = Counted(pipeline, tmp_path, "+refuse:green+ms=20")
    run = counted.run("caption.chunk_photos=40", "caption.batch_size=4")
    store(run, {f"i{n:03}": photo(f"#00{n + 40:02x}00") for n in range(200)})
    with pytest.raises(
        RunError,
        match=r"refusal \d+\), more than .* Such as (i\d+: the model ref.*){3} Stopped with",
    ):
        run.run(["caption"])
    assert counted.count() <= 100


def test_the_plan_is_a_table_for_people_and_json_for_programs(
    pipeline: Callable[..., Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pipeline(tmp_path)
    store(run, {"a": GREEN, "twin": GREEN, "b": BLUE, "c": GREY})
    events(run, {"b": 1})
    words = [
        f"tables={tmp_path}/tables",
        "caption.prices.device_hour=3600",
        "caption.budget.money=2",
    ]
    argv = ["--config", "test.yaml", *(word for setting in words for word in ("--set", setting))]
    capsys.readouterr()
    assert main(["plan", "--json", *argv]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {
        name: planned[name]
        for name in ("wanted", "duplicates", "to_caption", "now", "cost", "reasons")
    } == {
        "wanted": 4,
        "duplicates": 1,
        "to_caption": 3,
        "now": 2,
        "cost": 2.0,
        "reasons": {"new": 3},
    }
    assert planned["rates"]["speed"] == "assumed"
    assert main(["plan", *argv]) == 0
    shown = capsys.readouterr().out
    for line in (
        "to caption +│ +3",
        "new +│ +3",
        "duplicates: .* 1",
        "within the budget, .* 2",
        r"cost +│ +2\.00",
    ):
        assert re.search(line, shown), line
    assert main(["plan", *argv, "--retry-failed", "refusal"]) == 0
    assert main(["plan", *argv, "refusal"]) == 2
    assert "an error class goes with --retry-failed" in capsys.readouterr().err
    assert main(["plan", *argv[:-4]]) == 0
    assert not run.tables.exists(schemas.CAPTIONS)
