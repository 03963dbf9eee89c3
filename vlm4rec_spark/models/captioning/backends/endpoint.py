"""Captions from a server with OpenAI's or Anthropic's protocol.

It can be a provider, or your own vLLM or SGLang.
Knows retries, rate limits and server errors; `dialects.py` knows the protocols.
The key comes from the environment, goes only to the server, and is removed from all responses.
"""

import asyncio
import base64
import io
import os
import random
import time
import weakref
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import ValidationError

from vlm4rec_spark.errors import RunError, UsageError
from vlm4rec_spark.models.captioning.backends.dialects import Anthropic, OpenAI
from vlm4rec_spark.models.captioning.captioner import (
    MAX_WAIT_SECONDS,
    Answer,
    Captioner,
    ModelSettings,
    Request,
)

_FIRST_WAIT = 1.0
"""The longest wait in seconds before the second try. It doubles each time: 15 s for five tries."""
_MINUTE = 60.0
_FIRST_ESTIMATE = 3_000
"""Tokens of a request before the first answer: LLaVA-NeXT's for 672 pixels. Few take more."""
_POLL_SECONDS = 0.1
_MAX_ERROR_LENGTH = 500
_MIN_SECRET_LENGTH = 8
"""Characters. A local server's key may be `EMPTY` or `none`, words that captions may contain."""
_FATAL_STATUSES = {401, 402, 403, 404}
"""Statuses that any photo would get."""
_OVERLOADED = {429, 503, 529}
_FILTER_CODES = ("content_filter", "content_policy_violation")


@dataclass(frozen=True)
class _Failure:
    error_class: str
    message: str
    transient: bool = False
    """Another try may succeed."""
    overloaded: bool = False
    """The other requests must wait as well."""
    retry_after: float = 0.0
    """Seconds that the server asks for."""


@dataclass
class _Reservation:
    """Tokens that a request uses, or may use, of the minute's budget."""

    at: float
    tokens: float


class _RateLimit:
    """Delays requests: during a pause, and while the minute's tokens are used up."""

    def __init__(self, tokens_per_minute: int | None):
        self._budget = tokens_per_minute
        self._reservations = deque[_Reservation]()
        self._mean_tokens = float(_FIRST_ESTIMATE)
        self._answered = 0
        self._paused_until = 0.0
        self._lock = asyncio.Lock()

    async def acquire(self) -> _Reservation:
        """Wait for a request's turn and reserve an estimate of its tokens.

        A failed request doesn't give them back: providers count failed tries too.
        """
        async with self._lock:  # first come, first served
            while (wait := max(self._paused_until - time.monotonic(), self._token_wait())) > 0:
                await asyncio.sleep(wait)
            reservation = _Reservation(time.monotonic(), self._mean_tokens)
            self._reservations.append(reservation)
            return reservation

    def pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def settle(self, reservation: _Reservation, tokens: int) -> None:
        """Replace the estimate by the tokens that were used."""
        self._answered += 1
        self._mean_tokens += (tokens - self._mean_tokens) / self._answered
        reservation.tokens = tokens

    def _token_wait(self) -> float:
        """Seconds until the next check. Short, because a cheap answer can free tokens any time."""
        while self._reservations and self._reservations[0].at <= time.monotonic() - _MINUTE:
            self._reservations.popleft()
        if self._budget is None or not self._reservations:
            return 0.0  # a single request may exceed the budget
        reserved = sum(reservation.tokens for reservation in self._reservations)
        return _POLL_SECONDS if reserved + self._mean_tokens > self._budget else 0.0


