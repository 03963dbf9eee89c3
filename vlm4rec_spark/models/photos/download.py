"""Photos by http and https: many at once, each bounded in time and size. Knows HTTP; knows neither rows nor tables.

Built on the standard library's http.client, which takes a socket that we have opened: `connection` checks where it
leads. No proxy is used, since a proxy would look the host up again. No message holds more of a URL than its host: a
password or a signature may be in the rest.
"""

from __future__ import annotations

import base64
import random
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from typing import TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field

from vlm4rec_spark import __version__
from vlm4rec_spark.models.photos import connection

REDIRECTS = 5
LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever the server asks for."""
_MOVED = (301, 302, 303, 307, 308)
_LITERAL = "/%:@!$&'()*+,;=~?"
"""Left as they are in a path or query: they have a meaning there, or are part of what is encoded already."""


class HttpSettings(BaseModel):
    """How photos are downloaded, and from where they may be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int = Field(16, ge=1)
    """Downloads at a time in each Spark task."""
    timeout_seconds: float = Field(30.0, gt=0, le=3_600)
    """Of one try, from the connection to the last byte, redirects included."""
    tries: int = Field(3, ge=1)
    max_mb: float = Field(50.0, gt=0, le=1_000)
    private_addresses: bool = False


@dataclass(frozen=True)
class Download:
    """A photo's bytes. Times are milliseconds since 1970."""

    image: bytes
    last_modified: int | None
    """As the server says, if it does."""
    answered_at: int
    """By the server's clock where it tells the time, so that the next request can be compared with it."""


class DownloadError(Exception):
    """A photo that can't be had, in words that hold no more of its URL than the host."""


class _Passing(DownloadError):
    """One that may be had soon; `after`: the seconds that the server asks for."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


def is_url(uri: str) -> bool:
    """Whether `fetch` is the one to read it, and not a file system."""
    return uri.strip().lower().startswith(("http:", "https:"))


def fetch(url: str, limits: HttpSettings, since: int | None = None) -> Download | None:
    """The photo at `url`; None when the server says that it hasn't changed since then (milliseconds since 1970).

    What may pass (no connection, no answer in time, 429, 5xx) is tried again. Raises DownloadError.
    """
    for tried in range(1, limits.tries):
        try:
            return _try(url, limits, since)
        except _Passing as failure:
            # Half by chance, so that all those that failed together don't come back together.
            pause = (
                2.0 ** (tried - 1) * random.uniform(0.5, 1)
                if failure.after is None
                else failure.after
            )
            time.sleep(min(pause, LONGEST_WAIT))
    return _try(url, limits, since)


Row = TypeVar("Row")
Result = TypeVar("Result")


def concurrently(work: Callable[[Row], Result], rows: Iterable[Row], most: int) -> Iterator[Result]:
    """work(row) of every row, in the order in which they end; at most `most` are at work or wait to be taken."""
    with ThreadPoolExecutor(most) as pool:
        pending: set[Future[Result]] = set()
        for row in rows:
            if len(pending) == most:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                while done:
                    yield done.pop().result()
            pending.add(pool.submit(work, row))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            while done:
                yield done.pop().result()


def _try(url: str, limits: HttpSettings, since: int | None) -> Download | None:
    deadline = time.monotonic() + limits.timeout_seconds
    try:
        for _ in range(REDIRECTS + 1):
            with _asked(url, limits.private_addresses, since, deadline) as response:
                place = response.getheader("Location")
                if response.status not in _MOVED or not place:
                    return _answer(response, limits, since)
                url = urljoin(url, place)
    except connection.AddressError as refused:
        raise DownloadError(str(refused)) from None
    except TimeoutError:
        raise _Passing(f"no answer within {limits.timeout_seconds:g} s") from None
    except ssl.SSLCertVerificationError as untrusted:
        raise DownloadError(f"the certificate isn't accepted: {untrusted.verify_message}") from None
    except socket.gaierror as unknown:
        raise (_Passing if unknown.errno == socket.EAI_AGAIN else DownloadError)(
            "the host isn't known"
        ) from None
    except OSError as broken:
        raise _Passing(f"the connection failed: {broken.strerror or broken}") from None
    except IncompleteRead:
        raise _Passing("the answer ends early") from None
    except (HTTPException, zlib.error):
        # Without its words: a server that sends the request back would put the URL into them.
        raise _Passing("the answer isn't HTTP") from None
    except ValueError:
        raise DownloadError("it isn't a valid address") from None
    raise DownloadError(f"more than {REDIRECTS} redirects")


@contextmanager
def _asked(url: str, private: bool, since: int | None, deadline: float) -> Iterator[HTTPResponse]:
    """The answer to a GET of the URL, of which the body isn't read yet. Raises ValueError for what is no URL."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https"):
        raise DownloadError("only http and https are read")
    if not parts.hostname:
        raise ValueError
    host, tls = parts.hostname.encode("idna").decode(), parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    target = quote(parts.path or "/", safe=_LITERAL) + (
        f"?{quote(parts.query, safe=_LITERAL)}" if parts.query else ""
    )
    with connection.connect(host, port, tls, private, deadline) as line:
        request = HTTPConnection(host, port)
        request.sock = line
        request.request("GET", target, headers=_headers(parts, host, since))
        with request.getresponse() as response:
            yield response


