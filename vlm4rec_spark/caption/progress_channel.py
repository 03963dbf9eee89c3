"""The line between the driver and the tasks of a captioning job: they say how far they are, it may say stop.

Spark tells a driver nothing of a task before its end, and a task can't be asked to end early. Where no task can reach
the driver's port, captions are made all the same; then nothing is said meanwhile, and a stop waits for the chunk's end.
"""

from __future__ import annotations

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
_EVERY_SECONDS = 1.0


@dataclass(frozen=True)
class Address:
    """Where the driver listens, and the word by which it knows its own tasks."""

    host: str
    port: int
    token: str


class ProgressServer:
    """The driver's end. `counts` sums up what the tasks have said; set `stop` to end them after their batch."""

    def __init__(self, host: str, bind: str = ""):
        """`host` is the driver's name among the executors; it listens at `bind`, or there."""
        self.stop = False
        self._said: Counter[str] = Counter()
        self._lock, token = threading.Lock(), secrets.token_hex(16)
        line = self

        class Handler(socketserver.StreamRequestHandler):
            timeout = 600

            def handle(self) -> None:
                with suppress(OSError, ValueError):
                    if not hmac.compare_digest(self.rfile.readline(100).strip(), token.encode()):
                        return
                    while said := self.rfile.readline(10_000):
                        line._hear(json.loads(said))
                        self.wfile.write(b"stop\n" if line.stop else b"go\n")

        self._server = socketserver.ThreadingTCPServer((bind or host, 0), Handler)
        self._server.daemon_threads = True
        self.address = Address(host, self._server.server_address[1], token)
        # `close` waits as long as the server looks up.
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def counts(self) -> Counter[str]:
        with self._lock:
            return Counter(self._said)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _hear(self, said: Mapping[str, float]) -> None:
        with self._lock:
            self._said.update(said)


class ProgressClient:
    """A task's end. Says once a second what there is to say; silent where the driver can't be reached."""

    def __init__(self, address: Address | None):
        self.stopped = False
        self._unsaid: Counter[str] = Counter()
        self._last, self._socket = 0.0, None if address is None else _connected(address)
        self._answers = self._socket.makefile("rb") if self._socket else None

    def say(self, counts: Mapping[str, float]) -> None:
        """Add to what is said with the next call, and make it when it is due."""
        self._unsaid.update(counts)
        if time.monotonic() - self._last > _EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Say what is unsaid, and hear whether to stop."""
        self._last = time.monotonic()
        if self._socket is None or self._answers is None:
            return
        try:
            self._socket.sendall(json.dumps(self._unsaid).encode() + b"\n")
            self.stopped = self._answers.readline(10) == b"stop\n"
            self._unsaid.clear()
        except OSError:
            self._hang_up()

    def close(self) -> None:
        self.flush()
        self._hang_up()

    def _hang_up(self) -> None:
        for end in (self._answers, self._socket):
            if end is not None:
                with suppress(OSError):
                    end.close()
        self._answers = self._socket = None


def _connected(address: Address) -> socket.socket | None:
    try:
        wire = socket.create_connection((address.host, address.port), _TIMEOUT_SECONDS)
    except OSError:
        return None
    try:
        wire.sendall(address.token.encode() + b"\n")
    except OSError:
        wire.close()
        return None
    return wire
