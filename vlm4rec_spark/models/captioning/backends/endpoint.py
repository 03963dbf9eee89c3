"""Captions by a server that speaks OpenAI's or Anthropic's protocol: theirs, or a vLLM or SGLang of one's own.

Knows requests, retries, pace and what a server can do wrong; `dialects.py` knows the protocols.
The key comes from the environment, goes to the server, and is struck out of whatever comes back.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import ValidationError

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioning.backends.dialects import Anthropic, OpenAI
from vlm4rec_spark.models.captioning.captioner import (
    LONGEST_WAIT,
    Answer,
    EndpointSettings,
    Request,
)

_FIRST_WAIT = 1.0
"""Seconds, at most, before the second try; twice as many before each further one. Five tries take up to 15 s so."""
_MINUTE = 60.0
_FIRST_ESTIMATE = 3_000
"""Tokens of a request while none has been answered: LLaVA-NeXT's for a photo of 672 pixels, and few take more."""
_POLL_SECONDS = 0.1
_ERROR_LENGTH = 500
_SHORTEST_SECRET = 8
"""Characters. A local server's key may be `EMPTY` or `none`, which a caption may well say."""
_NOT_ABOUT_THE_PHOTO = {401, 402, 403, 404}
_SLOW_DOWN = {429, 503, 529}
_FILTERED = ("content_filter", "content_policy_violation")


class EndpointCaptioner:
    """`concurrency` requests at once on one event loop, which runs while `step` does: no thread outlives its owner."""

    def __init__(
        self,
        model: str,
        max_new_tokens: int,
        settings: EndpointSettings,
        json_schema: dict[str, Any] | None = None,
    ):
        dialect: type[OpenAI] | type[Anthropic] = (
            Anthropic if settings.dialect == "anthropic" else OpenAI
        )
        self._key = _key(dialect.variable, settings.url)
        try:
            self._dialect = dialect(
                model, max_new_tokens, settings.url, self._key or "none", json_schema
            )
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The endpoint backend needs: pip install 'vlm4rec_spark[endpoint]'"
            ) from None
        self.at_once, self.batch = settings.concurrency, 1
        self.begins: Callable[[Sequence[str]], None] = lambda keys: None
        self._model, self._settings = model, settings
        self._pace, self._room = (
            _Pace(settings.tokens_per_minute),
            asyncio.Semaphore(settings.concurrency),
        )
        self._runner, self._held = asyncio.Runner(), set[asyncio.Task[Answer]]()
        # Called by itself when the process ends: a request on its way then is given up without a complaint.
        self.close = weakref.finalize(self, _hang_up, self._runner, self._dialect.client)

    def add(self, request: Request) -> None:
        jpeg = io.BytesIO()
        request.image.save(jpeg, "JPEG", quality=90)
        serving = self._serve(
            request.key, base64.b64encode(jpeg.getvalue()).decode(), request.prompt
        )
        self.begins([request.key])
        self._held.add(self._runner.get_loop().create_task(serving))

    def step(self) -> list[Answer]:
        done, self._held = self._runner.run(
            asyncio.wait(self._held, return_when=asyncio.FIRST_COMPLETED)
        )
        # All of them are asked: asyncio complains of an exception that nobody has seen.
        for failure in [task.exception() for task in done]:
            if failure:
                raise failure
        return [task.result() for task in done]

    async def _serve(self, key: str, photo: str, prompt: str) -> Answer:
        """The answer to a request, after as many tries as it takes and is allowed."""
        async with self._room:
            for tried in range(1, self._settings.tries + 1):
                spent = await self._pace.turn()
                try:
                    async with asyncio.timeout(self._settings.timeout_seconds):
                        reply = await self._dialect.ask(photo, prompt)
                    return self._answer(key, reply.http_response.content, spent)
                except TimeoutError:
                    words = f"no answer within {self._settings.timeout_seconds:g} s"
                    failure = _Failure("timed_out", words, again=True)
                except self._dialect.library.APIConnectionError as error:
                    cause = error.__cause__
                    words = f"{type(cause).__name__}: {cause}" if cause else str(error)
                    failure = _Failure("unreachable", words, again=True)
                except self._dialect.library.APIStatusError as error:
                    failure = self._failure(error)
                wait = failure.wait + random.uniform(
                    0, min(LONGEST_WAIT, _FIRST_WAIT * 2 ** (tried - 1))
                )
                if failure.everybody:
                    self._pace.hold(wait)
                if not failure.again or tried == self._settings.tries:
                    break
                if not failure.everybody:
                    await asyncio.sleep(wait)
        words = failure.words + (f" ({tried} tries)" if tried > 1 else "")
        return Answer(key, None, error_class=failure.error_class, error=self._clean(words))

    def _answer(self, key: str, body: bytes, spent: _Spent) -> Answer:
        """What the server said with status 200, which need not be an answer."""
        try:
            said = self._dialect.read(body)
        except ValidationError as lie:
            # Not the error's own text, which quotes parts of the body, and with them perhaps parts of a key.
            faults = "; ".join(
                f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in lie.errors()
            )
            begin = self._clean(body.decode(errors="replace"))[:200]
            return Answer(
                key,
                None,
                error_class="bad_answer",
                error=self._clean(f"{faults}; it began: {begin}"),
            )
        tokens = (said.input_tokens, said.output_tokens)
        if any(tokens):
            self._pace.count(spent, sum(tokens))
        if said.refusal is not None:
            return Answer(
                key, None, *tokens, "refusal", self._clean(f"the model refused: {said.refusal}")
            )
        if said.text is None:
            return Answer(
                key,
                None,
                *tokens,
                "bad_answer",
                self._clean(f"there is no text; it ended by {said.end}"),
            )
        text = (
            said.text.replace(self._key, "***") if len(self._key) >= _SHORTEST_SECRET else said.text
        )
        return Answer(key, text, *tokens)

    def _failure(self, error: Any) -> _Failure:
        """What a status that isn't 200 means. Raises RunError where it would be the same for any photo."""
        status, code = error.status_code, getattr(error, "code", None)
        words = f"status {status}: {error.response.text.strip()}"
        if status in _NOT_ABOUT_THE_PHOTO or code == "insufficient_quota":
            raise RunError(
                f"{self._dialect.client.base_url} doesn't serve the model {self._model}: {self._clean(words)}. "
                "See caption.model.model, caption.model.endpoint.url and the environment variable "
                f"{self._dialect.variable}."
            ) from None
        if status in _SLOW_DOWN:
            name = "server_error" if status == 503 else "throttled"
            return _Failure(
                name, words, again=True, everybody=True, wait=_wait_asked(error.response.headers)
            )
        if status >= 500:
            return _Failure("server_error", words, again=True)
        if status == 408:
            return _Failure("timed_out", words, again=True)
        if status < 400:
            return _Failure("bad_answer", words)
        return _Failure("refusal" if code in _FILTERED else "bad_request", words)

    def _clean(self, words: str) -> str:
        """Without the key and on one line; cut last, or half a key might be left."""
        without = words.replace(self._key, "***") if self._key else words
        return " ".join(without.split())[:_ERROR_LENGTH]


