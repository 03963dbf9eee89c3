"""Caption: what is captioned, how often the model is called, and what failures leave behind."""

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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hostile_photos import GOOD, HOSTILE, one_color
from PIL import Image
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F
from rich.console import Console
from shop import MakePipeline, from_files, item_row, log, photo_row, rows_of, run_stage, upsert

from vlm4rec_spark.caption.estimate import Rates
from vlm4rec_spark.caption.plan import in_order, queue, with_photos
from vlm4rec_spark.caption.progress_channel import Address, ProgressClient, ProgressServer
from vlm4rec_spark.caption.settings import Budget, Prices
from vlm4rec_spark.cli import main, show
from vlm4rec_spark.errors import Resumable, RunError, UsageError
from vlm4rec_spark.models.captioning.prompts import load_prompt
from vlm4rec_spark.pipeline import Pipeline
from vlm4rec_spark.pipeline.context import StageResult
from vlm4rec_spark.sources.reader import Source
from vlm4rec_spark.storage.schemas import (
    CAPTIONS,
    INTERACTIONS,
    ITEM_CAPTIONS,
    ITEMS,
    PHOTOS,
    REJECTED,
    RUNS,
)

RED, GREEN, BLUE, GREY = (one_color(colour, 16) for colour in ("red", "green", "blue", "grey"))
HTML = b"<!DOCTYPE html><html><body>404</body></html>"
FIVE = {"a": GREEN, "twin": GREEN, "b": BLUE, "html": HTML, "empty": b""}
GREEN_TEXT = "A thing of red 0, green 4 and blue 0."
BLUE_TEXT = "A thing of red 0, green 0 and blue 7."
RED_TEXT = "A thing of red 7, green 0 and blue 0."


def store(
    run: Pipeline,
    images: dict[str, bytes],
    price: float = 1.0,
) -> None:
    """Items and their photos, straight into the tables."""
    items = [item_row(item, title=f"Title {item}", price=price) for item in [*images, "bare"]]
    upsert(run, ITEMS, items)
    upsert(run, PHOTOS, [photo_row(item, image) for item, image in images.items()])


def captions(run: Pipeline) -> dict[str, str]:
    """Current caption by item."""
    links = run.tables.read(ITEM_CAPTIONS)
    rows = links.join(run.tables.read(CAPTIONS), on="caption_key", how="inner").collect()
    return {row["item_id"]: row["caption"] for row in rows}


class CaptionRows:
    """The rows of the table captions, by the photo that they describe."""

    def __init__(self, run: Pipeline):
        rows = rows_of(run, CAPTIONS)
        self.by_photo = {row["image_sha256"]: row for row in rows}

    def __getitem__(self, image: bytes) -> Row:
        return self.by_photo[hashlib.sha256(image).hexdigest()]


class Calls(NamedTuple):
    """What a run of the stage did: calls of the model, and rows."""

    calls: int
    ok: int
    failed: int
    skipped: int


class Counted:
    """Runs of the caption stage with a fake that counts its calls."""

    def __init__(
        self,
        make: MakePipeline,
        folder: Path,
    ):
        self.make = make
        self.folder = folder
        self.calls = folder / "calls"
        self.requests = ""
        """What the fake shall do besides."""

    def run(self, *settings: str) -> Pipeline:
        return self.make(
            self.folder, f"caption.model.model=count={self.calls}{self.requests}", *settings
        )

    def caption(self, run: Pipeline) -> Calls:
        before = self.count()
        result = run_stage(run, "caption")
        return Calls(self.count() - before, result.ok, result.failed, result.skipped)

    def caption_as_planned(self, run: Pipeline) -> Calls:
        """Run the stage, which must do what the plan says."""
        planned = run.plan()
        calls = self.caption(run)
        assert calls.ok + calls.failed == planned.now
        assert calls.skipped == planned.wanted - planned.now
        total = (
            planned.reused
            + planned.kept
            + planned.given_up
            + planned.duplicates
            + planned.to_caption
        )
        assert total == planned.wanted
        return calls

    def count(self) -> int:
        return self.calls.stat().st_size // 2 if self.calls.exists() else 0


@pytest.fixture
def counted(pipeline: MakePipeline, tmp_path) -> Counted:
    return Counted(pipeline, tmp_path)


