"""A server of the endpoint backend's dialects on loopback, which does with each request what a script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


@dataclass
class Reply:
    """What the server does with a request: wait, then answer, or `cut` the connection after so many bytes."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stalls: bool = False
    trickles: bool = False
    cut: int | None = None


@dataclass(frozen=True)
class Seen:
    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def parts(self) -> list[dict[str, Any]]:
        return self.body["messages"][0]["content"]

    @property
    def jpeg(self) -> str:
        """In base64, with what stands before it."""
        image = self.parts[0]
        return image["image_url"]["url"] if "image_url" in image else image["source"]["data"]


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, dialect: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.dialect, self.seen, self.released = dialect, list[Seen](), threading.Event()
        self.script: Callable[[int, Seen], Reply] = lambda number, seen: Reply(
            said(self.dialect, "A grey thing.")
        )
        self.lock, self.busy, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}" + ("/v1" if self.dialect == "openai" else "")

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what is tested here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body comes 40 ms after its headers
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            seen = Seen(
                time.monotonic(), self.path, {k.lower(): v for k, v in self.headers.items()}, body
            )
            server.seen.append(seen)
            number, server.busy = len(server.seen) - 1, server.busy + 1
            server.most = max(server.most, server.busy)
        try:
            reply = server.script(number, seen)
            if reply.stalls:
                server.released.wait(30)
        finally:
            with server.lock:  # before the client can know, and send the next one
                server.busy -= 1
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
        } | reply.headers
        for name, value in headers.items():
            self.send_header(name, value)
        if reply.cut is not None:
            self.close_connection = True
            if not reply.cut:
                return
        self.end_headers()
        if reply.trickles:
            while not server.released.wait(0.05):
                self.wfile.write(b" ")
        self.wfile.write(data[: reply.cut])

    def log_message(self, *_: Any) -> None:
        pass


def said(
    dialect: str,
    content: Any,
    end: str | None = None,
    tokens: tuple[int, int] = (100, 20),
    **more: Any,
) -> Any:
    """A reply of the dialect with this content: a text, or whatever stands in its place."""
    if dialect == "openai":
        usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        message = {"role": "assistant", "content": content} | more
        return {
            "choices": [{"index": 0, "message": message, "finish_reason": end or "stop"}],
            "usage": usage,
        }
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    usage = {"input_tokens": tokens[0], "output_tokens": tokens[1]}
    return {
        "type": "message",
        "content": blocks,
        "stop_reason": end or "end_turn",
        "usage": usage,
    } | more


@contextmanager
def serving(dialect: str) -> Iterator[Server]:
    server = Server(dialect)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()