def _headers(parts: SplitResult, host: str, since: int | None) -> dict[str, str]:
    literal = f"[{host}]" if ":" in host else host
    headers = {
        "Host": literal if parts.port is None else f"{literal}:{parts.port}",
        "User-Agent": f"vlm4rec_spark/{__version__}",
        "Accept": "image/*, */*;q=0.5",
        "Connection": "close",
    }
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    if since is not None:
        headers["If-Modified-Since"] = formatdate(since // 1_000, usegmt=True)
    return headers


def _answer(response: HTTPResponse, limits: HttpSettings, since: int | None) -> Download | None:
    if response.status == 304 and since is not None:
        return None
    if response.status == 429 or response.status >= 500:
        raise _Passing(f"HTTP {response.status}", _retry_after(response))
    if response.status != 200:
        raise DownloadError(f"HTTP {response.status}")
    image = _body(response, int(limits.max_mb * 1e6))
    if image is None:
        raise DownloadError(f"larger than {limits.max_mb:g} MB")
    answered_at = _time(response.getheader("Date"))
    return Download(
        image,
        _time(response.getheader("Last-Modified")),
        int(time.time() * 1_000) if answered_at is None else answered_at,
    )


def _body(response: HTTPResponse, most: int) -> bytes | None:
    """The body, unpacked, or None as soon as it is larger than `most` bytes."""
    if response.length is not None and response.length > most:
        return None
    coding = response.getheader("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise DownloadError("the content is packed in a way that wasn't asked for")
    # 47: either of the two formats, by its first bytes.
    unpacker = None if coding in ("", "identity") else zlib.decompressobj(47)
    body, received = bytearray(), 0
    while piece := response.read(65_536):
        received += len(piece)
        body += unpacker.decompress(piece, most + 1 - len(body)) if unpacker else piece
        # Both: what follows the end of the packed part is kept too.
        if max(len(body), received) > most:
            return None
    # http.client says nothing when the line breaks inside a body whose length it knows.
    if response.length or (unpacker and not unpacker.eof):
        raise IncompleteRead(b"")
    return bytes(body)


def _retry_after(response: HTTPResponse) -> float | None:
    asked = response.getheader("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    at = _time(asked)
    return None if at is None else max(at / 1_000 - time.time(), 0)


def _time(header: str | None) -> int | None:
    try:
        at = parsedate_to_datetime(header or "")
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()) * 1_000
    except (ValueError, OverflowError):
        return None
