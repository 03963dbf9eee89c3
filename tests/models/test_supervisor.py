"""The model's child process: what its death, hang or hunger costs, and whom they are put down to."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.captioning.captioner import EndpointSettings, ModelSettings
from vlm4rec_spark.models.captioning.supervisor import Photo, Result, Supervisor, last_words


def photo(colour: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (8, 8), colour)
    image.putpixel((0, 0), (255, 255, 255))  # a photo of one colour all over shows nothing
    image.save(buffer, "PNG")
    return buffer.getvalue()


RED, GREEN, BLUE, GREY = (photo(colour) for colour in ("red", "green", "blue", "grey"))
DARKER = photo("#000040")


@pytest.fixture
def supervised() -> Iterator[type[Supervisor]]:
    made = []

    class Made(Supervisor):
        def __init__(
            self, requests: str, batch_size: int = 4, seconds: float = 20, memory: int | None = None
        ):
            super().__init__(
                ModelSettings(backend="fake", model=requests), batch_size, seconds, memory
            )
            made.append(self)

    yield Made
    for one in made:
        one.close()


def captioned(supervisor: Supervisor, *images: bytes) -> dict[str, str]:
    """By the photo's place its text, or its error class; each place once."""
    results = list(
        supervisor.caption(Photo(str(n), image, "Say it.") for n, image in enumerate(images))
    )
    assert sorted(result.key for result in results) == sorted(str(n) for n in range(len(images)))
    return {
        result.key: result.error_class or result.text.removesuffix(".").split()[-1]
        for result in results
    }  # type: ignore[union-attr]


def calls(file: Path) -> int:
    return file.stat().st_size // 2


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_photo_has_one_result_whatever_the_batch(
    supervised: type[Supervisor], batch_size: int
) -> None:
    run = supervised("none", batch_size)
    images = [GREY, b"", b"<html>", GREY[:-30], *[DARKER, GREY] * 10]
    expected = {"0": "4", "1": "empty", "2": "html_page", "3": "truncated"}
    expected |= {str(n): "2" if n % 2 == 0 else "4" for n in range(4, 24)}
    assert captioned(run, *images) == expected
    # The same child serves the next task.
    before = run.pid
    assert captioned(run, GREY) == {"0": "4"}
    assert run.pid == before


@pytest.mark.parametrize(
    ("fault", "error_class"),
    [
        ("raise", "RuntimeError"),
        ("exit", "model_died"),
        ("hang", "model_hung"),
        ("eat", "out_of_memory"),
    ],
)
def test_a_photo_that_ends_the_model_costs_one_batch_and_no_other_photo(
    supervised: type[Supervisor], tmp_path: Path, fault: str, error_class: str
) -> None:
    count = tmp_path / "calls"
    run = supervised(
        f"{fault}:red+count={count}", 4, seconds=1.5 if fault == "hang" else 20, memory=400_000_000
    )
    images = [GREY] * 5 + [RED] + [GREY] * 10
    assert captioned(run, *images) == {str(n): error_class if n == 5 else "4" for n in range(16)}
    # The killer's batch is asked for again, photo by photo, and nothing else.
    assert 16 <= calls(count) <= 16 + 4


def test_two_killers_in_one_batch_are_both_found(supervised: type[Supervisor]) -> None:
    assert captioned(supervised("exit:red"), RED, GREY, RED, GREY, GREY) == {
        "0": "model_died",
        "1": "4",
        "2": "model_died",
        "3": "4",
        "4": "4",
    }


def test_two_killers_of_two_kinds_in_one_batch_each_have_their_own_class(
    supervised: type[Supervisor],
) -> None:
    run = supervised("exit:red+hang:green", 16, seconds=1)
    assert captioned(run, RED, GREEN, *[GREY] * 6) == {"0": "model_died", "1": "model_hung"} | {
        str(n): "4" for n in range(2, 8)
    }