@pytest.fixture(scope="module")
def five(pipeline: MakePipeline, tmp_path_factory) -> Counted:
    """Five photos of four contents, two of which are photos, captioned once."""
    counted = Counted(pipeline, tmp_path_factory.mktemp("five"))
    run = counted.run("caption.max_failed_share=0.5")
    store(run, FIVE)
    planned = run.plan()
    assert (planned.wanted, planned.duplicates, planned.reasons) == (5, 1, {"new": 4})
    assert counted.caption_as_planned(run) == (2, 2, 2, 1)
    return counted


def test_each_content_is_captioned_once(five: Counted):
    run = five.run()
    assert captions(run) == {"a": GREEN_TEXT, "twin": GREEN_TEXT, "b": BLUE_TEXT}
    rows = CaptionRows(run)
    assert len(rows.by_photo) == 4
    failed = rows[HTML]
    assert (failed["status"], failed["caption"]) == ("failed", None)
    assert failed["error_class"] == "html_page"
    assert rows[b""]["error_class"] == "empty"
    assert rows[GREEN]["prompt_id"] == "describe.1"


def test_another_prompt_model_or_parameter_is_other_content(
    five: Counted, pipeline: MakePipeline, tmp_path
):
    prompt = tmp_path / "short.1.txt"
    prompt.write_text("Say it in one word.")
    # A failed photo is new to every other prompt and model.
    shorter = five.run(f"caption.prompt={prompt}")
    assert shorter.plan().reasons == {"new": 2, "prompt_changed": 2}
    another = pipeline(five.folder, "caption.model.model=another")
    assert another.plan().reasons == {"new": 2, "model_changed": 2}
    longer = five.run("caption.model.max_new_tokens=9")
    assert longer.plan().reasons == {"new": 2, "settings_changed": 2}


def test_of_many_photos_exactly_what_changed_is_captioned(counted: Counted):
    # Of 60 photos in two chunks.
    run = counted.run("caption.chunk_photos=40")
    images = {f"i{n:03}": one_color(f"#{n:02x}{2 * n:02x}80", 16) for n in range(60)}
    store(run, images)
    assert counted.caption_as_planned(run) == (60, 60, 0, 0)
    store(run, images | {"i007": GREEN})
    store(run, {"more": GREEN}, price=3.0)
    assert counted.caption_as_planned(run) == (1, 1, 0, 60)


def events(run: Pipeline, counts: dict[str, int]) -> None:
    views = [("u", item, "view", "2025-01-01") for item in Counter(counts).elements()]
    run.tables.append(INTERACTIONS, log(run.spark, views))


def test_a_budget_goes_to_the_items_with_the_most_events_first(counted: Counted):
    run = counted.run("caption.budget.photos=2")
    store(run, {"dull": GREEN, "hot": GREY, "warm": BLUE, "twin": BLUE, "bare": RED})
    events(run, {"hot": 5, "warm": 2, "twin": 2, "dull": 3})
    assert counted.caption_as_planned(run) == (2, 2, 0, 3)
    assert set(captions(run)) == {"hot", "warm", "twin"}
    # Nothing has changed, and yet there is something to do.
    assert counted.caption(run) == (2, 2, 0, 3)
    assert set(captions(run)) == {"hot", "warm", "twin", "dull", "bare"}
    assert run_stage(run, "caption").status == "unchanged"


def test_a_budget_of_money_uses_the_tokens_of_earlier_captions(five: Counted, tmp_path):
    # At 1 a token, and as many tokens as the captions so far took with another prompt.
    prices = ("caption.prices.million_input_tokens=1000000", "caption.budget.money=70")
    prompt = tmp_path / "four.1.txt"
    prompt.write_text("Say it in four.")
    planned = five.run(*prices, f"caption.prompt={prompt}").plan()
    tokens = len(load_prompt("describe.1").text.split())
    assert (planned.rates.tokens, planned.rates.input_tokens) == ("measured", tokens)
    assert (planned.to_caption, planned.now, planned.cost) == (4, 1, tokens)


