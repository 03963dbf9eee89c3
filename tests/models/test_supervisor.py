"""The model's child process: what its death, hang or memory use costs, and who is blamed."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile_photos import one_color
from loopback import Reply, serving

from vlm4rec_spark.errors import RunError
from vlm4rec_spark.models.captioning.captioner import EndpointSettings, ModelSettings
from vlm4rec_spark.models.captioning.supervisor import (
    InFlight,
    Photo,
    Result,
    Supervisor,
    last_words,
    suspects,
)

RED = one_color("red")
GREEN = one_color("green")
GREY = one_color("grey")
DARKER = one_color("#000040")
"""The fake sees blue 4 in GREY, and blue 2 in DARKER."""


@pytest.fixture
def supervised() -> Iterator[type[Supervisor]]:
    """Makes supervisors of the fake, closed after the test."""
    supervisors = []

    class FakeSupervisor(Supervisor):
        def __init__(
            self,
            instructions: str,
            batch_size: int = 4,
            seconds: float = 20,
            memory: int | None = None,
        ):
            model = ModelSettings(backend="fake", model=instructions)
            super().__init__(model, batch_size, seconds, memory)
            supervisors.append(self)

    yield FakeSupervisor
    for supervisor in supervisors:
        supervisor.close()


def photos(*images: bytes) -> Iterator[Photo]:
    for number, image in enumerate(images):
        yield Photo(str(number), image, "Say it.")


def greys(count: int) -> Iterator[Photo]:
    return photos(*[GREY] * count)


def outcomes(supervisor: Supervisor, *images: bytes) -> list[str]:
    """Per photo its error class, or the blue that the fake sees. Each photo has one result."""
    results = {}
    for result in supervisor.caption(photos(*images)):
        assert result.key not in results
        results[result.key] = result.error_class or (result.text or "").rstrip(".").split()[-1]
    return [results.pop(str(number)) for number in range(len(images))]


def calls(file: Path) -> int:
    return file.stat().st_size // 2


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_photo_has_one_result_whatever_the_batch(supervised, batch_size: int):
    supervisor = supervised("none", batch_size)
    images = [GREY, b"", b"<html>", GREY[:-30], *[DARKER, GREY] * 10]
    expected = ["4", "empty", "html_page", "truncated", *["2", "4"] * 10]
    assert outcomes(supervisor, *images) == expected
    # The same child serves the next task.
    pid = supervisor.pid
    assert outcomes(supervisor, GREY) == ["4"]
    assert supervisor.pid == pid


@pytest.mark.cluster
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
    supervised, tmp_path, fault: str, error_class: str
):
    count = tmp_path / "calls"
    seconds = 1.5 if fault == "hang" else 20
    supervisor = supervised(f"{fault}:red+count={count}", 4, seconds, memory=400_000_000)
    expected = ["4"] * 5 + [error_class] + ["4"] * 10
    assert outcomes(supervisor, *[GREY] * 5, RED, *[GREY] * 10) == expected
    # Only the killer's batch is repeated, photo by photo.
    assert 16 <= calls(count) <= 16 + 4


@pytest.mark.cluster
def test_two_killers_in_one_batch_both_fail(supervised):
    expected = ["model_died", "4", "model_died", "4", "4"]
    assert outcomes(supervised("exit:red"), RED, GREY, RED, GREY, GREY) == expected


@pytest.mark.cluster
def test_two_killers_in_one_batch_have_their_own_error_classes(
    supervised,
):
    supervisor = supervised("exit:red+hang:green", 16, seconds=1)
    expected = ["model_died", "model_hung", *["4"] * 6]
    assert outcomes(supervisor, RED, GREEN, *[GREY] * 6) == expected


def hang_at_red_only(supervisor: Supervisor, child: object) -> float:
    """Half a second once the model works on a red photo and the others wait; else there is no hang.

    A busy machine may be silent for seconds while it decodes, and then decoders are suspects too.
    """
    flights = supervisor._in_flight.values()
    hung = any(flight.state == "captioning" and flight.photo.data == RED for flight in flights)
    settled = all(flight.state in ("captioning", "decoded") for flight in flights)
    return 0.5 if hung and settled else math.inf


@pytest.mark.cluster
def test_a_photo_that_waits_behind_a_killer_is_not_blamed(supervised, monkeypatch):
    hung = Supervisor._hung
    hangs = list[Any]()

    def count(supervisor: Supervisor, child: Any) -> Exception:
        hangs.append(child)
        return hung(supervisor, child)

    monkeypatch.setattr(Supervisor, "_hung", count)
    monkeypatch.setattr(Supervisor, "_limit", hang_at_red_only)
    # Three photos are in flight, two of them killers. The model works on one at a time.
    supervisor = supervised("hang:red", 1)
    expected = ["model_hung", "4", "model_hung", "4", "4"]
    assert outcomes(supervisor, RED, GREY, RED, GREY, GREY) == expected
    # Each killer ends two children. If the second were blamed for the first, it would end one.
    # How many children start depends on the order in which the two decoders are done.
    assert len(hangs) == 2 + 2


def states(flights: list[InFlight]) -> list[str]:
    return [flight.state for flight in flights]


def test_the_model_and_the_decoders_are_blamed_and_for_a_hang_the_model_first():
    photo = Photo("a", GREY, "Say it.")
    flights = [
        InFlight(photo, state=state) for state in ("sent", "decoding", "decoded", "captioning")
    ]
    assert states(suspects(flights, hung=False)) == ["decoding", "captioning"]
    assert states(suspects(flights, hung=True)) == ["captioning"]
    # Decoding is excused once.
    assert states(suspects(flights, hung=True)) == ["decoding", "captioning"]
    assert states(suspects(flights[:3], hung=True)) == ["decoding"]


def test_a_caller_that_reads_late_finds_no_hang(supervised):
    supervisor = supervised("none", 1, seconds=2)
    results = supervisor.caption(greys(4))
    next(results)
    pid = supervisor.pid
    time.sleep(3)
    assert [result.error_class for result in results] == [None] * 3
    assert supervisor.pid == pid


@pytest.mark.cluster
def test_the_error_says_how_the_process_ended(supervised):
    (result,) = supervised("exit:red").caption(photos(RED))
    assert result.error == "the process ended with exit code 3"
    (result,) = supervised("hang:red", seconds=1).caption(photos(RED))
    assert result.error == "no answer within 1 s; the process was killed"


@pytest.mark.cluster
def test_a_killed_child_loses_no_photo(supervised, tmp_path):
    count = tmp_path / "calls"
    supervisor = supervised(f"ms=50+count={count}")
    results: list[Result] = []
    for result in supervisor.caption(greys(40)):
        if len(results) in (4, 20):
            os.kill(supervisor.pid, signal.SIGKILL)
        results.append(result)
    assert sorted(int(result.key) for result in results) == list(range(40))
    assert {result.error for result in results} == {None}
    assert calls(count) <= 40 + 2 * 4


def test_an_idle_child_ends_and_the_next_photo_starts_another(supervised):
    supervisor = supervised("none")
    supervisor.idle_seconds = 0.5
    assert outcomes(supervisor, GREY) == ["4"]
    assert supervisor.pid is not None
    assert psutil.wait_procs([psutil.Process(supervisor.pid)], timeout=10)[1] == []
    assert outcomes(supervisor, GREY, b"") == ["4", "empty"]


@pytest.mark.cluster
def test_a_model_that_always_dies_is_given_up(supervised):
    results = list(supervised("exit:red", 1).caption(photos(*[RED] * 40)))
    assert 1 <= len(results) <= 10
    assert {result.error_class for result in results} == {"model_died"}


def test_stop_ends_after_the_batches_at_work(supervised):
    results = list[Result]()
    captioning = supervised("none").caption(greys(100), stop=lambda: len(results) >= 10)
    for result in captioning:
        results.append(result)
    assert 10 <= len(results) <= 20


def test_an_abandoned_task_leaves_no_answers_to_the_next(supervised):
    supervisor = supervised("none")
    first = supervisor.caption(greys(20))
    next(first)
    first.close()
    assert outcomes(supervisor, DARKER, GREY) == ["2", "4"]


def test_a_model_that_can_serve_no_photo_ends_the_run_with_its_error(
    monkeypatch,
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-no-such-key")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving("openai") as server:
        server.always(Reply(status=401))
        endpoint = EndpointSettings(url=server.url)
        model = ModelSettings(backend="endpoint", model="gpt", endpoint=endpoint)
        supervisor = Supervisor(model, 4, 20)
        with pytest.raises(
            RunError, match=r"^The captioner can't go on: .* the model gpt: status 401"
        ):
            list(supervisor.caption(greys(40)))
    assert supervisor.pid is None


def test_an_endpoint_may_be_silent_for_all_its_tries():
    slow = EndpointSettings(timeout_seconds=100, tries=9)
    model = ModelSettings(backend="endpoint", endpoint=slow)
    assert model.max_silence_seconds == 9 * (100 + 2 * 60)
    assert ModelSettings(endpoint=slow).max_silence_seconds == 0


def test_a_model_that_cannot_be_loaded_ends_the_run(tmp_path):
    supervisor = Supervisor(ModelSettings(model=str(tmp_path / "none")), 4, 20)
    with pytest.raises(RunError, match=r"^The captioner can't be loaded: OSError: .*none"):
        list(supervisor.caption(photos(GREY)))
    assert supervisor.pid is None


def test_the_last_words_are_the_error_that_a_log_points_to():
    prefix = "(EngineCore pid=7) ERROR 11-26 12:53:10 [core.py:1165]"
    log = f"""{prefix} Traceback (most recent call last):\r
{prefix} ValueError: No available memory for the cache blocks.\r
Traceback (most recent call last):
  File "core_client.py", line 567, in __init__
