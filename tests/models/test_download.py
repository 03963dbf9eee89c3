"""Downloads against a real server on this machine: what arrives, what is refused, and what the messages don't say."""

from __future__ import annotations

import base64
import gzip
import re
import socket
import ssl
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm4rec_spark.models.photos import connection, download
from vlm4rec_spark.models.photos.download import (
    Download,
    DownloadError,
    HttpSettings,
    concurrently,
    fetch,
)

ONCE = HttpSettings(private_addresses=True, tries=1, timeout_seconds=5, max_mb=0.1)
HURRIED = ONCE.model_copy(update={"timeout_seconds": 0.4})
SECOND = 1_000
NOON = 1_735_732_800 * SECOND  # 2025-01-01, 12:00
NOON_TEXT = "Wed, 01 Jan 2025 12:00:00 GMT"
IDENTITY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgl+54aCWJ1h+ZT+/9
E97SLTGhMULp3V3NpcJLSRI2DaShRANCAAT1e7SqvFXC3h2vy0ppxWPyKWa/Ue1d
6D3TEH3qy9wXUmvfqskWFtfTBuFiycZi9vvMcefQA6+V3nkWgPIhSWtq
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkTCCATigAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPV7tKq8VcLeHa/L
SmnFY/IpZr9R7V3oPdMQferL3BdSa9+qyRYW19MG4WLJxmL2+8xx59ADr5XeeRaA
8iFJa2qjeTB3MBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/
MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQU09CmFjVNa+CaJa5lCRCeL4OycqAw
HwYDVR0jBBgwFoAU09CmFjVNa+CaJa5lCRCeL4OycqAwCgYIKoZIzj0EAwIDRwAw
RAIgF3J4QjkuwPSvVGIFTDde+o2MrXdxUzWmsGftDN2LvkYCIBg9ggNocBY5VRQA
V5u4NvnLeaF8dmTWRUIvHdUmnkEW
-----END CERTIFICATE-----
"""
"""Of nothing but these tests, for localhost, from 2020 to 2120."""

Respond = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers a path with what `routes` has for it, in turn if that is a list; remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, Respond | list[Respond]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        self.server.times.append(time.monotonic())
        found = self.server.routes[self.path.partition("?")[0]]
        (found.pop(0) if isinstance(found, list) else found)(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started
        started.closing.set()
        started.shutdown()


def says(status: int, body: bytes = b"", /, length: int | None = None, **headers: str) -> Respond:
    """A whole answer, or one that claims another length; `Last_Modified` stands for Last-Modified."""

    def respond(handler: Handler) -> None:
        handler.send_response_only(status)
        for name, value in {
            "Content-Length": str(len(body) if length is None else length),
            **headers,
        }.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def streams(piece: bytes, pause: float = 0.0, **headers: str) -> Respond:
    """A body that never ends, in chunks."""

    def respond(handler: Handler) -> None:
        says(200, length=0, Transfer_Encoding="chunked", **headers)(handler)
        while not handler.server.closing.wait(pause):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    return respond


def writes(data: bytes, pause: float = 0.0) -> Respond:
    """These bytes as the whole answer, then nothing more or the end; with a pause one by one, again and again."""

    def respond(handler: Handler) -> None:
        if not pause:
            handler.wfile.write(data)
        while pause and not handler.server.closing.wait(pause):
            for byte in data:
                handler.wfile.write(bytes([byte]))
                if handler.server.closing.wait(pause):
                    return

    return respond


def stalls(handler: Handler) -> None:
    handler.server.closing.wait(10)


def echoes(handler: Handler) -> None:
    handler.wfile.write(handler.raw_requestline)


def refusal(url: str, limits: HttpSettings = ONCE) -> str:
    with pytest.raises(DownloadError) as refused:
        fetch(url, limits)
    return str(refused.value)


def test_the_bytes_and_the_times_arrive(server: Server) -> None:
    server.routes["/a%20b/%C3%BC.jpg"] = says(
        200, b"photo", Last_Modified=NOON_TEXT, Date=NOON_TEXT
    )
    assert fetch(f" {server.url}/a b/ü.jpg?w=1&x=a%2Fb ", ONCE) == Download(b"photo", NOON, NOON)
    ((path, headers),) = server.asked
    assert path == "/a%20b/%C3%BC.jpg?w=1&x=a%2Fb"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("vlm4rec_spark/")
    assert "If-Modified-Since" not in headers


@pytest.mark.parametrize("when", ["yesterday", "", "Wed, 01 Jan 99999999999 12:00:00 GMT"])
def test_without_a_time_of_the_server_ours_is_taken(server: Server, when: str) -> None:
    server.routes["/a"] = says(200, b"photo", Last_Modified=when, Date=when)
    before = time.time()
    answer = fetch(f"{server.url}/a", ONCE)
    assert answer is not None
    assert answer.last_modified is None
    assert before - 1 <= answer.answered_at / SECOND <= time.time()


def test_what_has_not_changed_is_not_sent(server: Server) -> None:
    server.routes["/a"] = says(304)
    assert fetch(f"{server.url}/a", ONCE, since=NOON + 999) is None
    assert server.asked[0][1]["If-Modified-Since"] == NOON_TEXT
    assert refusal(f"{server.url}/a") == "HTTP 304"  # nobody asked for that


@pytest.mark.parametrize("status", [204, 206, 302, 400, 401, 403, 404, 410])
def test_other_answers_are_final(server: Server, status: int) -> None:
    server.routes["/a"] = says(status)
    assert refusal(f"{server.url}/a", HttpSettings(private_addresses=True)) == f"HTTP {status}"
    assert len(server.asked) == 1


def test_what_may_pass_is_tried_again_after_growing_pauses(server: Server) -> None:
    server.routes["/a"] = [says(500), lambda handler: None, says(200, b"photo")]
    answer = fetch(f"{server.url}/a", HttpSettings(private_addresses=True))
    assert answer is not None and answer.image == b"photo"
    first, second = (
        after - before for before, after in zip(server.times, server.times[1:], strict=False)
    )
    assert 0.5 <= first < 1.3
    assert 1.0 <= second < 2.3


def test_tries_come_to_an_end(server: Server) -> None:
    server.routes["/a"] = says(503, Retry_After="0")
    assert refusal(f"{server.url}/a", HttpSettings(private_addresses=True, tries=4)) == "HTTP 503"
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("0", 0, 0.4), (NOON_TEXT, 0, 0.4), ("soon", 0.5, 1.4), ("9999", 0.15, 0.45)],
)
def test_the_server_says_how_long_to_wait(
    server: Server, monkeypatch: pytest.MonkeyPatch, asked: str, least: float, most: float
) -> None:
    if asked == "9999":
        monkeypatch.setattr(download, "LONGEST_WAIT", 0.15)
    server.routes["/a"] = [says(429, Retry_After=asked), says(200, b"photo")]
    assert fetch(f"{server.url}/a", HttpSettings(private_addresses=True)) is not None
    assert least <= server.times[1] - server.times[0] < most


@pytest.mark.parametrize(
    "respond",
    [
        stalls,
        streams(b"x", 0.05),
        writes(b"HTTP/1.1 200 OK\r\n" + b"X-Header: y\r\n", 0.05),
        writes(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", 0.05),
    ],
    ids=["nothing", "a drip of chunks", "a drip of headers", "a drip of bytes"],
)
def test_a_slow_answer_is_given_up_in_time(server: Server, respond: Respond) -> None:
    server.routes["/a"] = respond
    began = time.monotonic()
    assert refusal(f"{server.url}/a", HURRIED) == "no answer within 0.4 s"
    assert 0.4 <= time.monotonic() - began < 1


def test_redirects_do_not_prolong_the_time(server: Server) -> None:
    def slowly(handler: Handler) -> None:
        handler.server.closing.wait(0.15)
        says(302, Location="/a")(handler)

    server.routes["/a"] = slowly
    assert refusal(f"{server.url}/a", HURRIED) == "no answer within 0.4 s"


def test_a_host_that_does_not_answer_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        url = "http://{}:{}/".format(*full.getsockname())
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        assert refusal(url) == "the connection failed: no connection within 0.2 s"
        monkeypatch.setattr(connection, "CONNECT_SECONDS", 9)
        began = time.monotonic()
        assert refusal(url, HURRIED) == "no answer within 0.4 s"
        assert time.monotonic() - began < 1
        for each in waiting:
            each.close()


def test_broken_connections(server: Server) -> None:
    server.routes |= {
        "/half": says(200, b"half", length=8),
        "/chunk": writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf"),
        "/gzip": says(200, gzip.compress(bytes(99))[:-9], Content_Encoding="gzip"),
        "/nothing": lambda handler: None,
        "/ssh": writes(b"SSH-2.0-OpenSSH_9.2\r\n"),
        "/noise": says(200, b"noise", Content_Encoding="gzip"),
    }
    assert [refusal(f"{server.url}/{path}") for path in ("half", "chunk", "gzip")] == 3 * [
        "the answer ends early"
    ]
    assert (
        refusal(f"{server.url}/nothing")
        == "the connection failed: Remote end closed connection without response"
    )
    assert [refusal(f"{server.url}/{path}") for path in ("ssh", "noise")] == 2 * [
        "the answer isn't HTTP"
    ]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert (
            refusal("http://{}:{}/".format(*closed.getsockname()))
            == "the connection failed: Connection refused"
        )


def test_nothing_larger_than_the_cap_is_taken(server: Server) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    server.routes |= {
        "/claim": says(200, length=100_001),
        "/endless": streams(b"x" * 9_999),
        "/bomb": says(200, bomb, Content_Encoding="gzip"),
        "/tail": streams(gzip.compress(b"small") + b"x" * 9_999, Content_Encoding="gzip"),
        "/most": says(200, bytes(100_000)),
        "/packed": says(200, gzip.compress(bytes(100_000)), Content_Encoding="gzip"),
    }
    assert len(bomb) < 100_000
    tracemalloc.start()
    for path in ("claim", "endless", "bomb", "tail"):
        assert refusal(f"{server.url}/{path}") == "larger than 0.1 MB", path
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
    for path in ("most", "packed"):
        answer = fetch(f"{server.url}/{path}", ONCE)
        assert answer is not None and answer.image == bytes(100_000)


@pytest.mark.parametrize(
    ("coding", "pack"), [("GZip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)]
)
def test_packed_bodies_are_unpacked(
    server: Server, coding: str, pack: Callable[[bytes], bytes]
) -> None:
    server.routes["/a"] = says(200, pack(b"photo"), Content_Encoding=coding)
    answer = fetch(f"{server.url}/a", ONCE)
    assert answer is not None and answer.image == b"photo"


def test_a_body_packed_in_another_way_is_not_guessed_at(server: Server) -> None:
    server.routes["/a"] = says(200, b"photo", Content_Encoding="br")
    assert refusal(f"{server.url}/a") == "the content is packed in a way that wasn't asked for"


def test_redirects_are_followed_to_another_port(server: Server) -> None:
    with Server() as other:
        server.routes["/a"] = says(302, Location=f"{other.url}/b")
        other.routes["/b"] = says(308, Location="c")
        other.routes["/c"] = says(200, b"photo")
        answer = fetch(server.url.replace("//", "//ann:pass%20word@") + "/a", ONCE)
        other.shutdown()
    assert answer is not None and answer.image == b"photo"
    assert (
        server.asked[0][1]["Authorization"]
        == "Basic " + base64.b64encode(b"ann:pass word").decode()
    )
    assert [path for path, _ in other.asked] == ["/b", "/c"]
    assert [headers["Host"] for _, headers in other.asked] == 2 * [
        other.url.removeprefix("http://")
    ]
    assert all("Authorization" not in headers for _, headers in other.asked)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file:///etc/passwd", "only http and https are read"),
        ("ftp://127.0.0.1/", "only http and https are read"),
        ("http://169.254.169.254/latest/meta-data/", "the address is link-local (169.254.169.254)"),
        ("http://0.0.0.0/", "the address is no host's (0.0.0.0)"),
        ("http://[", "it isn't a valid address"),
    ],
)
def test_every_redirect_is_checked(server: Server, place: str, message: str) -> None:
    server.routes["/a"] = says(302, Location=place)
    assert refusal(f"{server.url}/a") == message


def test_a_redirect_to_a_private_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing outside this machine can be reached here: the first hop has to pass for a public one.
    true_fault = connection.fault
    monkeypatch.setattr(
        connection, "fault", lambda ip: None if ip == "127.0.0.1" else true_fault(ip)
    )
    server.routes["/a"] = says(302, Location="http://10.0.0.1/")
    limits = ONCE.model_copy(update={"private_addresses": False})
    allow = "; allow it by ingest.photos.http.private_addresses"
    assert refusal(f"{server.url}/a", limits) == f"the address is private (10.0.0.1){allow}"


def test_a_redirect_loop_ends(server: Server) -> None:
    server.routes["/a"] = says(301, Location="/a")
    assert refusal(f"{server.url}/a") == "more than 5 redirects"
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", None),
        ("[::1]", "::1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
        ("LOCALHOST", None),
        ("ann:x@127.0.0.1", "127.0.0.1"),
        ("１２７.0.0.1", "127.0.0.1"),
    ],
)
def test_this_machine_is_refused_by_every_name(host: str, address: str | None) -> None:
    found = refusal(f"http://{host}:9/", HttpSettings())
    named = re.escape(address) if address else r"127\.0\.0\.1|::1"
    allow = "; allow it by ingest.photos.http.private_addresses"
    assert re.fullmatch(
        rf"the address is this machine's own \(({named})\){re.escape(allow)}", found
    )


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        *[
            (public, None)
            for public in (
                "93.184.216.34",
                "2606:2800:21f::1",
                "64:ff9b::5db8:d822",
                "2002:5db8:d822::1",
                "::ffff:93.184.216.34",
            )
        ],
        *[
            (private, ("private", True))
            for private in (
                "10.0.0.1",
                "172.16.0.1",
                "192.168.1.1",
                "100.64.0.1",
                "fd00::1",
                "fec0::1",
                "::ffff:10.0.0.1",
                "64:ff9b::a00:1",
                "2002:a00:1::1",
                "198.18.0.1",
                "2001:db8::1",
                "2001:0:a00:1::",
            )
        ],
        *[
            (own, ("this machine's own", True))
            for own in ("127.0.0.1", "127.9.9.9", "::1", "64:ff9b::7f00:1")
        ],
        *[
            (local, ("link-local", False))
            for local in ("169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:169.254.169.254")
        ],
        *[(many, ("for many hosts", False)) for many in ("224.0.0.1", "ff02::1")],
        *[(unset, ("no host's", False)) for unset in ("0.0.0.0", "::", "::ffff:0.0.0.0")],
        *[(kept, ("reserved", False)) for kept in ("240.0.0.1", "255.255.255.255", "::127.0.0.1")],
        *[
            (cloud, ("the cloud platform's own", False))
            for cloud in (
                "168.63.129.16",
                "100.100.100.200",
                "fd00:ec2::254",
                "::ffff:100.100.100.200",
            )
        ],
    ],
)
def test_which_addresses_are_refused(address: str, fault: tuple[str, bool] | None) -> None:
    assert connection.fault(address) == fault


def answers(*addresses: str) -> Callable[..., list[tuple]]:
    return lambda host, port, type: [
        (socket.AF_INET, type, 6, "", (address, port)) for address in addresses
    ]


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answers("93.184.216.34", "10.0.0.1"))
    assert refusal("http://cdn.example/", HttpSettings()).startswith(
        "the address is private (10.0.0.1)"
    )


def test_the_name_is_looked_up_once_and_the_next_address_is_tried(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look_up(host: str, port: int, type: int) -> list[tuple]:
        asked.append(host)
        return answers("127.0.0.2", "127.0.0.1")(host, port, type)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    server.routes["/a"] = says(200, b"photo")
    answer = fetch(f"http://bücher.example:{server.server_port}/a", ONCE)
    assert answer is not None and answer.image == b"photo"
    assert asked == ["xn--bcher-kva.example"]
    assert server.asked[0][1]["Host"] == f"xn--bcher-kva.example:{server.server_port}"


def test_the_host_is_named_without_login_and_without_the_usual_port(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Port 80 of this machine isn't ours, so the look-up leads to another one.
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, type: answers("127.0.0.1")(host, ports[port], type),
    )
    ports = {80: server.server_port}
    server.routes["/"] = says(200, b"photo")
    assert fetch("http://ann:word@CDN.example", ONCE) is not None
    assert server.asked[0][1]["Host"] == "cdn.example"


def test_a_host_that_is_not_known_is_final_and_a_name_server_that_is_away_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def look_up(host: str, port: int, type: int) -> list[tuple]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN if host == "away" else socket.EAI_NONAME, "no")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    limits = HttpSettings(tries=2)
    assert refusal("http://gone/", limits) == "the host isn't known"
    assert refusal("http://away/", limits) == "the host isn't known"
    assert asked == ["gone", "away", "away"]


@pytest.fixture
def secure_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, list]]:
    """A server with a certificate for localhost, which is trusted here; and the names that it was asked for."""
    (tmp_path / "identity.pem").write_text(IDENTITY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "identity.pem")
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "identity.pem"))
    connection._tls.cache_clear()
    yield server, names
    connection._tls.cache_clear()


def test_https_checks_the_certificate_against_the_name_though_it_connects_to_an_address(
    secure_server: tuple[Server, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, names = secure_server
    server.routes |= {"/a": says(200, b"photo"), "/drip": streams(b"x", 0.05)}
    answer = fetch(f"https://localhost:{server.server_port}/a", ONCE)
    assert answer is not None and answer.image == b"photo"
    assert names == ["localhost"]
    assert (
        refusal(f"https://localhost:{server.server_port}/drip", HURRIED) == "no answer within 0.4 s"
    )
    names.clear()
    wrong = refusal(
        f"https://127.0.0.1:{server.server_port}/a", HttpSettings(private_addresses=True)
    )
    assert names == [None]  # one try: it won't be another certificate a second later
    assert wrong.startswith("the certificate isn't accepted: IP address mismatch")
    monkeypatch.delenv("SSL_CERT_FILE")
    connection._tls.cache_clear()
    unknown = refusal(f"https://localhost:{server.server_port}/a")
    assert unknown.startswith("the certificate isn't accepted: self")
    assert len(server.asked) == 2


def test_no_message_holds_a_password_or_a_signature(server: Server) -> None:
    server.routes |= {
        "/404": says(404),
        "/500": says(500),
        "/stall": stalls,
        "/echo": echoes,
        "/nothing": lambda handler: None,
        "/loop": says(302, Location="/loop?sig=s3cret"),
        "/out": says(302, Location="ftp://ann:s3cret@h/?sig=s3cret"),
        "/local": says(302, Location="http://ann:s3cret@169.254.169.254/s3cret"),
        "/half": says(200, b"half", length=9),
        "/broken": says(302, Location="http://ann:s3cret@[oops/?sig=s3cret"),
    }
    login = server.url.replace("//", "//ann:s3cret@")
    urls = [f"{login}{path}?X-Amz-Signature=s3cret&x=a b" for path in server.routes]
    urls += [
        "http://ann:s3cret@/",
        "http://ann:s3cret",
        "http://ann:s3cret@[",
        "http://h:s3cret/",
        "http:s3cret",
        "http://ann:s3cret@\u2100.example/",
        "http://" + 70 * "s3cret" + "/",
        "http://127.0.0.1:1/?s3cret=\ud800",
        "https://ann:s3cret@127.0.0.1:1/s3cret",
        f"https://ann:s3cret@127.0.0.1:{server.server_port}/s3cret",
    ]
    for url in urls:
        with pytest.raises(DownloadError) as refused:
            fetch(url, HURRIED)
        assert "s3cret" not in "".join(traceback.format_exception(refused.value)), url


@given(st.text())
@example("[::1")
@example("a:99999")
@example("a\r\nb/\r\nX: y")
@example("ann\x00@h")
@settings(max_examples=300, deadline=None)
def test_no_text_is_more_than_a_refusal(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", answers("10.0.0.1"))
        refusal(f"http://{text}", HttpSettings())


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_at_a_time_and_no_more(most: int) -> None:
    lock, together = threading.Lock(), threading.Barrier(most)
    now = peak = taken = 0

    def rows() -> Iterator[int]:
        nonlocal taken
        for row in range(12):
            taken += 1
            yield row

    def work(row: int) -> int:
        nonlocal now, peak
        with lock:
            now += 1
            peak = max(peak, now)
        together.wait(5)  # breaks unless so many are really at work together
        with lock:
            now -= 1
        return row * row

    results = concurrently(work, rows(), most)
    first = next(results)
    # Of what isn't asked for no more is made than may lie in memory.
    assert taken == most + 1
    assert sorted([first, *results]) == [row * row for row in range(12)]
    assert peak == most


def test_one_that_stalls_holds_up_no_other() -> None:
    stalled = threading.Event()

    def work(row: int) -> int:
        if row == 0:
            stalled.wait(5)
        return row

    results = concurrently(work, range(9), 2)
    assert [next(results) for _ in range(7)] == list(range(1, 8))
    stalled.set()
    assert sorted(results) == [0, 8]