class Shelves(NamedTuple):
    """Photos in four files, and the queue of 15 of them in order."""

    photos: DataFrame
    ordered: DataFrame

    def rows(self) -> list[Row]:
        return self.ordered.orderBy("rank").collect()

    def read(
        self,
        first: int,
        last: int,
    ) -> tuple[set[str], int]:
        """The items with these ranks, and how many files of photos are read for them."""
        part = with_photos(self.ordered.where(F.col("rank").between(first, last)), self.photos)
        files = {
            re.search(r"part-\d+-[^/]+$", file)[0]
            for file in part.inputFiles()
            if "/photos/" in file
        }
        return {row["item_id"] for row in part.collect()}, len(files)


@pytest.fixture(scope="module")
def shelves(pipeline: MakePipeline, tmp_path_factory) -> Shelves:
    run = pipeline(tmp_path_factory.mktemp("shelves"))
    # Four loads, each in its own file.
    for shelf in "abcd":
        loaded = [photo_row(f"{shelf}{n}", f"{shelf}{n}".encode()) for n in range(4)]
        run.tables.append(PHOTOS, run.spark.createDataFrame(loaded, PHOTOS.schema))
    photos = from_files(run.tables, PHOTOS)
    assert len(photos.inputFiles()) == 4
    events(run, {"d3": 9, "b1": 8})
    pending = photos.select(
        "item_id",
        "position",
        F.lit("new").alias("reason"),
        F.lit(0).alias("attempts"),
        F.lit(None).cast("string").alias("prompt"),
        F.col("image_sha256").alias("caption_key"),
    )
    by_events = queue(pending, run.tables.read(INTERACTIONS))
    return Shelves(photos, in_order(by_events, now=15, first=2).persist())


def test_the_items_with_the_most_events_come_first(shelves: Shelves):
    rows = shelves.rows()
    assert [row["rank"] for row in rows] == list(range(15))
    assert [row["tier"] for row in rows] == [0] * 2 + [1] * 4 + [2] * 8 + [3]
    items = [row["item_id"] for row in rows]
    assert items[:2] == ["b1", "d3"]
    assert items[2:6] == sorted(items[2:6])
    assert items[6:14] == sorted(items[6:14])


def test_a_chunk_reads_the_files_of_its_items(shelves: Shelves):
    assert shelves.read(0, 0) == ({"b1"}, 1)
    assert shelves.read(0, 1) == ({"b1", "d3"}, 3)
    # The end of one tier and the beginning of the next: not all that lies between.
    last, first = [row["item_id"] for row in shelves.rows()[5:7]]
    assert shelves.read(5, 6) == ({last, first}, len({last[0], first[0]}))


def test_what_a_budget_buys():
    rates = Rates(2.0, 1_000, 100, "assumed", "assumed")
    prices = Prices(device_hour=3.6, million_output_tokens=5)
    assert rates.cost(1_000, prices) == pytest.approx(0.5 + 0.5)
    assert rates.affordable(5_000, Budget(), prices) == 5_000
    assert rates.affordable(5_000, Budget(money=1), prices) == 1_000
    assert rates.affordable(5_000, Budget(money=1, photos=70), prices) == 70
    assert rates.affordable(50, Budget(money=1), prices) == 50
    assert rates.affordable(50, Budget(money=0), prices) == 0


def test_the_models_failures_are_tried_again_until_they_are_given_up(counted: Counted):
    counted.requests = "+raise+empty"
    run = counted.run("caption.max_failed_share=1", "caption.max_attempts=2")
    store(run, {"red": RED, "green": GREEN, "blue": BLUE, "html": HTML})

    def attempts() -> dict[str, int]:
        rows = rows_of(run, CAPTIONS)
        return {row["error_class"]: row["attempts"] for row in rows if row["error_class"]}

    run.run(["caption"])
    assert attempts() == {"RuntimeError": 1, "empty_caption": 1, "html_page": 1}
    assert run.plan().reasons == {"retry": 1}
    assert counted.caption_as_planned(run) == (1, 0, 1, 3)
    assert attempts() == {"RuntimeError": 2, "empty_caption": 1, "html_page": 1}
    assert run_stage(run, "caption").status == "unchanged"

    run.context.retry = ""
    assert run.plan().reasons == {"retry": 3}
    run.context.retry = "empty_caption"
    assert counted.caption(run) == (1, 0, 1, 3)
    assert attempts() == {"RuntimeError": 2, "empty_caption": 2, "html_page": 1}
    assert captions(run) == {"green": GREEN_TEXT}