"""
    points_up = "RuntimeError: Engine core initialization failed. See root cause above."
    assert last_words(log + points_up) == "ValueError: No available memory for the cache blocks."
    assert last_words(log + "Killed\n\n") == "Killed"
    assert last_words(points_up) == points_up
    assert last_words("") == ""


@pytest.mark.cluster
def test_the_child_never_outlives_its_parent():
    code = """
import time
from vlm4rec_spark.models.captioning.captioner import ModelSettings
from vlm4rec_spark.models.captioning.supervisor import Photo, Supervisor
supervisor = Supervisor(ModelSettings(backend="fake", model="hang:red"), 1, 600)
def photos():
    yield Photo("a", RED, "Say it.")
    print(supervisor.pid, flush=True)
    time.sleep(3_600)
list(supervisor.caption(photos()))
"""
    code = code.replace("RED", repr(RED))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)  # until it hangs on the photo
        # A suspended process can't see that its socket is closed, as in a broken GPU driver.
        child.suspend()
        parent.kill()
    alive = psutil.wait_procs([child], timeout=10)[1]
    for process in alive:
        process.kill()
    assert alive == []


def test_work_and_idle_time_are_counted_apart(supervised):
    def slow() -> Iterator[Photo]:
        for photo in greys(4):
            time.sleep(0.1)
            yield photo

    results = list(supervised("ms=20", 1).caption(slow()))
    assert 0.08 <= sum(result.seconds for result in results) < 0.3
    assert sum(result.starved_seconds for result in results) > 0.1


def test_a_slow_source_of_photos_is_no_hang(supervised):
    supervisor = supervised("none", 4, seconds=1)
    pids = set()

    def slow() -> Iterator[Photo]:
        for photo in greys(4):
            yield photo
            time.sleep(1.5 if photo.key == "1" else 0)
            pids.add(supervisor.pid)

    assert [result.error_class for result in supervisor.caption(slow())] == [None] * 4
    assert pids == {supervisor.pid}
