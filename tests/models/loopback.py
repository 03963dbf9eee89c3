"""A loopback server that speaks the endpoint backend's dialects. A script decides its replies."""

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
    """A response. `cut` closes the connection after that many bytes of the body."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stalls: bool = False
    trickles: bool = False
    cut: int | None = None


@dataclass(frozen=True)
class ReceivedRequest:
    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def parts(self) -> list[dict[str, Any]]:
        return self.body["messages"][0]["content"]

    @property
    def parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self.body.items() if name != "messages"}

    @property
    def prompt(self) -> str:
        return self.parts[1]["text"]

    @property
    def jpeg(self) -> str:
        """In base64, with its data URL prefix if it has one."""
        image = self.parts[0]
        return image["image_url"]["url"] if "image_url" in image else image["source"]["data"]


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, dialect: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.dialect = dialect
        self.received: list[ReceivedRequest] = []
        self.script: Callable[[int, ReceivedRequest], Reply]
        self.always(self.says("A grey thing."))
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.busy = 0
        self.max_busy = 0

    @property
    def variable(self) -> str:
        """The environment variable of its key."""
        return VARIABLES[self.dialect]

    @property
    def times(self) -> list[float]:
        """When the requests came, in seconds."""
        return [request.at for request in self.received]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}" + ("/v1" if self.dialect == "openai" else "")

    def says(
        self,
        text: Any,
        stalls: bool = False,
    ) -> Reply:
        """A response with this text in the server's dialect."""
        return Reply(response_body(self.dialect, text), stalls=stalls)

    def always(self, reply: Reply) -> None:
        self.script = lambda number, request: reply

    def at_first(self, reply: Reply) -> None:
        """The first request gets this reply, and later ones a caption."""
        self.script = lambda number, request: self.says("Done.") if number else reply

    def handle_error(self, *_: Any) -> None:
        """Clients hang up in these tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body comes 40 ms after its headers
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = ReceivedRequest(time.monotonic(), self.path, headers, body)
        with server.lock:
            number = len(server.received)
            server.received.append(request)
            server.busy += 1
            server.max_busy = max(server.max_busy, server.busy)
        try:
            reply = server.script(number, request)
            if reply.stalls:
                server.released.wait(30)
        finally:
            with server.lock:  # before the client can send its next request
                server.busy -= 1
        self.respond(reply)

    def respond(self, reply: Reply) -> None:
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self.send_response(reply.status)
        for name, value in (headers | reply.headers).items():
            self.send_header(name, value)
        if reply.cut is not None:
            self.close_connection = True
            if not reply.cut:
                return
        self.end_headers()
        if reply.trickles:
            while not self.server.released.wait(0.05):
                self.wfile.write(b" ")
        self.wfile.write(data[: reply.cut])

    def log_message(self, *_: Any) -> None:
        pass


def response_body(
    dialect: str,
    content: Any,
    finish_reason: str | None = None,
    tokens: tuple[int, int] = (100, 20),
    **fields: Any,
) -> Any:
    """A response in the dialect. `content` is a text, or anything in its place."""
    if dialect == "openai":
        message = {"role": "assistant", "content": content} | fields
        return {
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason or "stop"}],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]},
        }
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "type": "message",
        "content": blocks,
        "stop_reason": finish_reason or "end_turn",
        "usage": {"input_tokens": tokens[0], "output_tokens": tokens[1]},
    } | fields


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