def test_every_hostile_photo_has_its_error_class_and_every_good_one_its_caption(
    pipeline: MakePipeline, tmp_path
):
    run = pipeline(tmp_path, "caption.max_failed_share=1", "caption.batch_size=4")
    hostile = {f"bad {name}": data for name, (data, _) in HOSTILE.items()}
    store(run, hostile | {f"good {name}": image for name, image in GOOD.items()})
    result = run_stage(run, "caption")
    assert len(HOSTILE) >= 40
    assert (result.ok, result.failed) == (len(GOOD), len(HOSTILE))
    rows = CaptionRows(run)
    error_classes = {name: rows[data]["error_class"] for name, (data, _) in HOSTILE.items()}
    assert error_classes == {name: error_class for name, (_, error_class) in HOSTILE.items()}
    assert set(captions(run)) == {f"good {name}" for name in GOOD}


def test_a_prompt_with_a_title_is_asked_for_every_title(counted: Counted, tmp_path):
    prompt = tmp_path / "titled.txt"
    prompt.write_text("{title}: what is it?")
    # The fake says its prompt back over what is green.
    counted.requests = "+echo:green"
    run = counted.run(f"caption.prompt={prompt}", "caption.max_failed_share=1")
    store(run, {"a": GREEN, "twin": GREEN, "b": BLUE})
    # The same photo under two titles is two questions.
    assert counted.caption(run) == (3, 1, 2, 0)
    errors = {
        row["error"] for row in run.tables.read(CAPTIONS).where("status = 'rejected'").collect()
    }
    assert errors == {
        f"the model repeated the prompt: Title {item}: what is it?" for item in ("a", "twin")
    }
    items = run.tables.read(ITEMS).where("item_id = 'b'").withColumn("title", F.lit("Another"))
    run.tables.upsert(ITEMS, items)
    assert run.plan().reasons == {"prompt_changed": 1}


class Describer(BaseHTTPRequestHandler):
    """A server of OpenAI's protocol that says how red a photo is, and refuses the reddest.

    Where JSON is asked for it obeys: every key that is required is there.
    """

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = request["messages"][0]["content"]
        jpeg = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        red = Image.open(io.BytesIO(jpeg)).resize((1, 1)).getpixel((0, 0))[0]  # type: ignore[index]
        caption = f"{request['model']} saw a red of {red // 32}."
        if "response_format" in request and red // 32:
            keys = request["response_format"]["json_schema"]["schema"]["required"]
            attributes = {"kind": "Round tile", "colour": f"red {red // 32}"}
            caption = json.dumps(dict.fromkeys(keys, "") | attributes)
        message = {"content": caption} if red < 200 else {"refusal": "Not that one."}
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


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server with these answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def caption_by_endpoint(
    pipeline: MakePipeline, folder: Path, images: dict[str, bytes], *settings: str
) -> tuple[Pipeline, StageResult]:
    with serving(Describer) as url:
        run = pipeline(
            folder,
            "caption.model.backend=endpoint",
            "caption.model.model=gpt",
            "caption.max_failed_share=0.9",
            f"caption.model.endpoint.url={url}/v1",
            *settings,
        )
        store(run, images)
        result = run_stage(run, "caption")
    return run, result


def test_captions_come_from_an_endpoint(pipeline: MakePipeline, tmp_path):
    images = {"red": RED, "green": GREEN, "grey": GREY, "html": HTML}
    run, result = caption_by_endpoint(pipeline, tmp_path, images)
    assert (result.ok, result.failed) == (2, 2)
    assert captions(run) == {"green": "gpt saw a red of 0.", "grey": "gpt saw a red of 4."}
    rows = CaptionRows(run)
    assert (rows[RED]["status"], rows[RED]["error_class"]) == ("rejected", "refusal")
    assert rows[RED]["model"] == "gpt@endpoint"
    assert rows[GREY]["output_tokens"] == 7
    assert run.plan().reasons == {}