@dataclass(frozen=True)
class _Failure:
    error_class: str
    words: str
    again: bool = False
    everybody: bool = False
    """Whether the other requests shall wait as well."""
    wait: float = 0.0
    """Seconds that the server asks for."""


@dataclass
class _Spent:
    at: float
    tokens: float


class _Pace:
    """When the next request may go: not while a throttled one waits, nor beyond the minute's tokens."""

    def __init__(self, tokens_per_minute: int | None):
        self._budget, self._spent = tokens_per_minute, deque[_Spent]()
        self._mean, self._answered = float(_FIRST_ESTIMATE), 0
        self._not_before, self._queue = 0.0, asyncio.Lock()

    async def turn(self) -> _Spent:
        """Wait. What the request will cost is an estimate, which stands where it fails: providers count tries too."""
        async with (
            self._queue
        ):  # in the order in which they came; and none is sent while another one waits
            while (wait := max(self._not_before - time.monotonic(), self._short_of_tokens())) > 0:
                await asyncio.sleep(wait)
            self._spent.append(_Spent(time.monotonic(), self._mean))
            return self._spent[-1]

    def hold(self, seconds: float) -> None:
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def count(self, spent: _Spent, tokens: int) -> None:
        """Put what the answer has cost in place of the estimate."""
        self._answered += 1
        self._mean += (tokens - self._mean) / self._answered
        spent.tokens = tokens

    def _short_of_tokens(self) -> float:
        """Seconds after which to look again: a minute passes, but an answer may as well have been cheap."""
        while self._spent and self._spent[0].at <= time.monotonic() - _MINUTE:
            self._spent.popleft()
        if self._budget is None or not self._spent:  # a single request may be more than the budget
            return 0.0
        return (
            _POLL_SECONDS
            if sum(each.tokens for each in self._spent) + self._mean > self._budget
            else 0.0
        )


def _key(variable: str, url: str | None) -> str:
    """The key, "" where there is none. Raises UsageError where there must be one."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):  # the client would quote it in its error
        raise UsageError(f"The environment variable {variable} holds characters that no key has.")
    if not key and url is None:
        raise UsageError(
            f"The environment variable {variable} isn't set: the captioner needs a key, or the url of a "
            "server of your own in caption.model.endpoint.url."
        )
    return key


def _wait_asked(headers: Any) -> float:
    """Seconds of Retry-After, which are a number or a date; 0 where it is missing or is neither."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, min(seconds, LONGEST_WAIT))


def _hang_up(runner: asyncio.Runner, client: Any) -> None:
    for task in asyncio.all_tasks(
        runner.get_loop()
    ):  # before the loop runs again, and begins what has only been added
        task.cancel()
    runner.run(client.close())
    runner.close()
