"""The endpoint backend against a loopback server that answers, stalls, throttles and fails."""

import base64
import io
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from loopback import ReceivedRequest, Reply, Server, response_body, serving
from PIL import Image
from pydantic import ValidationError

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioning.backends import endpoint as module
from vlm4rec_spark.models.captioning.backends import load_captioner
from vlm4rec_spark.models.captioning.backends.endpoint import EndpointCaptioner
from vlm4rec_spark.models.captioning.captioner import (
    Answer,
    EndpointSettings,
    ModelSettings,
    Request,
)

KEY = "sk-test-0123456789-abcdefghij"
openai_only = pytest.mark.parametrize("dialect", ["openai"])
"""For behaviour that doesn't depend on the dialect."""
GREY = Image.new("RGB", (8, 8), (128, 128, 128))


def error_body(message: str, **fields: Any) -> dict[str, Any]:
    """An error's body, in both dialects."""
    error = {"type": "invalid_request_error", "message": message} | fields
    return {"type": "error", "error": error}


@pytest.fixture(params=["openai", "anthropic"])
def dialect(request) -> str:
    return request.param


@pytest.fixture
def server(dialect: str) -> Iterator[Server]:
    with serving(dialect) as server:
        yield server


Make = Callable[..., EndpointCaptioner]


@pytest.fixture
def make(server: Server, monkeypatch) -> Iterator[Make]:
    """Makes captioners of the server, with short waits."""
    monkeypatch.setenv(server.variable, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    captioners = list[EndpointCaptioner]()

    def make_captioner(
        json_schema: dict[str, Any] | None = None, **options: Any
    ) -> EndpointCaptioner:
        settings = EndpointSettings.model_validate(
            {"dialect": server.dialect, "url": server.url} | options
        )
        model = ModelSettings(
            backend="endpoint", model="eyes-1", max_new_tokens=40, endpoint=settings
        )
        captioner = load_captioner(model, json_schema=json_schema)
        assert isinstance(captioner, EndpointCaptioner)
        captioners.append(captioner)
        return captioner

    yield make_captioner
    for captioner in captioners:
        captioner.close()


def photos(count: int) -> list[Request]:
    return [Request(f"photo-{n}", GREY, f"Say {n}.") for n in range(count)]


def answer_all(captioner: EndpointCaptioner, requests: Sequence[Request]) -> dict[str, Answer]:
    """The answers to concurrent requests. Each key has exactly one."""
    for request in requests:
        captioner.add(request)
    answers = list[Answer]()
    while len(answers) < len(requests):
        new = captioner.step()
        assert new
        answers += new
    by_key = {answer.key: answer for answer in answers}
    assert len(by_key) == len(answers)
    assert by_key.keys() == {request.key for request in requests}
    return by_key


def answer_one(captioner: EndpointCaptioner) -> Answer:
    (answer,) = answer_all(captioner, photos(1)).values()
    return answer


def failed(captioner: EndpointCaptioner, error_class: str) -> str:
    """The error of an answer that has this class and no text."""
    answer = answer_one(captioner)
    assert (answer.text, answer.error_class) == (None, error_class)
    return answer.error or ""


def throttles(seconds: float | str, status: int = 429) -> Reply:
    return Reply(b"", status, {"Retry-After": str(seconds)})


def captions(captioner: EndpointCaptioner, count: int) -> list[str | None]:
    return [answer.text for answer in answer_all(captioner, photos(count)).values()]


def test_the_photo_and_the_prompt_arrive(server, make):
    photo = Image.new("RGB", (60, 40), (250, 10, 10))
    photo.paste((10, 10, 250), (30, 0, 60, 40))
    answers = answer_all(make(), [Request("a", photo, "What is it?\nIn 5 words – “please”.")])
    assert answers == {"a": Answer("a", "A grey thing.", 100, 20)}
    (request,) = server.received
    jpeg = base64.b64decode(request.jpeg.removeprefix("data:image/jpeg;base64,"))
    image = Image.open(io.BytesIO(jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (60, 40))
    assert image.getpixel((10, 20)) == pytest.approx((250, 10, 10), abs=4)
    assert image.getpixel((50, 20)) == pytest.approx((10, 10, 250), abs=4)
    assert request.parts[1] == {"type": "text", "text": "What is it?\nIn 5 words – “please”."}
    assert [message["role"] for message in request.body["messages"]] == ["user"]


def test_each_dialect_has_its_path_and_parameters(server, make):
    answer_one(make())
    (request,) = server.received
    assert KEY in request.headers.get("authorization", "") + request.headers.get("x-api-key", "")
    photo = request.parts[0]
    if server.dialect == "openai":
        assert request.path == "/v1/chat/completions"
        assert request.parameters == {"model": "eyes-1", "max_tokens": 40, "temperature": 0}
        assert photo["type"] == "image_url"
    else:
        assert request.path == "/v1/messages"
        assert request.parameters == {"model": "eyes-1", "max_tokens": 40}
        source = {"type": "base64", "media_type": "image/jpeg", "data": request.jpeg}
        assert photo == {"type": "image", "source": source}


def test_the_json_schema_is_sent_in_the_dialects_way(server, make):
    schema = {"type": "object", "properties": {"kind": {"type": "string"}}}
    server.always(server.says('{"kind": "shoe"}'))
    assert answer_one(make(schema)).text == '{"kind": "shoe"}'
    (request,) = server.received
    if server.dialect == "openai":
        assert request.body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "attributes", "schema": schema, "strict": True},
        }
    else:
        assert request.body["output_config"] == {
            "format": {"type": "json_schema", "schema": schema}
        }


