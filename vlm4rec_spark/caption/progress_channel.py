"""The channel between a captioning job's driver and tasks: progress one way, a stop the other.

Spark tells a driver nothing of a task before its end, and can't ask a task to end early. Where no
task reaches the driver's port, captions are made all the same. Then progress isn't shown, and a
stop waits for the end of the chunk.
"""

import hmac
import json
import secrets
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

_TIMEOUT_SECONDS = 5.0
_SEND_INTERVAL_SECONDS = 1.0


@dataclass(frozen=True)
class Address:
    """Where the driver listens, and the token by which it knows its own tasks."""

    host: str
    port: int
    token: str


class ProgressServer:
    """The driver's end. `counts` sums up the tasks' reports; `stop` ends them after their batch."""

    def __init__(self, host: str, bind: str = ""):
        """`host` is the driver's name for executors; the server listens at `bind`, or there."""
        self.stop = False
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        token = secrets.token_hex(16)
        progress = self

        class Handler(socketserver.StreamRequestHandler):
            timeout = 600

            def handle(self) -> None:
                with suppress(OSError, ValueError):
                    if not hmac.compare_digest(self.rfile.readline(100).strip(), token.encode()):
                        return
                    while report := self.rfile.readline(10_000):
                        with progress._lock:
                            progress._counts.update(json.loads(report))
                        self.wfile.write(b"stop\n" if progress.stop else b"go\n")

        self._server = socketserver.ThreadingTCPServer((bind or host, 0), Handler)
        self._server.daemon_threads = True
        self.address = Address(host, self._server.server_address[1], token)
        # `close` waits until the server's next look at its own state: this many seconds at most.
        threading.Thread(
            target=self._server.serve_forever,
            args=(0.05,),
            daemon=True,
        ).start()

    @property
    def counts(self) -> Counter[str]:
        with self._lock:
            return Counter(self._counts)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class ProgressClient:
    """A task's end. Reports once a second; silent where the driver can't be reached."""

    def __init__(self, address: Address | None):
        self.stopped = False
        self._unsent: Counter[str] = Counter()
        self._last_sent = 0.0
        self._socket = None if address is None else _connect(address)

    def add(self, counts: Mapping[str, float]) -> None:
        """Add to the next report, and send it when it is due."""
        self._unsent.update(counts)
        if time.monotonic() - self._last_sent > _SEND_INTERVAL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the report, and read whether to stop."""
        self._last_sent = time.monotonic()
        if self._socket is None:
            return
        try:
            self._socket.sendall(json.dumps(self._unsent).encode() + b"\n")
            with self._socket.makefile("rb") as replies:
                self.stopped = replies.readline(10) == b"stop\n"
            self._unsent.clear()
        except OSError:
            self._disconnect()

    def close(self) -> None:
        self.flush()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.close()
        self._socket = None


def _connect(address: Address) -> socket.socket | None:
    try:
        connection = socket.create_connection((address.host, address.port), _TIMEOUT_SECONDS)
    except OSError:
        return None
    try:
        connection.sendall(address.token.encode() + b"\n")
    except OSError:
        connection.close()
        return None
    return connection