def test_a_photo_that_waits_behind_a_killer_is_not_blamed(
    supervised: type[Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = subprocess.Popen, list[Any]()

    def counted(*args: Any, **options: Any) -> subprocess.Popen:
        started.append(args)
        return start(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", counted)
    # Three photos are on their way at once, two of them killers: the model works on the one, and not on the other.
    images = [RED, GREY, RED, GREY, GREY]
    said = captioned(supervised("hang:red", 1, seconds=4), *images)
    assert said == {str(n): "model_hung" if n in (0, 2) else "4" for n in range(5)}
    # Each killer ends a child twice; the second would end only one, were it blamed for the first one's as well.
    assert len(started) == 2 + 2 + 1


def test_the_error_says_how_the_process_ended(supervised: type[Supervisor]) -> None:
    (result,) = supervised("exit:red").caption([Photo("a", RED, "Say it.")])
    assert result.error == "the process ended with exit code 3"
    (result,) = supervised("hang:red", seconds=1).caption([Photo("a", RED, "Say it.")])
    assert result.error == "no answer within 1 s; the process was ended"


def test_a_child_that_somebody_kills_loses_nothing(
    supervised: type[Supervisor], tmp_path: Path
) -> None:
    count = tmp_path / "calls"
    run = supervised(f"ms=50+count={count}")
    results: list[Result] = []
    for n, result in enumerate(run.caption(Photo(str(n), GREY, "Say it.") for n in range(40))):
        if n in (4, 20):
            os.kill(run.pid, signal.SIGKILL)
        results.append(result)
    assert sorted(int(result.key) for result in results) == list(range(40))
    assert {result.error for result in results} == {None}
    assert calls(count) <= 40 + 2 * 4


def test_an_idle_child_ends_and_the_next_photo_starts_another(supervised: type[Supervisor]) -> None:
    run = supervised("none")
    run.idle_seconds = 0.5
    assert captioned(run, GREY) == {"0": "4"}
    assert run.pid is not None
    assert psutil.wait_procs([psutil.Process(run.pid)], timeout=10)[1] == []
    assert captioned(run, GREY, b"") == {"0": "4", "1": "empty"}


def test_a_model_that_always_dies_is_given_up(supervised: type[Supervisor]) -> None:
    results = list(
        supervised("exit:red", 1).caption(Photo(str(n), RED, "Say it.") for n in range(40))
    )
    assert 1 <= len(results) <= 10
    assert {result.error_class for result in results} == {"model_died"}


def test_stop_ends_after_the_batches_that_were_begun(supervised: type[Supervisor]) -> None:
    run, done = supervised("none"), list[Result]()
    for result in run.caption(
        (Photo(str(n), GREY, "Say it.") for n in range(100)), stop=lambda: len(done) >= 10
    ):
        done.append(result)
    assert 10 <= len(done) <= 20


def test_a_task_that_is_given_up_leaves_no_answers_to_the_next(
    supervised: type[Supervisor],
) -> None:
    run = supervised("none")
    first = run.caption(Photo(str(n), GREY, "Say it.") for n in range(20))
    next(first)
    first.close()
    assert captioned(run, DARKER, GREY) == {"0": "2", "1": "4"}


def test_a_model_that_can_serve_no_photo_ends_the_run_with_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-no-such-key")

    class Stranger(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = EndpointSettings(url=f"http://127.0.0.1:{server.server_port}/v1")
        run = Supervisor(ModelSettings(backend="endpoint", model="gpt", endpoint=endpoint), 4, 20)
        with pytest.raises(
            RunError, match=r"^The captioner can't go on: .* the model gpt: status 401"
        ):
            list(run.caption(Photo(str(n), GREY, "Say it.") for n in range(40)))
        server.shutdown()
    assert run.pid is None


def test_a_server_that_is_tried_for_long_is_no_model_that_hangs() -> None:
    slow = EndpointSettings(timeout_seconds=100, tries=9)
    assert ModelSettings(backend="endpoint", endpoint=slow).longest_silence == 9 * (100 + 2 * 60)
    assert ModelSettings(endpoint=slow).longest_silence == 0


def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    run = Supervisor(ModelSettings(model=str(tmp_path / "none")), 4, 20)
    with pytest.raises(RunError, match=r"^The captioner can't be loaded: OSError: .*none"):
        list(run.caption([Photo("a", GREY, "Say it.")]))
    assert run.pid is None


def test_the_last_words_are_the_error_that_a_log_points_to() -> None:
    log = """(EngineCore pid=7) ERROR 11-26 12:53:10 [core.py:1165] Traceback (most recent call last):\r
(EngineCore pid=7) ERROR 11-26 12:53:10 [core.py:1165] ValueError: No available memory for the cache blocks.\r
Traceback (most recent call last):
  File "core_client.py", line 567, in __init__
"""
    points_up = "RuntimeError: Engine core initialization failed. See root cause above."
    assert last_words(log + points_up) == "ValueError: No available memory for the cache blocks."
    assert last_words(log + "Killed\n\n") == "Killed"
    assert last_words(points_up) == points_up
    assert last_words("") == ""


def test_the_child_never_outlives_its_parent() -> None:
    code = """
import time
from vlm4rec_spark.models.captioners import ModelSettings
from vlm4rec_spark.models.supervisor import Photo, Supervisor
run = Supervisor(ModelSettings(backend="fake", model="hang:red"), 4, 600)
def photos():
    yield Photo("a", RED, "Say it.")
    print(run.pid, flush=True)
    time.sleep(3_600)
list(run.caption(photos()))
"""
    code = code.replace("RED", repr(RED)).replace("4, 600", "1, 600")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)  # it hangs over the photo
        # Nor can it hear that its socket is closed: so it is in a GPU's driver that has gone wrong.
        child.suspend()
        parent.kill()
    alive = psutil.wait_procs([child], timeout=10)[1]
    for one in alive:
        one.kill()
    assert alive == []


def test_time_that_the_model_waits_is_told_from_time_that_it_works(
    supervised: type[Supervisor],
) -> None:
    def slow() -> Iterator[Photo]:
        for n in range(4):
            time.sleep(0.1)
            yield Photo(str(n), GREY, "Say it.")

    results = list(supervised("ms=20", 1).caption(slow()))
    assert 0.08 <= sum(result.seconds for result in results) < 0.3
    assert sum(result.waited for result in results) > 0.1


def test_photos_that_are_long_in_coming_are_not_the_models_fault(
    supervised: type[Supervisor],
) -> None:
    def slow() -> Iterator[Photo]:
        for n in range(4):
            yield Photo(str(n), GREY, "Say it.")
            time.sleep(1.5 if n == 1 else 0)
            children.append(run.pid)

    run, children = supervised("none", 4, seconds=1), list[int | None]()
    assert [result.error_class for result in run.caption(slow())] == [None] * 4
    assert set(children) == {run.pid}