def test_attributes_of_a_structured_prompt_are_in_columns_in_the_report_and_in_show(
    pipeline: MakePipeline, tmp_path
):
    # The server answers in prose over what has no red in it.
    images = {"green": GREEN, "grey": GREY, "twin": GREY}
    structured = "caption.prompt=structured.1"
    run, result = caption_by_endpoint(pipeline, tmp_path, images, structured)
    assert (result.ok, result.failed) == (1, 1)
    rows = CaptionRows(run)
    assert rows[GREY]["caption"] == "Round tile, red 4."
    assert rows[GREY]["attributes"] == {"kind": "Round tile", "colour": "red 4"}
    assert (rows[GREEN]["status"], rows[GREEN]["attributes"]) == ("rejected", None)
    assert rows[GREEN]["error_class"] == "bad_attributes"
    assert rows[GREEN]["error"] == "no JSON object: gpt saw a red of 0."
    run.run(["report"])
    page = (tmp_path / "report.html").read_text()
    attributes = "<dt>kind</dt><dd>Round tile</dd><dt>colour</dt><dd>red 4</dd>"
    assert page.count(attributes) == 1
    assert 'aria-label="kind: round tile 2"' in page
    output = io.StringIO()
    show.item(run, "twin", Console(file=output, width=200))
    assert "attributes in it: kind: Round tile, colour: red 4" in output.getvalue()


class LinkedShop:
    """Four items whose photos aren't stored: two are files and two are behind URLs."""

    def __init__(
        self,
        make: MakePipeline,
        folder: Path,
        url: str,
    ):
        self.photos = folder / "photos"
        self.folder = folder
        for item, image in {"a": GREEN, "b": BLUE, "c": GREEN, "d": GREY}.items():
            (self.photos / f"{item}.png").write_bytes(image)
        rows = [f"{item},{self.photos}/{item}.png" for item in "ab"]
        rows += [f"{item},{url}/{item}.png" for item in "cd"]
        (folder / "items.csv").write_text("\n".join(["item_id,photo", *rows]))
        self.run = make(
            folder,
            f"ingest.items.path=[{folder}/items.csv]",
            "ingest.photos.path_column=photo",
            "ingest.photos.http.private_addresses=true",
            "ingest.photos.http.tries=1",
            "ingest.photos.keep=false",
            "caption.max_failed_share=1",
        )
        self.run.run(["ingest"])

    def attempts(self) -> dict[str, int]:
        """Of the failed captions, by error class."""
        rows = self.run.tables.read(CAPTIONS).where("status <> 'ok'").collect()
        return {row["error_class"]: row["attempts"] for row in rows}

    def forget(self, text: str) -> None:
        table = f"delta.`{self.folder}/tables/captions`"
        self.run.spark.sql(f"DELETE FROM {table} WHERE caption = '{text}'")


@pytest.fixture
def linked_shop(pipeline: MakePipeline, tmp_path) -> Iterator[LinkedShop]:
    photos = tmp_path / "photos"
    photos.mkdir()
    with serving(partial(Files, directory=str(photos))) as url:
        yield LinkedShop(pipeline, tmp_path, url)


def test_photos_that_are_not_stored_are_read_again(linked_shop: LinkedShop):
    run = linked_shop.run
    photos = linked_shop.photos
    assert [row["image"] for row in rows_of(run, PHOTOS)] == [None] * 4
    (photos / "c.png").write_bytes(RED)
    # A server tells the modification time by the second.
    later = time.time() + 100
    os.utime(photos / "c.png", (later, later))
    (photos / "d.png").unlink()
    run.run(["caption"])
    # Of two items with the same bytes one is read, and a is the first.
    assert captions(run) == {"a": GREEN_TEXT, "b": BLUE_TEXT, "c": GREEN_TEXT}
    assert linked_shop.attempts() == {"unreadable": 1}
    (photos / "a.png").write_bytes(BLUE)
    linked_shop.forget(GREEN_TEXT)
    run.run(["caption"])
    assert linked_shop.attempts() == {"unreadable": 2, "changed_since": 1}
    run.run(["ingest"])
    run.run(["caption"])
    assert captions(run) == {"a": BLUE_TEXT, "b": BLUE_TEXT, "c": RED_TEXT}


