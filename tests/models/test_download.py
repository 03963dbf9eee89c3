"""Downloads from a real server on this machine: answers, refusals, and what no message reveals."""

import base64
import gzip
import socket
import ssl
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm4rec_spark.models.photos import connection, download
from vlm4rec_spark.models.photos.connection import AddressFault
from vlm4rec_spark.models.photos.download import (
    Download,
    DownloadError,
    HttpSettings,
    concurrently,
    fetch,
)

PATIENT = HttpSettings(private_addresses=True)
ONE_TRY = HttpSettings(private_addresses=True, tries=1, timeout_seconds=5, max_mb=0.1)
IMPATIENT = ONE_TRY.model_copy(update={"timeout_seconds": 0.4})
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
"""Used only by these tests: for localhost, valid from 2020 to 2120."""

HINT = "; allow it by ingest.photos.http.private_addresses"

Respond = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Answers a path with its entry in `routes`, else by `respond`, and keeps the requests.

    A list gives one answer after the other.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, Respond] = {}
        self.respond: Respond | list[Respond] = answers(404)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def photo(self) -> str:
        return f"{self.url}/a"

    def handle_error(self, *_: object) -> None:
        """These tests are about clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        self.server.times.append(time.monotonic())
        respond = self.server.routes.get(self.path.partition("?")[0], self.server.respond)
        if isinstance(respond, list):
            respond = respond.pop(0)
        respond(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started
        started.closing.set()
        started.shutdown()


def answers(
    status: int, body: bytes = b"", /, length: int | None = None, **headers: str
) -> Respond:
    """A whole answer, or one that claims another length. `Last_Modified` means Last-Modified."""

    def respond(handler: Handler) -> None:
        handler.send_response_only(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


ANSWERS_PHOTO = answers(200, b"photo")


def streams(
    chunk: bytes,
    pause: float = 0.0,
    **headers: str,
) -> Respond:
    """A chunked body that never ends."""

    def respond(handler: Handler) -> None:
        answers(200, length=0, Transfer_Encoding="chunked", **headers)(handler)
        while not handler.server.closing.wait(pause):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    return respond


def writes(data: bytes, pause: float = 0.0) -> Respond:
    """These bytes and no more. With a pause: one byte at a time, over and over."""

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


def refusal(url: str, limits: HttpSettings = ONE_TRY) -> str:
    """The message with which a download fails."""
    with pytest.raises(DownloadError) as error:
        fetch(url, limits)
    return str(error.value)


def fetched(url: str, limits: HttpSettings = ONE_TRY) -> bytes:
    photo = fetch(url, limits)
    assert photo is not None
    return photo.image


def test_the_bytes_and_the_times_arrive(server):
    server.routes["/a%20b/%C3%BC.jpg"] = answers(
        200, b"photo", Last_Modified=NOON_TEXT, Date=NOON_TEXT
    )
    assert fetch(f" {server.url}/a b/ü.jpg?w=1&x=a%2Fb ", ONE_TRY) == Download(b"photo", NOON, NOON)
    ((path, headers),) = server.requests
    assert path == "/a%20b/%C3%BC.jpg?w=1&x=a%2Fb"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("vlm4rec_spark/")
    assert "If-Modified-Since" not in headers


@pytest.mark.parametrize("when", ["yesterday", "", "Wed, 01 Jan 99999999999 12:00:00 GMT"])
def test_without_a_time_of_the_server_the_local_clock_counts(server, when: str):
    server.respond = answers(200, b"photo", Last_Modified=when, Date=when)
    before = time.time()
    photo = fetch(server.photo, ONE_TRY)
    assert photo is not None
    assert photo.last_modified is None
    assert before - 1 <= photo.answered_at / SECOND <= time.time()


def test_an_unchanged_photo_is_not_sent(server):
    server.respond = answers(304)
    assert fetch(server.photo, ONE_TRY, since=NOON + 999) is None
    assert server.requests[0][1]["If-Modified-Since"] == NOON_TEXT
    assert refusal(server.photo) == "HTTP 304"  # without `since`, it is no answer


@pytest.mark.parametrize("status", [204, 206, 302, 400, 401, 403, 404, 410])
def test_other_statuses_are_final(server, status: int):
    server.respond = answers(status)
    assert refusal(server.photo, PATIENT) == f"HTTP {status}"
    assert len(server.requests) == 1


def test_transient_failures_are_retried_after_growing_pauses(server):
    server.respond = [answers(500), lambda handler: None, ANSWERS_PHOTO]
    assert fetched(server.photo, PATIENT) == b"photo"
    first, second = np.diff(server.times)
    assert 0.5 <= first < 1.3
    assert 1.0 <= second < 2.3


def test_the_number_of_tries_is_limited(server):
    server.respond = answers(503, Retry_After="0")
    assert refusal(server.photo, HttpSettings(private_addresses=True, tries=4)) == "HTTP 503"
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("retry_after", "min_pause", "max_pause"),
    [("0", 0, 0.4), (NOON_TEXT, 0, 0.4), ("soon", 0.5, 1.4), ("9999", 0.15, 0.45)],
)
def test_the_server_sets_the_pause(
    server,
    monkeypatch,
    retry_after: str,
    min_pause: float,
    max_pause: float,
):
    if retry_after == "9999":
        monkeypatch.setattr(download, "MAX_PAUSE", 0.15)
    server.respond = [answers(429, Retry_After=retry_after), ANSWERS_PHOTO]
    assert fetch(server.photo, PATIENT) is not None
    assert min_pause <= server.times[1] - server.times[0] < max_pause


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
def test_a_slow_answer_ends_at_the_timeout(server, respond: Respond):
    server.respond = respond
    start = time.monotonic()
    assert refusal(server.photo, IMPATIENT) == "no answer within 0.4 s"
    assert 0.4 <= time.monotonic() - start < 1


def test_redirects_do_not_extend_the_timeout(server):
    def slowly(handler: Handler) -> None:
        handler.server.closing.wait(0.15)
        answers(302, Location="/a")(handler)

    server.respond = slowly
    assert refusal(server.photo, IMPATIENT) == "no answer within 0.4 s"


def test_a_host_that_does_not_answer_the_connection(monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        url = "http://{}:{}/".format(*full.getsockname())
        clients = [socket.socket() for _ in range(3)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        assert refusal(url) == "the connection failed: no connection within 0.2 s"
        monkeypatch.setattr(connection, "CONNECT_SECONDS", 9)
        start = time.monotonic()
        assert refusal(url, IMPATIENT) == "no answer within 0.4 s"
        assert time.monotonic() - start < 1
        for client in clients:
            client.close()


def test_broken_connections(server):
    server.routes |= {
        "/half": answers(200, b"half", length=8),
        "/chunk": writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf"),
        "/gzip": answers(200, gzip.compress(bytes(99))[:-9], Content_Encoding="gzip"),
        "/nothing": lambda handler: None,
        "/ssh": writes(b"SSH-2.0-OpenSSH_9.2\r\n"),
        "/noise": answers(200, b"noise", Content_Encoding="gzip"),
    }
    no_response = "the connection failed: Remote end closed connection without response"
    assert {path: refusal(server.url + path) for path in server.routes} == {
        "/half": "the answer ends early",
        "/chunk": "the answer ends early",
        "/gzip": "the answer ends early",
        "/nothing": no_response,
        "/ssh": "the answer isn't HTTP",
        "/noise": "the answer isn't HTTP",
    }
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = "http://{}:{}/".format(*closed.getsockname())
        assert refusal(url) == "the connection failed: Connection refused"


def test_nothing_larger_than_the_limit_is_taken(server):
    bomb = gzip.compress(bytes(50_000_000))
    server.routes |= {
        "/claim": answers(200, length=100_001),
        "/endless": streams(b"x" * 9_999),
        "/bomb": answers(200, bomb, Content_Encoding="gzip"),
        "/tail": streams(gzip.compress(b"small") + b"x" * 9_999, Content_Encoding="gzip"),
        "/most": answers(200, bytes(100_000)),
        "/packed": answers(200, gzip.compress(bytes(100_000)), Content_Encoding="gzip"),
    }
    assert len(bomb) < 100_000
    tracemalloc.start()
    for path in ("claim", "endless", "bomb", "tail"):
        assert refusal(f"{server.url}/{path}") == "larger than 0.1 MB", path
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()
    for path in ("most", "packed"):
        assert fetched(f"{server.url}/{path}") == bytes(100_000)


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("GZip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
)
def test_compressed_bodies_are_decompressed(
    server, encoding: str, compress: Callable[[bytes], bytes]
):
    server.respond = answers(200, compress(b"photo"), Content_Encoding=encoding)
    assert fetched(server.photo) == b"photo"


def test_another_compression_is_refused(server):
    server.respond = answers(200, b"photo", Content_Encoding="br")
    assert refusal(server.photo) == "the content is compressed in a way that wasn't asked for"


def test_redirects_are_followed_to_another_port(server):
    with Server() as target:
        server.respond = answers(302, Location=f"{target.url}/b")
        target.routes["/b"] = answers(308, Location="c")
        target.routes["/c"] = ANSWERS_PHOTO
        image = fetched(server.url.replace("//", "//ann:pass%20word@") + "/a")
        target.shutdown()
    assert image == b"photo"
    login = base64.b64encode(b"ann:pass word").decode()
    assert server.requests[0][1]["Authorization"] == f"Basic {login}"
    assert [path for path, _ in target.requests] == ["/b", "/c"]
    assert [headers["Host"] for _, headers in target.requests] == 2 * [
        target.url.removeprefix("http://")
    ]
    assert all("Authorization" not in headers for _, headers in target.requests)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///etc/passwd", "only http and https are read"),
        ("ftp://127.0.0.1/", "only http and https are read"),
        ("http://169.254.169.254/latest/meta-data/", "the address is link-local (169.254.169.254)"),
        ("http://0.0.0.0/", "the address is no host's (0.0.0.0)"),
        ("http://[", "it isn't a valid address"),
    ],
)
def test_every_redirect_is_checked(
    server,
    location: str,
    message: str,
):
    server.respond = answers(302, Location=location)
    assert refusal(server.photo) == message


def test_a_redirect_to_a_private_address(server, monkeypatch):
    # Nothing outside this machine can be reached here: the first hop has to pass for a public one.
    real = connection.address_fault
    monkeypatch.setattr(
        connection, "address_fault", lambda ip: None if ip == "127.0.0.1" else real(ip)
    )
    server.respond = answers(302, Location="http://10.0.0.1/")
    limits = ONE_TRY.model_copy(update={"private_addresses": False})
    assert refusal(server.photo, limits) == f"the address is private (10.0.0.1){HINT}"


def test_a_redirect_loop_ends(server):
    server.respond = answers(301, Location="/a")
    assert refusal(server.photo) == "more than 5 redirects"
    assert len(server.requests) == 6


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
def test_this_machine_is_refused_by_every_name(host: str, address: str | None):
    message = refusal(f"http://{host}:9/", HttpSettings())
    addresses = [address] if address else ["127.0.0.1", "::1"]
    assert message in [f"the address is this machine's own ({ip}){HINT}" for ip in addresses]


ADDRESSES: dict[AddressFault | None, str] = {
    None: "93.184.216.34 2606:2800:21f::1 64:ff9b::5db8:d822 2002:5db8:d822::1 "
    "::ffff:93.184.216.34",
    AddressFault("private", True): "10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 fd00::1 fec0::1 "
    "::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1::1 198.18.0.1 2001:db8::1 2001:0:a00:1::",
    AddressFault("this machine's own", True): "127.0.0.1 127.9.9.9 ::1 64:ff9b::7f00:1",
    AddressFault("link-local", False): "169.254.169.254 fe80::1 fe80::1%eth0 "
    "::ffff:169.254.169.254",
    AddressFault("for many hosts", False): "224.0.0.1 ff02::1",
    AddressFault("no host's", False): "0.0.0.0 :: ::ffff:0.0.0.0",
    AddressFault("reserved", False): "240.0.0.1 255.255.255.255 ::127.0.0.1",
    AddressFault("the cloud platform's own", False): "168.63.129.16 100.100.100.200 "
    "fd00:ec2::254 ::ffff:100.100.100.200",
}


@pytest.mark.parametrize(
    ("address", "fault"),
    [(address, fault) for fault, text in ADDRESSES.items() for address in text.split()],
)
def test_which_addresses_are_refused(address: str, fault: AddressFault | None):
    assert connection.address_fault(address) == fault


def resolves_to(*addresses: str) -> Callable[..., list[tuple]]:
    return lambda host, port, type: [
        (socket.AF_INET, type, 6, "", (address, port)) for address in addresses
    ]


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolves_to("93.184.216.34", "10.0.0.1"))
    assert refusal("http://cdn.example/", HttpSettings()).startswith(
        "the address is private (10.0.0.1)"
    )


def test_the_name_is_resolved_once_and_the_next_address_is_tried(server, monkeypatch):
    hosts: list[str] = []

    def resolve(
        host: str,
        port: int,
        type: int,
    ) -> list[tuple]:
        hosts.append(host)
        return resolves_to("127.0.0.2", "127.0.0.1")(host, port, type)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    server.respond = ANSWERS_PHOTO
    assert fetched(f"http://bücher.example:{server.server_port}/a") == b"photo"
    assert hosts == ["xn--bcher-kva.example"]
    assert server.requests[0][1]["Host"] == f"xn--bcher-kva.example:{server.server_port}"


def test_the_host_header_has_no_login_and_no_default_port(server, monkeypatch):
    # Port 80 of this machine isn't free, so the name is resolved to another port.
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, type: resolves_to("127.0.0.1")(host, ports[port], type),
    )
    ports = {80: server.server_port}
    server.routes["/"] = ANSWERS_PHOTO
    assert fetch("http://ann:word@CDN.example", ONE_TRY) is not None
    assert server.requests[0][1]["Host"] == "cdn.example"


def test_an_unknown_host_is_final_and_a_silent_name_server_is_not(
    monkeypatch,
):
    hosts: list[str] = []

    def resolve(
        host: str,
        port: int,
        type: int,
    ) -> list[tuple]:
        hosts.append(host)
        raise socket.gaierror(socket.EAI_AGAIN if host == "away" else socket.EAI_NONAME, "no")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    limits = HttpSettings(tries=2)
    assert refusal("http://gone/", limits) == "the host isn't known"
    assert refusal("http://away/", limits) == "the host isn't known"
    assert hosts == ["gone", "away", "away"]


@pytest.fixture
def secure_server(
    server: Server,
    tmp_path,
    monkeypatch,
) -> Iterator[tuple[Server, list]]:
    """A server with a trusted certificate for localhost, and the names that clients asked for."""
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


def test_https_checks_the_certificate_against_the_name(secure_server, monkeypatch):
    server, names = secure_server
    server.routes |= {"/a": ANSWERS_PHOTO, "/drip": streams(b"x", 0.05)}
    assert fetched(f"https://localhost:{server.server_port}/a") == b"photo"
    assert names == ["localhost"]
    drip = f"https://localhost:{server.server_port}/drip"
    assert refusal(drip, IMPATIENT) == "no answer within 0.4 s"
    names.clear()
    by_address = f"https://127.0.0.1:{server.server_port}/a"
    wrong = refusal(by_address, PATIENT)
    assert names == [None]  # one try, since the certificate won't change
    assert wrong.startswith("the certificate isn't accepted: IP address mismatch")
    monkeypatch.delenv("SSL_CERT_FILE")
    connection._tls.cache_clear()
    unknown = refusal(f"https://localhost:{server.server_port}/a")
    assert unknown.startswith("the certificate isn't accepted: self")
    assert len(server.requests) == 2


def test_no_message_holds_a_password_or_a_signature(server):
    server.routes |= {
        "/404": answers(404),
        "/500": answers(500),
        "/stall": stalls,
        "/echo": echoes,
        "/nothing": lambda handler: None,
        "/loop": answers(302, Location="/loop?sig=s3cret"),
        "/out": answers(302, Location="ftp://ann:s3cret@h/?sig=s3cret"),
        "/local": answers(302, Location="http://ann:s3cret@169.254.169.254/s3cret"),
        "/half": answers(200, b"half", length=9),
        "/broken": answers(302, Location="http://ann:s3cret@[oops/?sig=s3cret"),
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
        with pytest.raises(DownloadError) as error:
            fetch(url, IMPATIENT)
        assert "s3cret" not in "".join(traceback.format_exception(error.value)), url


@given(st.text())
@example("[::1")
@example("a:99999")
@example("a\r\nb/\r\nX: y")
@example("ann\x00@h")
@settings(max_examples=300, deadline=None)
def test_any_text_is_at_most_refused(text: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolves_to("10.0.0.1"))
        refusal(f"http://{text}", HttpSettings())


@pytest.mark.parametrize("max_pending", [1, 3])
def test_the_number_of_simultaneous_calls_is_bounded(max_pending: int):
    lock = threading.Lock()
    all_running = threading.Barrier(max_pending)
    running = peak = consumed = 0

    def rows() -> Iterator[int]:
        nonlocal consumed
        for row in range(12):
            consumed += 1
            yield row

    def work(row: int) -> int:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        all_running.wait(5)  # breaks unless max_pending calls really run at the same time
        with lock:
            running -= 1
        return row * row

    results = concurrently(work, rows(), max_pending)
    first = next(results)
    # No more rows are consumed than may be in memory.
    assert consumed == max_pending + 1
    assert sorted([first, *results]) == [row * row for row in range(12)]
    assert peak == max_pending


def test_a_stalled_call_does_not_hold_up_others():
    released = threading.Event()

    def work(row: int) -> int:
        if row == 0:
            released.wait(5)
        return row

    results = concurrently(work, range(9), 2)
    assert [next(results) for _ in range(7)] == list(range(1, 8))
    released.set()
    assert sorted(results) == [0, 8]
