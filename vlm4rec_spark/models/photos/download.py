"""Photos by http and https: many at a time, each bounded in time and size. Knows no rows or tables.

Built on the standard library's http.client, which accepts an open socket: `connection` checks where
it leads. No proxy is used, since a proxy would resolve the host again. No message holds more of a
URL than its host, since the rest may hold a password or a signature.
"""

import base64
import random
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from typing import TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from pydantic import Field

from vlm4rec_spark import __version__
from vlm4rec_spark.models.photos import connection
from vlm4rec_spark.settings_base import Settings

REDIRECTS = 5
MAX_PAUSE = 60.0
"""Seconds between two tries, whatever the server asks for."""
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_UNQUOTED = "/%:@!$&'()*+,;=~?"
"""Not quoted in a path or query. They have a meaning there, or belong to what is quoted already."""


class HttpSettings(Settings):
    """How photos are downloaded, and from where they may come."""

    concurrency: int = Field(16, ge=1)
    """Simultaneous downloads in each Spark task."""
    timeout_seconds: float = Field(30.0, gt=0, le=3_600)
    """For one try, from the connection to the last byte, with redirects."""
    tries: int = Field(3, ge=1)
    max_mb: float = Field(50.0, gt=0, le=1_000)
    private_addresses: bool = False


@dataclass(frozen=True)
class Download:
    """A photo's bytes. Times are milliseconds since 1970."""

    image: bytes
    last_modified: int | None
    """As the server states it; None if it doesn't."""
    answered_at: int
    """By the server's clock if the answer has a time, so that the next request can refer to it."""


class DownloadError(Exception):
    """A download that failed. The message holds no more of the URL than its host."""


class _TransientError(DownloadError):
    """A failure that may pass. `retry_after` is the pause in seconds that the server asks for."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


def is_url(uri: str) -> bool:
    """Whether it is read by `fetch` and not from a file system."""
    return uri.strip().lower().startswith(("http:", "https:"))


def fetch(url: str, limits: HttpSettings, since: int | None = None) -> Download | None:
    """The photo at `url`, or None if the server says that it hasn't changed.

    `since` is the time to compare with, in milliseconds since 1970. Failures that may pass are
    retried: no connection, no answer in time, 429, 5xx. Raises DownloadError.
    """
    for retries in range(limits.tries - 1):
        try:
            return _fetch_once(url, limits, since)
        except _TransientError as failure:
            pause = failure.retry_after
            if pause is None:
                # Random, so that requests that failed together don't come back together.
                pause = 2.0**retries * random.uniform(0.5, 1)
            time.sleep(min(pause, MAX_PAUSE))
    return _fetch_once(url, limits, since)


Row = TypeVar("Row")
Result = TypeVar("Result")


def concurrently(
    work: Callable[[Row], Result], rows: Iterable[Row], max_pending: int
) -> Iterator[Result]:
    """work(row) of every row, in the order of completion.

    At most `max_pending` rows are in work or wait to be consumed.
    """
    with ThreadPoolExecutor(max_pending) as pool:
        pending: set[Future[Result]] = set()
        for row in rows:
            if len(pending) == max_pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                while done:
                    yield done.pop().result()
            pending.add(pool.submit(work, row))
        for future in as_completed(pending):
            yield future.result()


def _fetch_once(url: str, limits: HttpSettings, since: int | None) -> Download | None:
    """One try of `fetch`. Raises _TransientError if another may succeed."""
    deadline = time.monotonic() + limits.timeout_seconds
    try:
        for _ in range(REDIRECTS + 1):
            with _request(url, limits.private_addresses, since, deadline) as response:
                target = response.getheader("Location")
                if response.status not in _REDIRECT_STATUSES or not target:
                    return _answer(response, limits, since)
                url = urljoin(url, target)
    except connection.AddressError as refused:
        raise DownloadError(str(refused)) from None
    except TimeoutError:
        raise _TransientError(f"no answer within {limits.timeout_seconds:g} s") from None
    except ssl.SSLCertVerificationError as untrusted:
        raise DownloadError(f"the certificate isn't accepted: {untrusted.verify_message}") from None
    except socket.gaierror as unknown:
        error_class = _TransientError if unknown.errno == socket.EAI_AGAIN else DownloadError
        raise error_class("the host isn't known") from None
    except OSError as broken:
        raise _TransientError(f"the connection failed: {broken.strerror or broken}") from None
    except IncompleteRead:
        raise _TransientError("the answer ends early") from None
    except (HTTPException, zlib.error):
        # Without the error's text: if a server echoes the request, the text holds the URL.
        raise _TransientError("the answer isn't HTTP") from None
    except ValueError:
        raise DownloadError("it isn't a valid address") from None
    raise DownloadError(f"more than {REDIRECTS} redirects")


@contextmanager
def _request(url: str, private: bool, since: int | None, deadline: float) -> Iterator[HTTPResponse]:
    """The answer to a GET of the URL, the body unread. Raises ValueError for an invalid URL."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https"):
        raise DownloadError("only http and https are read")
    if not parts.hostname:
        raise ValueError
    host = parts.hostname.encode("idna").decode()
    tls = parts.scheme == "https"
    default_port = 443 if tls else 80
    port = parts.port or default_port
    target = quote(parts.path or "/", safe=_UNQUOTED)
    if parts.query:
        target += f"?{quote(parts.query, safe=_UNQUOTED)}"
    with connection.connect(host, port, tls, private, deadline) as sock:
        request = HTTPConnection(host, port)
        request.default_port = default_port  # left out of the header Host
        request.sock = sock
        request.request("GET", target, headers=_headers(parts, since))
        with request.getresponse() as response:
            yield response