@pytest.mark.cluster
def test_photos_that_kill_or_hang_the_model_cost_no_other_photo(pipeline: MakePipeline, tmp_path):
    model = "caption.model.model=exit:red+hang:green+eat:blue"
    run = pipeline(
        tmp_path, model, "caption.batch_seconds=2", "caption.memory_gb=0.4", "caption.batch_size=8"
    )
    greys = {f"grey{n}": one_color(f"#{n + 70:02x}{n + 70:02x}{n + 70:02x}", 16) for n in range(37)}
    store(run, {"red": RED, "green": GREEN, "blue": BLUE} | greys)
    # Spark's local mode tries no task twice: one that failed would fail the run.
    result = run_stage(run, "caption")
    assert (result.ok, result.failed) == (37, 3)
    rows = CaptionRows(run)
    assert rows[RED]["error_class"] == "model_died"
    assert rows[GREEN]["error_class"] == "model_hung"
    assert rows[BLUE]["error_class"] == "out_of_memory"
    assert set(captions(run)) == set(greys)


@pytest.mark.cluster
def test_a_stopped_run_commits_what_it_has_and_the_next_goes_on(counted: Counted):
    counted.requests = "+ms=300"
    run = counted.run("caption.batch_size=4", "caption.chunk_minutes=0.6")
    images = {f"i{n:03}": one_color(f"#{n:02x}0080", 16) for n in range(160)}
    store(run, images)
    # The first half of a chunk, which is 36: it is committed before the third is begun.
    hot = {f"i{n:03}" for n in range(100, 118)}
    events(run, dict.fromkeys(hot, 1))

    def stop() -> None:
        while counted.count() < 40:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    message = r"stopped by SIGTERM. \d+ photos are done and committed, \d+ are left"
    with pytest.raises(Resumable, match=message) as stopped:
        run.run(["caption"])
    assert stopped.value.exit_code == 75
    committed = run.tables.read(CAPTIONS).count()
    assert 40 <= committed < 120
    assert len(captions(run)) == committed == counted.count()
    assert hot <= set(captions(run))
    quick = counted.run("caption.batch_size=4")
    assert counted.caption(quick) == (160 - committed, 160 - committed, 0, committed)


def test_the_progress_server_counts_what_tasks_report_and_tells_them_to_stop():
    server = ProgressServer("127.0.0.1")
    try:
        first = ProgressClient(server.address)
        second = ProgressClient(server.address)
        first.add({"photos": 3, "failed": 1})
        second.add({"photos": 2})
        assert server.counts == {"photos": 5, "failed": 1}
        assert not first.stopped
        server.stop = True
        first.flush()
        assert first.stopped
        stranger = ProgressClient(Address("127.0.0.1", server.address.port, "guessed"))
        stranger.add({"photos": 1_000})
        assert server.counts["photos"] == 5
        for client in (first, second, stranger):
            client.close()
    finally:
        server.close()
    # Without a server, work goes on.
    alone = ProgressClient(server.address)
    alone.add({"photos": 1})
    assert not alone.stopped
    alone.close()


def test_a_broken_connection_leaves_no_socket_open():
    server = ProgressServer("127.0.0.1")
    client = ProgressClient(server.address)
    connection = client._socket
    assert connection is not None
    connection.shutdown(socket.SHUT_WR)
    client.add({"photos": 1})
    assert (connection.fileno(), client.stopped) == (-1, False)
    client.close()
    server.close()


def test_imported_captions_are_used_and_bad_rows_rejected(pipeline: MakePipeline, tmp_path):
    rows = ['a,"  A green chair, rather old "', "bare,Seen by nobody", "gone,Lost", "b,"]
    file = tmp_path / "captions.csv"
    file.write_text("\n".join(["sku,text", *rows, "a,A second text", ""]))
    source = Source(path=(str(file),), columns={"item_id": "sku"})
    run = pipeline(tmp_path)
    store(run, {"a": GREEN, "b": BLUE})
    result = run.import_captions(source)
    assert (result.ok, result.failed, result.skipped) == (2, 3, 0)
    imported = {"a": "A green chair, rather old", "bare": "Seen by nobody"}
    assert captions(run) == imported
    rejected = rows_of(run, REJECTED)
    assert {json.loads(row["row"])["sku"]: row["reason"] for row in rejected} == {
        "gone": "no such item in the catalogue",
        "b": "the text is empty",
        "a": "the item has another text",
    }
    repeated = run.import_captions(source)
    assert (repeated.ok, repeated.failed, repeated.skipped) == (0, 3, 2)
    with pytest.raises(UsageError, match="the source has no column item_id with a value"):
        run.import_captions(Source(path=source.path))
    # The stage leaves them alone.
    result = run_stage(run, "caption")
    assert (result.ok, result.skipped) == (1, 0)
    assert captions(run) == imported | {"b": BLUE_TEXT}
    assert {row["status"] for row in rows_of(run, CAPTIONS)} == {"imported", "ok"}