def test_concurrent_requests_have_their_own_answers(server, make):
    barrier = threading.Barrier(4)

    def script(number: int, request: ReceivedRequest) -> Reply:
        barrier.wait(20)  # it breaks unless four requests are here together
        if number < 4:  # gives a fifth one time to come
            time.sleep(0.2)
        tokens = (int(request.prompt[4:-1]), 7)
        return Reply(response_body(server.dialect, f"The {request.prompt}", tokens=tokens))

    server.script = script
    captioner = make(concurrency=4, tries=1)
    assert captioner.max_in_flight == 4
    # Even if it gets more requests, it doesn't send more at a time.
    answers = answer_all(captioner, photos(20))
    assert answers == {f"photo-{n}": Answer(f"photo-{n}", f"The Say {n}.", n, 7) for n in range(20)}
    assert (server.max_busy, len(server.received)) == (4, 20)


def test_step_does_not_wait_for_slow_requests(server, make):
    server.script = lambda _, request: server.says("Done.", stalls=request.prompt == "Say 0.")
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
def test_an_answer_may_be_empty_or_come_in_parts(server, make, content: Any, text: str):
    server.always(server.says(content))
    assert answer_one(make()) == Answer("photo-0", text, 100, 20)


@pytest.mark.parametrize(
    "usage", [{}, {"usage": None}, {"usage": {}}], ids=["missing", "null", "empty"]
)
def test_usage_may_be_missing(
    server,
    make,
    usage: dict[str, Any],
):
    body = response_body(server.dialect, "A shoe.")
    del body["usage"]
    server.always(Reply(body | usage))
    assert answer_one(make()) == Answer("photo-0", "A shoe.", 0, 0)