def _headers(parts: SplitResult, since: int | None) -> dict[str, str]:
    headers = {
        "User-Agent": f"vlm4rec_spark/{__version__}",
        "Accept": "image/*, */*;q=0.5",
        "Connection": "close",
    }
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    if since is not None:
        headers["If-Modified-Since"] = formatdate(since // 1_000, usegmt=True)
    return headers


def _answer(response: HTTPResponse, limits: HttpSettings, since: int | None) -> Download | None:
    if response.status == 304 and since is not None:
        return None
    if response.status == 429 or response.status >= 500:
        raise _TransientError(f"HTTP {response.status}", _retry_after(response))
    if response.status != 200:
        raise DownloadError(f"HTTP {response.status}")
    image = _body(response, int(limits.max_mb * 1e6))
    if image is None:
        raise DownloadError(f"larger than {limits.max_mb:g} MB")
    answered_at = _milliseconds(response.getheader("Date"))
    if answered_at is None:
        answered_at = int(time.time() * 1_000)
    return Download(image, _milliseconds(response.getheader("Last-Modified")), answered_at)


def _body(response: HTTPResponse, max_bytes: int) -> bytes | None:
    """The body, decompressed, or None as soon as it is larger than `max_bytes`."""
    if response.length is not None and response.length > max_bytes:
        return None
    encoding = response.getheader("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise DownloadError("the content is compressed in a way that wasn't asked for")
    # 47: gzip or zlib, by the first bytes.
    decompressor = None if encoding in ("", "identity") else zlib.decompressobj(47)
    body = bytearray()
    received = 0
    while chunk := response.read(65_536):
        received += len(chunk)
        if decompressor:
            chunk = decompressor.decompress(chunk, max_bytes + 1 - len(body))
        body += chunk
        # Both, since bytes after the end of the compressed part are kept in memory too.
        if max(len(body), received) > max_bytes:
            return None
    # http.client raises nothing if the connection breaks inside a body of known length.
    if response.length or (decompressor and not decompressor.eof):
        raise IncompleteRead(b"")
    return bytes(body)


def _retry_after(response: HTTPResponse) -> float | None:
    """The pause in seconds that the server asks for."""
    header = response.getheader("Retry-After", "").strip()
    if header.isdecimal():
        return float(header)
    retry_at = _milliseconds(header)
    return None if retry_at is None else max(retry_at / 1_000 - time.time(), 0)


def _milliseconds(header: str | None) -> int | None:
    """Milliseconds since 1970 of an HTTP date; None if it is none."""
    try:
        date = parsedate_to_datetime(header or "")
        return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()) * 1_000
    except (ValueError, OverflowError):
        return None