def test_too_many_failures_fail_the_run_loudly(pipeline: MakePipeline, tmp_path):
    run = pipeline(tmp_path, "caption.model.model=raise+empty", "caption.max_failed_share=0.5")
    store(run, {"red": RED, "green": GREEN, "blue": BLUE})
    with pytest.raises(RunError, match="caption: 2 of 3 photos failed") as loud:
        run.run(["caption"])
    assert "\n" not in str(loud.value)
    assert "red: the fake was asked to fail on this photo" in str(loud.value)
    rows = CaptionRows(run)
    assert {row["attempts"] for row in rows.by_photo.values()} == {1}
    results = {
        image: (rows[image]["status"], rows[image]["error_class"]) for image in (RED, GREEN, BLUE)
    }
    assert results == {
        RED: ("failed", "RuntimeError"),
        GREEN: ("ok", None),
        BLUE: ("rejected", "empty_caption"),
    }
    # What was paid for is committed.
    assert captions(run) == {"green": GREEN_TEXT}
    (record,) = rows_of(run, RUNS)
    assert (record["stage"], record["status"]) == ("caption", "failed")
    assert (record["rows_ok"], record["rows_failed"]) == (1, 2)


def test_a_model_that_fails_on_everything_is_stopped_long_before_the_end(counted: Counted):
    counted.requests = "+refuse:green+ms=20"
    run = counted.run("caption.chunk_photos=40", "caption.batch_size=4")
    store(run, {f"i{n:03}": one_color(f"#00{n + 40:02x}00", 16) for n in range(200)})
    message = r"refusal \d+\), more than .* Such as (i\d+: the model ref.*){3} Stopped with"
    with pytest.raises(RunError, match=message):
        run.run(["caption"])
    assert counted.count() <= 100


@pytest.fixture(scope="module")
def plan_command(pipeline: MakePipeline, tmp_path_factory) -> Callable[..., int]:
    """`vlm4rec plan` on three contents of four photos; its arguments follow."""
    folder = tmp_path_factory.mktemp("plan")
    run = pipeline(folder)
    store(run, {"a": GREEN, "twin": GREEN, "b": BLUE, "c": GREY})
    events(run, {"b": 1})
    assert not run.tables.exists(CAPTIONS)
    settings = ["--config", "test.yaml", "--set", f"tables={folder}/tables"]

    def plan(*arguments: str) -> int:
        code = main(["plan", *settings, *arguments])
        # A plan writes nothing.
        assert not run.tables.exists(CAPTIONS)
        return code

    return plan


BUDGET = ("--set", "caption.prices.device_hour=3600", "--set", "caption.budget.money=2")


def test_the_plan_is_json_for_programs(plan_command: Callable[..., int], capsys):
    capsys.readouterr()
    assert plan_command("--json", *BUDGET) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["wanted"], planned["duplicates"], planned["to_caption"]) == (4, 1, 3)
    assert (planned["now"], planned["cost"], planned["reasons"]) == (2, 2.0, {"new": 3})
    assert planned["rates"]["speed"] == "assumed"


def test_the_plan_is_a_table_for_people(plan_command: Callable[..., int], capsys):
    capsys.readouterr()
    assert plan_command(*BUDGET) == 0
    shown = capsys.readouterr().out
    for line in (
        "to caption +│ +3",
        "new +│ +3",
        "duplicates: .* 1",
        "within the budget, .* 2",
        r"cost +│ +2\.00",
    ):
        assert re.search(line, shown), line
    assert plan_command(*BUDGET, "--retry-failed", "refusal") == 0
    assert plan_command(*BUDGET, "refusal") == 2
    assert "an error class needs --retry-failed" in capsys.readouterr().err
    assert plan_command() == 0