NO_JSON = "Invalid JSON: expected value at line 1 column 1"
CALL = {"type": "tool_use", "id": "1", "name": "look", "input": {}}
BAD_BODIES = {
    "html": (b"<html>Please\n log in</html>", f"{NO_JSON}; it began: <html>Please log in</html>"),
    "empty": (b"", "Invalid JSON"),
    "truncated": (b'{"choices": [{"message": {"content": "A sh', "Invalid JSON"),
    "not utf-8": (b'{"content": "\xff\xfe"}', "Invalid JSON"),
    "half a character": (
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


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_a_bad_answer_without_retry(server, make, body: Any, message: str):
    content_type = "text/html" if body == BAD_BODIES["html"][0] else "application/json"
    server.always(Reply(body, headers={"Content-Type": content_type}))
    assert message in failed(make(), "bad_answer")
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_a_bad_request_is_not_retried(
    server,
    make,
    status: int,
):
    server.always(Reply(error_body("image  too\n large", code=7), status))
    error = failed(make(), "bad_request")
    assert len(server.received) == 1
    assert error.startswith(f"status {status}: {{")
    assert "image too" in error.replace("\\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("dialect", "body", "error"),
    [
        ("openai", response_body("openai", None, refusal="I'd rather not."), "I'd rather not."),
        ("openai", response_body("openai", "A per", "content_filter"), "content_filter"),
        ("openai", response_body("openai", None, "tool_calls", tool_calls=[CALL]), "tool_calls"),
        ("anthropic", response_body("anthropic", [], "refusal"), "refusal"),
        ("anthropic", response_body("anthropic", "I won't.", "refusal"), "I won't."),
        ("anthropic", response_body("anthropic", [CALL], "tool_use"), "tool_use"),
    ],
)
def test_a_refusal_and_a_tool_call_are_no_text(
    server,
    make,
    body: Any,
    error: str,
):
    server.always(Reply(body))
    failure = ("refusal", f"the model refused: {error}")
    if "tool_" in error:
        failure = ("bad_answer", f"there is no text; it ended by {error}")
    assert answer_one(make()) == Answer("photo-0", None, 100, 20, *failure)
    assert len(server.received) == 1


@openai_only
@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
def test_a_filtered_request_is_a_refusal(
    server,
    make,
    code: str,
):
    server.always(Reply(error_body("no", code=code), 400))
    answer = answer_one(make())
    assert (answer.text, answer.error_class, len(server.received)) == (None, "refusal", 1)
    assert str(answer.error).startswith("status 400: ")
    assert (answer.input_tokens, answer.output_tokens) == (None, None)


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


@pytest.mark.parametrize(("trouble", "error_class", "message"), TROUBLES.values(), ids=TROUBLES)
def test_a_server_in_trouble_is_retried_until_it_recovers(
    server, make, trouble: Reply, error_class: str, message: str
):
    good = server.says("At last.")
    server.script = lambda number, _: trouble if number < 2 or number > 2 else good
    captioner = make(tries=3)
    assert answer_one(captioner) == Answer("photo-0", "At last.", 100, 20)
    assert len(server.received) == 3
    # This time it doesn't recover.
    assert failed(captioner, error_class).endswith(message)
    assert len(server.received) == 6


@pytest.mark.parametrize(
    "hangs",
    [Reply(b"", stalls=True), Reply(b"{}" * 50, trickles=True)],
    ids=["silent", "drop by drop"],
)
def test_a_server_that_hangs_costs_its_timeouts(
    server,
    make,
    hangs: Reply,
):
    server.always(hangs)
    began = time.monotonic()
    answer = answer_one(make(timeout_seconds=0.25, tries=2))
    assert 0.5 <= time.monotonic() - began < 5
    assert answer == Answer(
        "photo-0", None, None, None, "timed_out", "no answer within 0.25 s (2 tries)"
    )
    assert len(server.received) <= 2


def test_a_port_without_a_server_is_unreachable(make):
    closed = Server("openai")
    closed.server_close()
    captioner = make(url=f"http://127.0.0.1:{closed.server_port}", tries=2)
    error = failed(captioner, "unreachable")
    assert error == "ConnectError: All connection attempts failed (2 tries)"


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_throttled_request_delays_the_others_as_long_as_the_server_asks(
    server, make, status: int
):
    server.at_first(throttles(0.4, status))
    captioner = make(tries=1)
    failed(captioner, "server_error" if status == 503 else "throttled")
    assert captions(captioner, 3) == ["Done."] * 3
    throttled, *others = server.times
    assert len(others) == 3
    assert min(others) >= throttled + 0.4


def test_a_throttled_request_is_retried_after_its_wait(server, make):
    server.at_first(throttles(0.4))
    assert answer_one(make()).text == "Done."
    first, second = server.times
    assert second >= first + 0.4


@openai_only
def test_no_wait_follows_the_last_try(server, make):
    server.always(throttles(30))
    began = time.monotonic()
    failed(make(tries=1), "throttled")
    assert time.monotonic() - began < 15


@openai_only
def test_retry_after_may_be_a_date(server, make):
    until = int(time.time()) + 2
    date = format_datetime(datetime.fromtimestamp(until, UTC), usegmt=True)
    arrived = list[float]()

    def script(number: int, _: ReceivedRequest) -> Reply:
        arrived.append(time.time())
        return server.says("Done.") if number else throttles(date)

    server.script = script
    assert answer_one(make()).text == "Done."
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
def test_an_odd_retry_after_is_capped_or_ignored(server, make, value: str, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAIT_SECONDS", 0.05)
    server.at_first(throttles(value))
    began = time.monotonic()
    assert answer_one(make(tries=2)).text == "Done."
    assert time.monotonic() - began < 5


@openai_only
def test_waits_without_retry_after_double_with_full_jitter(
    server,
    make,
    monkeypatch,
):
    ranges = list[tuple[float, float]]()

    def longest(low: float, high: float) -> float:
        ranges.append((low, high))
        return high

    monkeypatch.setattr(random, "uniform", longest)
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.06)
    monkeypatch.setattr(module, "MAX_WAIT_SECONDS", 0.3)
    server.always(Reply(b"", 429))
    captioner = make(tries=4)
    answer_one(captioner)
    assert ranges == [(0, 0.06), (0, 0.12), (0, 0.24), (0, 0.3)]
    server.always(server.says("Done."))
    assert answer_one(captioner).text == "Done."
    sent = server.times
    assert len(sent) == 5
    # The last wait delays the next request.
    for earlier, later, (_, wait) in zip(sent[:-1], sent[1:], ranges, strict=True):
        assert later - earlier >= wait


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_status_that_every_photo_would_get_ends_the_run(
    server,
    make,
    status: int,
):
    server.always(Reply(error_body("no such thing"), status))
    with pytest.raises(RunError, match="no such thing") as failure:
        answer_all(make(), photos(3))
    message = str(failure.value)
    assert message.startswith(server.url)
    assert f" doesn't serve the model eyes-1: status {status}: " in message
    assert message.endswith(f"and the environment variable {server.variable}.")
    assert len(server.received) <= 3


@openai_only
def test_an_account_without_credit_ends_the_run(server, make):
    body = error_body("You exceeded your quota", code="insufficient_quota")
    server.always(Reply(body, 429))
    with pytest.raises(RunError, match="You exceeded your quota"):
        answer_one(make())
    assert len(server.received) == 1


def echo_key(
    request: ReceivedRequest,
    status: int,
    prefix: str = "",
) -> Reply:
    return Reply((prefix + request.headers["authorization"]).encode(), status)


@pytest.mark.parametrize(
    "prefix",
    ["", "x" * 180, "x" * 465],
    ids=["at the start", "where a body is cut", "where an error is cut"],
)
def test_a_returned_key_is_in_no_error(
    server,
    make,
    prefix: str,
    caplog,
):
    caplog.set_level(logging.DEBUG)
    server.script = lambda number, request: echo_key(request, [400, 200, 500][number], prefix)
    captioner = make(tries=1)
    body = f"{prefix}Bearer ***"
    for error_class, error in (
        ("bad_request", f"status 400: {body}"),
        ("bad_answer", f"{NO_JSON}; it began: {body[:200]}"),
        ("server_error", f"status 500: {body}"),
    ):
        answer = answer_one(captioner)
        assert answer == Answer("photo-0", None, error_class=error_class, error=error)
    assert KEY not in caplog.text + repr(captioner)


def test_an_error_is_cut(server, make):
    server.always(Reply(b"x" * 100_000, 400))
    assert answer_one(make()).error == "status 400: " + "x" * 488


def test_a_returned_key_is_in_no_caption_and_no_failure(server, make):
    replies = [
        server.says(f"A {KEY} shoe."),
        Reply(response_body(server.dialect, 5, note=f"Bearer {KEY}")),
    ]
    server.script = lambda number, request: [*replies, echo_key(request, 401)][number]
    captioner = make(tries=1)
    assert answer_one(captioner).text == "A *** shoe."
    assert KEY[:8] not in str(answer_one(captioner))
    with pytest.raises(RunError, match=r"\*\*\*") as failure:
        answer_one(captioner)
    assert KEY[:8] not in str(failure.value)


def test_a_short_key_is_not_removed_from_captions(
    server,
    make,
    monkeypatch,
):
    monkeypatch.setenv(server.variable, "Done")
    server.at_first(Reply(b"not Done", 400))
    captioner = make()
    assert answer_one(captioner).error == "status 400: not ***"
    assert answer_one(captioner).text == "Done."


def test_a_provider_needs_a_key_and_another_server_does_not(server, make, monkeypatch):
    variable = server.variable
    for missing in (None, " \n"):
        monkeypatch.delenv(variable) if missing is None else monkeypatch.setenv(variable, missing)
        assert answer_one(make()).text == "A grey thing."
        with pytest.raises(UsageError, match=f"^The environment variable {variable} isn't set"):
            make(url=None)
    monkeypatch.setenv(variable, f" {KEY}\n")
    make(url=None)
    answer_one(make())
    assert server.received[-1].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["sk-abc\nsk-def", "sk-abc\N{HORIZONTAL ELLIPSIS}"])
def test_a_malformed_key_is_not_repeated(
    server,
    make,
    monkeypatch,
    key: str,
):
    monkeypatch.setenv(server.variable, key)
    with pytest.raises(UsageError) as failure:
        make()
    error = f"The environment variable {server.variable} holds characters that no key has."
    assert str(failure.value) == error


def test_a_missing_client_names_its_pip_command(
    server,
    make,
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, server.dialect, None)
    with pytest.raises(
        UsageError, match=rf"{server.dialect}.* pip install 'vlm4rec_spark\[endpoint\]'$"
    ):
        make()


@openai_only
def test_refused_parameters_are_dropped_or_replaced(server, make):
    refusals = {
        "max_tokens": "unsupported_parameter",
        "temperature": "unsupported_value",
        "response_format": "unsupported_value",
    }

    def script(number: int, request: ReceivedRequest) -> Reply:
        for name, code in refusals.items():
            if name in request.body:
                return Reply(error_body("no", param=name, code=code), 400)
        return server.says("A shoe.")

    server.script = script
    captioner = make({"type": "object"}, tries=1)
    assert captions(captioner, 5) == ["A shoe."] * 5
    count = len(server.received)
    assert answer_one(captioner).text == "A shoe."
    assert len(server.received) == count + 1
    assert server.received[-1].parameters == {"model": "eyes-1", "max_completion_tokens": 40}


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
def test_other_errors_change_no_parameters(
    server,
    make,
    error: dict[str, Any],
):
    server.always(Reply(error_body("no", **error), 400))
    captioner = make()
    for _ in range(2):
        failed(captioner, "bad_request")
    assert [request.body["temperature"] for request in server.received] == [0, 0]


@openai_only
def test_the_tokens_per_minute_delay_requests(
    server,
    make,
    monkeypatch,
):
    monkeypatch.setattr(module, "_MINUTE", 0.4)
    monkeypatch.setattr(module, "_FIRST_ESTIMATE", 120)
    # 120 of 250 tokens per request: two start now, and the next two a minute later.
    captioner = make(tokens_per_minute=250)
    assert len(answer_all(captioner, photos(5))) == 5
    sent = server.times
    assert sent[4] - sent[0] >= 0.6  # two minutes, less the first request's time to arrive


@openai_only
def test_used_tokens_correct_the_estimate(
    server,
    make,
    monkeypatch,
):
    # Cheaper than estimated: after the first one, all fit into the minute.
    began = time.monotonic()
    assert len(answer_all(make(tokens_per_minute=1_500), photos(10))) == 10
    assert time.monotonic() - began < 50
    # More expensive than estimated: a request beyond the budget goes alone.
    monkeypatch.setattr(module, "_MINUTE", 0.4)
    monkeypatch.setattr(module, "_FIRST_ESTIMATE", 1)
    captioner = make(tokens_per_minute=100)
    answer_one(captioner)
    server.received.clear()
    assert len(answer_all(captioner, photos(3))) == 3
    first, _, third = server.times
    assert third - first >= 0.6


@openai_only
def test_a_process_ends_while_the_server_hangs(server, make):
    server.script = lambda _, request: server.says("Done.", stalls=request.prompt != "Say a.")
    code = f"""
from PIL import Image
from vlm4rec_spark.models.captioning.captioner import EndpointSettings, ModelSettings, Request
from vlm4rec_spark.models.captioning.backends.endpoint import EndpointCaptioner
def request(key):
    return Request(key, Image.new("RGB", (8, 8)), f"Say {{key}}.")
endpoint = EndpointSettings(url={server.url!r}, timeout_seconds=600)
settings = ModelSettings(model="eyes-1", max_new_tokens=40, endpoint=endpoint)
captioner = EndpointCaptioner(settings)
never_stepped = EndpointCaptioner(settings)
never_stepped.add(request("d"))
for key in ("a", "b"):
    captioner.add(request(key))
print(captioner.step()[0].text)
captioner.add(request("c"))
"""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (process.stdout, process.stderr, process.returncode) == ("Done.\n", "", 0)


def test_the_model_id_has_the_models_name_and_nothing_of_the_server():
    def model_id(**settings: Any) -> str:
        return ModelSettings(backend="endpoint", **settings).model_id()

    assert model_id(model="gpt-9") == "gpt-9@endpoint"
    assert model_id(model="/not/there", revision="b7") == "/not/there@endpoint@b7"
    endpoint = EndpointSettings(
        dialect="anthropic", url="http://a:1/v1", concurrency=2, timeout_seconds=1, tries=1
    )
    assert model_id(model="gpt-9", endpoint=endpoint) == "gpt-9@endpoint"


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
def test_invalid_settings_are_refused(settings: dict[str, Any]):
    with pytest.raises(ValidationError):
        EndpointSettings.model_validate(settings)