class EndpointCaptioner(Captioner):
    """Up to `concurrency` open requests. Their event loop runs inside `step`: no thread needed."""

    def __init__(self, model: ModelSettings, json_schema: dict[str, Any] | None = None):
        settings = model.endpoint
        dialect: type[OpenAI] | type[Anthropic] = OpenAI
        if settings.dialect == "anthropic":
            dialect = Anthropic
        self._key = _read_key(dialect.key_variable, settings.url)
        try:
            self._dialect = dialect(model, self._key or "none", json_schema)
        except ImportError as missing:
            raise UsageError(
                f"{missing}. The endpoint backend needs: pip install 'vlm4rec_spark[endpoint]'"
            ) from None
        self.max_in_flight = settings.concurrency
        self.batch_size = 1
        self._model = model.model
        self._settings = settings
        self._rate_limit = _RateLimit(settings.tokens_per_minute)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._runner = asyncio.Runner()
        self._tasks = set[asyncio.Task[Answer]]()
        # Also runs when the process ends, which then drops open requests without warnings.
        self.close = weakref.finalize(self, _hang_up, self._runner, self._dialect.client)

    def add(self, request: Request) -> None:
        jpeg = io.BytesIO()
        request.image.save(jpeg, "JPEG", quality=90)
        photo = base64.b64encode(jpeg.getvalue()).decode()
        self.on_begin([request.key])
        answering = self._answer(request.key, photo, request.prompt)
        self._tasks.add(self._runner.get_loop().create_task(answering))

    def step(self) -> list[Answer]:
        done, self._tasks = self._runner.run(
            asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        )
        # Read all exceptions: asyncio warns of those that nobody reads.
        for failure in [task.exception() for task in done]:
            if failure:
                raise failure
        return [task.result() for task in done]

    async def _answer(self, key: str, photo: str, prompt: str) -> Answer:
        """The answer to a request, after the allowed number of tries at most."""
        async with self._slots:
            for attempt in range(1, self._settings.tries + 1):
                outcome = await self._try(key, photo, prompt)
                if isinstance(outcome, Answer):
                    return outcome
                failure = outcome
                longest = min(MAX_WAIT_SECONDS, _FIRST_WAIT * 2 ** (attempt - 1))
                wait = failure.retry_after + random.uniform(0, longest)
                if failure.overloaded:
                    self._rate_limit.pause(wait)
                if not failure.transient or attempt == self._settings.tries:
                    break
                if not failure.overloaded:
                    await asyncio.sleep(wait)
        tries = f" ({attempt} tries)" if attempt > 1 else ""
        error = self._clean(failure.message + tries)
        return Answer(key, None, error_class=failure.error_class, error=error)

    async def _try(self, key: str, photo: str, prompt: str) -> Answer | _Failure:
        reservation = await self._rate_limit.acquire()
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                response = await self._dialect.send(photo, prompt)
        except TimeoutError:
            message = f"no answer within {self._settings.timeout_seconds:g} s"
            return _Failure("timed_out", message, transient=True)
        except self._dialect.library.APIConnectionError as error:
            cause = error.__cause__
            message = f"{type(cause).__name__}: {cause}" if cause else str(error)
            return _Failure("unreachable", message, transient=True)
        except self._dialect.library.APIStatusError as error:
            return self._status_failure(error)
        return self._read(key, response.http_response.content, reservation)

    def _read(self, key: str, body: bytes, reservation: _Reservation) -> Answer:
        """The answer in a response of status 200, which may be an error."""
        try:
            response = self._dialect.parse(body)
        except ValidationError as failure:
            # Not the error's own text: it quotes the body, and so perhaps parts of a key.
            error = self._clean(f"{_reasons(failure)}; it began: {self._clean(body)[:200]}")
            return Answer(key, None, error_class="bad_answer", error=error)
        tokens = (response.input_tokens, response.output_tokens)
        if any(tokens):
            self._rate_limit.settle(reservation, sum(tokens))
        if response.refusal is not None:
            error = self._clean(f"the model refused: {response.refusal}")
            return Answer(key, None, *tokens, "refusal", error)
        if response.text is None:
            error = self._clean(f"there is no text; it ended by {response.finish_reason}")
            return Answer(key, None, *tokens, "bad_answer", error)
        text = response.text
        if len(self._key) >= _MIN_SECRET_LENGTH:
            text = text.replace(self._key, "***")
        return Answer(key, text, *tokens)

    def _status_failure(self, error: Any) -> _Failure:
        """What another status than 200 means. Raises RunError if any photo would get it."""
        status = error.status_code
        code = getattr(error, "code", None)
        message = f"status {status}: {error.response.text.strip()}"
        if status in _FATAL_STATUSES or code == "insufficient_quota":
            raise RunError(
                f"{self._dialect.client.base_url} doesn't serve the model {self._model}: "
                f"{self._clean(message)}. See caption.model.model, caption.model.endpoint.url "
                f"and the environment variable {self._dialect.key_variable}."
            ) from None
        if status in _OVERLOADED:
            name = "server_error" if status == 503 else "throttled"
            retry_after = _retry_after(error.response.headers)
            return _Failure(name, message, transient=True, overloaded=True, retry_after=retry_after)
        if status >= 500:
            return _Failure("server_error", message, transient=True)
        if status == 408:
            return _Failure("timed_out", message, transient=True)
        if status < 400:
            return _Failure("bad_answer", message)
        return _Failure("refusal" if code in _FILTER_CODES else "bad_request", message)

    def _clean(self, message: str | bytes) -> str:
        """On one line, without the key. Cut last, or half a key could remain."""
        text = message if isinstance(message, str) else message.decode(errors="replace")
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_MAX_ERROR_LENGTH]


def _read_key(variable: str, url: str | None) -> str:
    """The key, or "" if there is none. Raises UsageError if there must be one."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):  # the client would quote it in its error
        raise UsageError(f"The environment variable {variable} holds characters that no key has.")
    if not key and url is None:
        raise UsageError(
            f"The environment variable {variable} isn't set: the captioner needs a key, "
            "or the url of a server of your own in caption.model.endpoint.url."
        )
    return key


def _reasons(failure: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, error['loc']))} {error['msg']}".strip() for error in failure.errors()
    )


def _retry_after(headers: Any) -> float:
    """Seconds of Retry-After, which is a number or a date; 0 if it is missing or neither."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, min(seconds, MAX_WAIT_SECONDS))


def _hang_up(runner: asyncio.Runner, client: Any) -> None:
    # Cancel before the loop runs again, or it would start requests that were only added.
    for task in asyncio.all_tasks(runner.get_loop()):
        task.cancel()
    runner.run(client.close())
    runner.close()
