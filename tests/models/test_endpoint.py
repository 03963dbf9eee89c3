"""The endpoint backend and a real server on loopback, which answers, stalls, throttles, breaks, lies and refuses."""

from __future__ import annotations

import base64
import io
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from loopback import VARIABLES, Reply, Seen, Server, said, serving
from PIL import Image
from pydantic import ValidationError

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioning.backends import endpoint as module
from vlm4rec_spark.models.captioning.backends.endpoint import EndpointCaptioner
from vlm4rec_spark.models.captioning.captioner import (
    Answer,
    EndpointSettings,
    ModelSettings,
    Request,
    load_captioner,
)

KEY = "sk-test-0123456789-abcdefghij"
openai_only = pytest.mark.parametrize("dialect", ["openai"])
"""For what comes after or before a dialect."""
GREY = Image.new("RGB", (8, 8), (128, 128, 128))


def refused(message: str, **more: Any) -> dict[str, Any]:
    """An error's body, in both dialects."""
    return {"type": "error", "error": {"type": "invalid_request_error", "message": message} | more}


@pytest.fixture(params=["openai", "anthropic"])
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(dialect: str) -> Iterator[Server]:
    with serving(dialect) as made:
        yield made


Make = Callable[..., EndpointCaptioner]


@pytest.fixture
def make(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A captioner that asks the server, with short waits."""
    monkeypatch.setenv(VARIABLES[server.dialect], KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    made = list[EndpointCaptioner]()

    def captioner(json_schema: dict[str, Any] | None = None, **options: Any) -> EndpointCaptioner:
        settings = EndpointSettings.model_validate(
            {"dialect": server.dialect, "url": server.url} | options
        )
        model = ModelSettings(
            backend="endpoint", model="eyes-1", max_new_tokens=40, endpoint=settings
        )
        one = load_captioner(model, json_schema=json_schema)
        assert isinstance(one, EndpointCaptioner)
        made.append(one)
        return one

    yield captioner
    for one in made:
        one.close()


def photos(count: int) -> list[Request]:
    return [Request(f"photo-{n}", GREY, f"Say {n}.") for n in range(count)]


def answered(captioner: EndpointCaptioner, requests: Iterable[Request]) -> dict[str, Answer]:
    """Everything asked at once; each key has one answer."""
    keys = []
    for request in requests:
        captioner.add(request)
        keys.append(request.key)
    answers = list[Answer]()
    while len(answers) < len(keys):
        some = captioner.step()
        assert some
        answers += some
    assert sorted(answer.key for answer in answers) == sorted(keys)
    return {answer.key: answer for answer in answers}


def one(captioner: EndpointCaptioner) -> Answer:
    (answer,) = answered(captioner, photos(1)).values()
    return answer


def test_the_photo_the_prompt_and_the_bounds_arrive(server: Server, make: Make) -> None:
    two = Image.new("RGB", (60, 40), (250, 10, 10))
    two.paste((10, 10, 250), (30, 0, 60, 40))
    answers = answered(make(), [Request("a", two, "What is it?\nIn 5 words – “please”.")])
    assert answers == {"a": Answer("a", "A grey thing.", 100, 20)}
    (seen,) = server.seen
    image = Image.open(
        io.BytesIO(base64.b64decode(seen.jpeg.removeprefix("data:image/jpeg;base64,")))
    )
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (60, 40))
    for place, colour in (((10, 20), (250, 10, 10)), ((50, 20), (10, 10, 250))):
        assert image.getpixel(place) == pytest.approx(colour, abs=4)
    assert seen.parts[1] == {"type": "text", "text": "What is it?\nIn 5 words – “please”."}
    assert [message["role"] for message in seen.body["messages"]] == ["user"]
    bounds = {key: value for key, value in seen.body.items() if key != "messages"}
    assert KEY in seen.headers.get("authorization", "") + seen.headers.get("x-api-key", "")
    if server.dialect == "openai":
        assert bounds == {"model": "eyes-1", "max_tokens": 40, "temperature": 0}
        assert seen.path == "/v1/chat/completions"
        assert seen.parts[0]["type"] == "image_url"
    else:
        assert bounds == {"model": "eyes-1", "max_tokens": 40}
        assert seen.path == "/v1/messages"
        source = {key: value for key, value in seen.parts[0]["source"].items() if key != "data"}
        assert (seen.parts[0]["type"], source) == (
            "image",
            {"type": "base64", "media_type": "image/jpeg"},
        )


def test_the_kind_of_json_is_told_in_the_dialects_words(server: Server, make: Make) -> None:
    schema = {"type": "object", "properties": {"kind": {"type": "string"}}}
    server.script = lambda *_: Reply(said(server.dialect, '{"kind": "shoe"}'))
    assert one(make(schema)).text == '{"kind": "shoe"}'
    (seen,) = server.seen
    if server.dialect == "openai":
        assert seen.body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "attributes", "schema": schema, "strict": True},
        }
    else:
        assert seen.body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}


def test_every_request_has_its_own_answer_and_so_many_are_on_their_way(
    server: Server, make: Make
) -> None:
    together = threading.Barrier(4)

    def script(number: int, seen: Seen) -> Reply:
        together.wait(20)  # it breaks unless four are here at once
        if number < 4:  # a fifth, were there one, has time to come
            time.sleep(0.2)
        prompt = seen.parts[1]["text"]
        return Reply(said(server.dialect, f"The {prompt}", tokens=(int(prompt[4:-1]), 7)))

    server.script = script
    captioner = make(concurrency=4, tries=1)
    assert captioner.at_once == 4
    # More than it wants to hold: it doesn't send more for that.
    answers = answered(captioner, photos(20))
    assert answers == {f"photo-{n}": Answer(f"photo-{n}", f"The Say {n}.", n, 7) for n in range(20)}
    assert (server.most, len(server.seen)) == (4, 20)


def test_step_does_not_wait_for_the_slow_ones(server: Server, make: Make) -> None:
    def script(number: int, seen: Seen) -> Reply:
        return Reply(said(server.dialect, "Done."), stalls=seen.parts[1]["text"] == "Say 0.")

    server.script = script
    captioner = make()
    for request in photos(3):
        captioner.add(request)
    first = list[Answer]()
    while len(first) < 2:
        first += captioner.step()
    assert {answer.key for answer in first} == {"photo-1", "photo-2"}
    server.released.set()
    assert [answer.key for answer in captioner.step()] == ["photo-0"]


PARTS = [
    {"type": "text", "text": "A red "},
    {"type": "thinking", "thinking": "Hm."},
    {"type": "text", "text": "shoe."},
]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", ""),
        ([], ""),
        (PARTS, "A red shoe."),
        ("Grün – 靴 \N{SHOPPING BAGS}", "Grün – 靴 \N{SHOPPING BAGS}"),
    ],
)
def test_an_answer_may_be_empty_or_come_in_parts(
    server: Server, make: Make, content: Any, text: str
) -> None:
    server.script = lambda *_: Reply(said(server.dialect, content))
    assert one(make()) == Answer("photo-0", text, 100, 20)


@pytest.mark.parametrize(
    "usage", [{}, {"usage": None}, {"usage": {}}], ids=["missing", "null", "empty"]
)
def test_usage_may_be_missing(server: Server, make: Make, usage: dict[str, Any]) -> None:
    reply = {
        key: value for key, value in said(server.dialect, "A shoe.").items() if key != "usage"
    } | usage
    server.script = lambda *_: Reply(reply)
    assert one(make()) == Answer("photo-0", "A shoe.", 0, 0)


NO_JSON = "Invalid JSON: expected value at line 1 column 1"
CALL = {"type": "tool_use", "id": "1", "name": "look", "input": {}}
LIES = {
    "html": (b"<html>Please\n log in</html>", f"{NO_JSON}; it began: <html>Please log in</html>"),
    "empty": (b"", "Invalid JSON"),
    "truncated": (b'{"choices": [{"message": {"content": "A sh', "Invalid JSON"),
    "no text in utf-8": (b'{"content": "\xff\xfe"}', "Invalid JSON"),
    "half a sign": (
        b'{"content": [{"text": "\\ud800"}], "choices": [{"message": {"content": "\\ud800"}}]}',
        "Invalid",
    ),
    "a list": ([], "should be an object"),
    "no choices": ({"choices": [], "content": None}, "should"),
    "neither": ({"id": "1"}, "Field required"),
    "a number": ({"choices": [{"message": {"content": 5}}], "content": 5}, "should be a valid"),
    "parts of another type": (
        {"choices": [{"message": {"content": [{"text": 5}]}}], "content": [{"text": 5}]},
        "should be a valid string",
    ),
    "tokens that no table holds": (
        {
            "choices": [{"message": {}}],
            "content": [],
            "usage": {"prompt_tokens": 10**20, "input_tokens": -1},
        },
        "should be",
    ),
}


@pytest.mark.parametrize(("body", "words"), LIES.values(), ids=LIES)
def test_a_lie_is_a_bad_answer_and_not_asked_for_again(
    server: Server, make: Make, body: Any, words: str
) -> None:
    kind = "text/html" if body == LIES["html"][0] else "application/json"
    server.script = lambda *_: Reply(body, headers={"Content-Type": kind})
    answer = one(make())
    assert (answer.text, answer.error_class, len(server.seen)) == (None, "bad_answer", 1)
    assert words in (answer.error or "")


def test_a_tools_call_is_no_text(server: Server, make: Make) -> None:
    openai = said("openai", None, "tool_calls", tool_calls=[CALL])
    server.script = lambda *_: Reply(
        openai if server.dialect == "openai" else said("anthropic", [CALL], "tool_use")
    )
    answer = one(make())
    assert (answer.error_class, answer.input_tokens, answer.output_tokens) == (
        "bad_answer",
        100,
        20,
    )
    end = "tool_calls" if server.dialect == "openai" else "tool_use"
    assert answer.error == f"there is no text; it ended by {end}"


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_what_is_wrong_with_a_request_is_not_asked_again(
    server: Server, make: Make, status: int
) -> None:
    server.script = lambda *_: Reply(refused("image  too\n large", code=7), status)
    answer = one(make())
    assert (answer.text, answer.error_class, len(server.seen)) == (None, "bad_request", 1)
    assert (answer.error or "").startswith(f"status {status}: {{")
    assert "image too" in (answer.error or "").replace("\\n", " ").replace("  ", " ")


REFUSALS = [
    (
        "openai",
        Reply(said("openai", None, refusal="I'd rather not.")),
        "the model refused: I'd rather not.",
    ),
    (
        "openai",
        Reply(said("openai", "A per", "content_filter")),
        "the model refused: content_filter",
    ),
    ("openai", Reply(refused("no", code="content_filter"), 400), "status 400: "),
    ("openai", Reply(refused("no", code="content_policy_violation"), 400), "status 400: "),
    ("anthropic", Reply(said("anthropic", [], "refusal")), "the model refused: refusal"),
    ("anthropic", Reply(said("anthropic", "I won't.", "refusal")), "the model refused: I won't."),
]


@pytest.mark.parametrize(("dialect", "reply", "words"), REFUSALS)
def test_a_refusal_has_a_class_of_its_own(
    server: Server, make: Make, reply: Reply, words: str
) -> None:
    server.script = lambda *_: reply
    answer = one(make())
    assert (answer.text, answer.error_class, len(server.seen)) == (None, "refusal", 1)
    assert (answer.error or "").startswith(words)
    assert answer.input_tokens + answer.output_tokens == (120 if reply.status == 200 else 0)


TROUBLES = {
    "500": (Reply(b"oops", 500), "server_error", "status 500: oops (3 tries)"),
    "502": (
        Reply(b"<html>Bad gateway</html>", 502),
        "server_error",
        "status 502: <html>Bad gateway</html> (3 tries)",
    ),
    "503": (Reply(b"soon", 503), "server_error", "status 503: soon (3 tries)"),
    "529": (Reply(b"overloaded", 529), "throttled", "status 529: overloaded (3 tries)"),
    "429": (Reply(b"slowly", 429), "throttled", "status 429: slowly (3 tries)"),
    "408": (Reply(b"late", 408), "timed_out", "status 408: late (3 tries)"),
    "no reply": (Reply(b"", cut=0), "unreachable", "(3 tries)"),
    "half a reply": (Reply(b'{"choices": []}', cut=5), "unreachable", "(3 tries)"),
}


@pytest.mark.parametrize(("trouble", "error_class", "words"), TROUBLES.values(), ids=TROUBLES)
def test_a_server_in_trouble_is_tried_again_until_it_recovers(
    server: Server, make: Make, trouble: Reply, error_class: str, words: str
) -> None:
    good = Reply(said(server.dialect, "At last."))
    server.script = lambda number, _: trouble if number < 2 or number > 2 else good
    captioner = make(tries=3)
    assert one(captioner) == Answer("photo-0", "At last.", 100, 20)
    assert len(server.seen) == 3
    # And this time it doesn't.
    answer = one(captioner)
    assert (answer.text, answer.error_class, len(server.seen)) == (None, error_class, 6)
    assert (answer.error or "").endswith(words)


@pytest.mark.parametrize(
    "hangs",
    [Reply(b"", stalls=True), Reply(b"{}" * 50, trickles=True)],
    ids=["silent", "drop by drop"],
)
def test_a_server_that_hangs_costs_its_time_and_no_more(
    server: Server, make: Make, hangs: Reply
) -> None:
    server.script = lambda *_: hangs
    began = time.monotonic()
    answer = one(make(timeout_seconds=0.25, tries=2))
    assert 0.5 <= time.monotonic() - began < 5
    assert answer == Answer("photo-0", None, 0, 0, "timed_out", "no answer within 0.25 s (2 tries)")
    assert len(server.seen) <= 2


def test_nobody_there(make: Make) -> None:
    closed = Server("openai")
    closed.server_close()
    answer = one(make(url=f"http://127.0.0.1:{closed.server_port}", tries=2))
    assert answer.error_class == "unreachable"
    assert answer.error == "ConnectError: All connection attempts failed (2 tries)"


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_throttled_request_holds_the_others_as_long_as_the_server_asks(
    server: Server, make: Make, status: int
) -> None:
    good = Reply(said(server.dialect, "Done."))
    server.script = lambda number, _: good if number else Reply(b"", status, {"Retry-After": "0.4"})
    captioner = make(tries=1)
    assert one(captioner).error_class == ("server_error" if status == 503 else "throttled")
    assert {answer.text for answer in answered(captioner, photos(3)).values()} == {"Done."}
    throttled, *others = (seen.at for seen in server.seen)
    assert len(others) == 3
    assert min(others) >= throttled + 0.4


def test_a_throttled_request_is_sent_again_after_its_wait(server: Server, make: Make) -> None:
    good = Reply(said(server.dialect, "Done."))
    server.script = lambda number, _: good if number else Reply(b"", 429, {"Retry-After": "0.4"})
    assert one(make()).text == "Done."
    first, second = (seen.at for seen in server.seen)
    assert second >= first + 0.4


@openai_only
def test_the_answer_after_the_last_try_is_not_kept_back(server: Server, make: Make) -> None:
    server.script = lambda *_: Reply(b"", 429, {"Retry-After": "30"})
    began = time.monotonic()
    assert one(make(tries=1)).error_class == "throttled"
    assert time.monotonic() - began < 15


@openai_only
def test_retry_after_may_be_a_date(server: Server, make: Make) -> None:
    until = int(time.time()) + 2
    date, arrived = format_datetime(datetime.fromtimestamp(until, UTC), usegmt=True), list[float]()

    def script(number: int, _: Seen) -> Reply:
        arrived.append(time.time())
        return Reply(said("openai", "Done.")) if number else Reply(b"", 429, {"Retry-After": date})

    server.script = script
    assert one(make()).text == "Done."
    assert arrived[0] < until <= arrived[1]


@openai_only
@pytest.mark.parametrize(
    "value",
    [
        "3600",
        "inf",
        "nan",
        "-5",
        "soon",
        "",
        "Mon, 01 Jan 2001 00:00:00 -0000",
        "Mon, 01 Jan 2399 00:00:00 GMT",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
    ],
)
def test_an_odd_retry_after_is_capped_or_passed_over(
    server: Server, make: Make, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)
    server.script = lambda number, _: (
        Reply(said("openai", "Done."), 200) if number else Reply(b"", 429, {"Retry-After": value})
    )
    began = time.monotonic()
    assert one(make(tries=2)).text == "Done."
    assert time.monotonic() - began < 5


@openai_only
def test_without_retry_after_waits_double_with_full_jitter_and_hold_the_others(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = list[tuple[float, float]]()

    def longest(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", longest)
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.06)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.3)
    server.script = lambda *_: Reply(b"", 429)
    captioner = make(tries=4)
    one(captioner)
    assert bounds == [(0, 0.06), (0, 0.12), (0, 0.24), (0, 0.3)]
    server.script = lambda *_: Reply(said("openai", "Done."))
    assert one(captioner).text == "Done."
    sent = [seen.at for seen in server.seen]
    assert len(sent) == 5
    for sooner, later, (_, wait) in zip(sent, sent[1:], bounds, strict=False):
        assert later - sooner >= wait


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_is_wrong_for_every_photo_ends_the_run(
    server: Server, make: Make, status: int
) -> None:
    server.script = lambda *_: Reply(refused("no such thing"), status)
    captioner = make()
    for request in photos(3):
        captioner.add(request)
    with pytest.raises(RunError, match="no such thing") as failure:
        captioner.step()
    words = str(failure.value)
    assert words.startswith(server.url)
    assert f" doesn't serve the model eyes-1: status {status}: " in words
    assert words.endswith(f"and the environment variable {VARIABLES[server.dialect]}.")
    assert len(server.seen) <= 3


@openai_only
def test_an_account_without_credit_ends_the_run(server: Server, make: Make) -> None:
    server.script = lambda *_: Reply(
        refused("You exceeded your quota", code="insufficient_quota"), 429
    )
    captioner = make()
    captioner.add(photos(1)[0])
    with pytest.raises(RunError, match="You exceeded your quota"):
        captioner.step()
    assert len(server.seen) == 1


def echo(seen: Seen, status: int, before: int = 0) -> Reply:
    return Reply(b"x" * before + seen.headers["authorization"].encode(), status)


@pytest.mark.parametrize(
    "before", [0, 180, 465], ids=["at once", "where a body is cut", "where an error is cut"]
)
def test_a_key_that_the_server_sends_back_is_in_no_error(
    server: Server, make: Make, before: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script = lambda number, seen: echo(seen, [400, 200, 500][number], before)
    captioner = make(tries=1)
    for error_class, expected in (
        ("bad_request", f"status 400: {'x' * before}Bearer ***"),
        ("bad_answer", f"{NO_JSON}; it began: " + f"{'x' * before}Bearer ***"[:200]),
        ("server_error", f"status 500: {'x' * before}Bearer ***"),
    ):
        answer = one(captioner)
        assert (answer.error_class, answer.error) == (error_class, expected)
    assert KEY not in caplog.text + repr(captioner)


def test_an_error_is_cut(server: Server, make: Make) -> None:
    server.script = lambda *_: Reply(b"x" * 100_000, 400)
    assert one(make()).error == "status 400: " + "x" * 488


def test_a_key_that_the_server_sends_back_is_in_no_caption_and_no_failure(
    server: Server, make: Make
) -> None:
    replies = [
        Reply(said(server.dialect, f"A {KEY} shoe.")),
        Reply(said(server.dialect, 5, note=f"Bearer {KEY}")),
    ]
    server.script = lambda number, seen: [*replies, echo(seen, 401)][number]
    captioner = make(tries=1)
    assert one(captioner).text == "A *** shoe."
    assert KEY[:8] not in str(one(captioner))
    captioner.add(photos(1)[0])
    with pytest.raises(RunError, match=r"\*\*\*") as failure:
        captioner.step()
    assert KEY[:8] not in str(failure.value)


def test_a_short_key_is_no_secret_to_a_caption(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLES[server.dialect], "shoe")
    server.script = lambda number, _: (
        Reply(said(server.dialect, "A shoe.")) if number else Reply(b"no shoe", 400)
    )
    captioner = make()
    assert one(captioner).error == "status 400: no ***"
    assert one(captioner).text == "A shoe."


def test_a_server_of_ones_own_needs_no_key_but_the_providers_does(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = VARIABLES[server.dialect]
    for missing in (None, " \n"):
        monkeypatch.delenv(variable) if missing is None else monkeypatch.setenv(variable, missing)
        assert one(make()).text == "A grey thing."
        with pytest.raises(UsageError, match=f"^The environment variable {variable} isn't set"):
            make(url=None)
    monkeypatch.setenv(variable, f" {KEY}\n")
    make(url=None)
    one(make())
    assert server.seen[-1].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["sk-abc\nsk-def", "sk-abc\N{HORIZONTAL ELLIPSIS}"])
def test_a_key_that_no_header_can_hold_is_not_repeated(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(VARIABLES[server.dialect], key)
    with pytest.raises(UsageError) as failure:
        make()
    variable = VARIABLES[server.dialect]
    assert (
        str(failure.value)
        == f"The environment variable {variable} holds characters that no key has."
    )


def test_a_missing_client_is_said_with_its_command(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, server.dialect, None)
    with pytest.raises(
        UsageError, match=rf"{server.dialect}.* pip install 'vlm4rec_spark\[endpoint\]'$"
    ):
        make()


@openai_only
def test_what_a_reasoning_model_refuses_is_left_out_from_then_on(
    server: Server, make: Make
) -> None:
    def script(number: int, seen: Seen) -> Reply:
        if "max_tokens" in seen.body:
            return Reply(refused("Use it", param="max_tokens", code="unsupported_parameter"), 400)
        if "temperature" in seen.body:
            return Reply(refused("Only 1", param="temperature", code="unsupported_value"), 400)
        if "response_format" in seen.body:
            return Reply(
                refused("No schema", param="response_format", code="unsupported_value"), 400
            )
        return Reply(said("openai", "A shoe."))

    server.script = script
    captioner = make({"type": "object"}, tries=1)
    assert {answer.text for answer in answered(captioner, photos(5)).values()} == {"A shoe."}
    asked = len(server.seen)
    assert one(captioner).text == "A shoe."
    assert len(server.seen) == asked + 1
    assert {key: value for key, value in server.seen[-1].body.items() if key != "messages"} == {
        "model": "eyes-1",
        "max_completion_tokens": 40,
    }


@openai_only
@pytest.mark.parametrize(
    "error",
    [
        {"param": "temperature", "code": "invalid_value"},
        {"param": "messages", "code": "unsupported_value"},
        {"param": ["temperature"], "code": "unsupported_value"},
        {"param": "temperature", "code": {"a": 1}},
    ],
)
def test_no_other_complaint_changes_what_is_asked(
    server: Server, make: Make, error: dict[str, Any]
) -> None:
    server.script = lambda *_: Reply(refused("no", **error), 400)
    captioner = make()
    assert [one(captioner).error_class for _ in range(2)] == ["bad_request"] * 2
    assert [seen.body["temperature"] for seen in server.seen] == [0, 0]


@openai_only
def test_the_minutes_tokens_pace_the_requests(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MINUTE", 0.4)
    monkeypatch.setattr(module, "_FIRST_ESTIMATE", 120)
    # 120 tokens each, of 250: two at once, and the next two when the minute of the first ones is over.
    captioner = make(tokens_per_minute=250)
    assert len(answered(captioner, photos(5))) == 5
    sent = [seen.at for seen in server.seen]
    assert sent[4] - sent[0] >= 0.6  # two minutes, less what the first one took on its way


@openai_only
def test_what_answers_cost_corrects_the_estimate(
    server: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cheaper than thought: the first one goes alone, and then all of them fit into the minute.
    began = time.monotonic()
    assert len(answered(make(tokens_per_minute=1_500), photos(10))) == 10
    assert time.monotonic() - began < 50
    # Dearer than thought: a request that is more than the budget goes, but alone.
    monkeypatch.setattr(module, "_MINUTE", 0.4)
    monkeypatch.setattr(module, "_FIRST_ESTIMATE", 1)
    captioner = make(tokens_per_minute=100)
    one(captioner)
    server.seen.clear()
    assert len(answered(captioner, photos(3))) == 3
    first, _, third = (seen.at for seen in server.seen)
    assert third - first >= 0.6


@openai_only
def test_a_process_ends_though_the_server_hangs(server: Server, make: Make) -> None:
    server.script = lambda _, seen: Reply(
        said("openai", "Done."), stalls=seen.parts[1]["text"] != "Say a."
    )
    code = f"""
from PIL import Image
from vlm4rec_spark.models.captioners import EndpointSettings, Request
from vlm4rec_spark.models.captioners.endpoint import EndpointCaptioner
settings = EndpointSettings(url={server.url!r}, timeout_seconds=600)
captioner, never_asked = EndpointCaptioner("eyes-1", 40, settings), EndpointCaptioner("eyes-1", 40, settings)
never_asked.add(Request("d", Image.new("RGB", (8, 8)), "Say d."))
for key in ("a", "b"):
    captioner.add(Request(key, Image.new("RGB", (8, 8)), f"Say {{key}}."))
print(captioner.step()[0].text)
captioner.add(Request("c", Image.new("RGB", (8, 8)), "Say c."))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("Done.\n", "", 0)


def test_a_models_id_is_its_name_and_nothing_of_the_server() -> None:
    def named(**settings: Any) -> str:
        return ModelSettings(backend="endpoint", **settings).model_id()

    assert named(model="gpt-9") == "gpt-9@endpoint"
    assert named(model="/not/there", revision="b7") == "/not/there@endpoint@b7"
    other = EndpointSettings(
        dialect="anthropic", url="http://a:1/v1", concurrency=2, timeout_seconds=1, tries=1
    )
    assert named(model="gpt-9", endpoint=other) == "gpt-9@endpoint"


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "ftp://a"},
        {"url": "http://me:secret@a/v1"},
        {"url": "http://a/v1?key=secret"},
        {"concurrency": 0},
        {"concurrency": 1_001},
        {"tries": 0},
        {"tries": 21},
        {"timeout_seconds": 0},
        {"tokens_per_minute": 0},
        {"dialect": "gemini"},
        {"key": KEY},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EndpointSettings.model_validate(settings)
