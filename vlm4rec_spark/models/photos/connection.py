"""A socket to the very address that was checked, whose every wait ends at a deadline. Knows nothing of HTTP.

A catalogue's URLs are other people's input: one may point at a service that only this machine can reach. A name is
looked up once, and what was checked is what is connected to, so a name server that changes its mind gains nothing.
"""

from __future__ import annotations

import socket
import ssl
import time
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

CONNECT_SECONDS = 10.0
"""For each address of a host. One that is down answers nothing at all, and the next may be up."""

_NAT64 = IPv6Network("64:ff9b::/96")
_PLATFORM = tuple(map(ip_address, ("168.63.129.16", "100.100.100.200", "fd00:ec2::254")))
"""What Azure, Alibaba and AWS tell a machine about itself, keys included, at addresses that aren't link-local."""


class AddressError(Exception):
    """A host that must not be connected to. The message names its address, nothing else of the URL."""


def connect(host: str, port: int, tls: bool, private: bool, deadline: float) -> socket.socket:
    """A socket to the first address of the host that answers; with `tls`, its certificate is the host's.

    `deadline` is a time of time.monotonic(); the look-up alone may take longer, as nobody can stop it.
    Raises AddressError, OSError, and TimeoutError at the deadline.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for _, _, _, _, address in found:
        _check(str(address[0]), private)
    failure: OSError = ConnectionError("the host has no address")
    for family, _, _, _, address in found:
        try:
            return _open(family, address, host if tls else None, deadline)
        except OSError as refused:
            failure = refused
    raise failure


def fault(address: str) -> tuple[str, bool] | None:
    """What is wrong with an address, and whether it is one that a setting may allow. None: it is public."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        ip = _inner(ip)
    for kind, name in (
        ("unspecified", "no host's"),
        ("loopback", "this machine's own"),
        ("link_local", "link-local"),
        ("multicast", "for many hosts"),
        ("reserved", "reserved"),
    ):
        if getattr(ip, f"is_{kind}"):
            return name, kind == "loopback"
    if ip in _PLATFORM:
        return "the cloud platform's own", False
    # Not is_private: that leaves out the range that providers share, 100.64.0.0/10.
    return None if ip.is_global and not getattr(ip, "is_site_local", False) else ("private", True)


def _inner(ip: IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that a gateway or the kernel would go on to."""
    if ip in _NAT64:
        return IPv4Address(ip.packed[-4:])
    return ip.ipv4_mapped or ip.sixtofour or ip


def _check(address: str, private: bool) -> None:
    found = fault(address)
    if found and not (found[1] and private):
        allow = "; allow it by ingest.photos.http.private_addresses" if found[1] else ""
        raise AddressError(f"the address is {found[0]} ({address}){allow}")


def _open(family: int, address: Any, tls_name: str | None, deadline: float) -> socket.socket:
    plain = _Socket(family, socket.SOCK_STREAM)
    try:
        plain.deadline = deadline
        plain.settimeout(min(CONNECT_SECONDS, _left(deadline)))
        try:
            plain.connect(address)
        except TimeoutError:
            _left(deadline)
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from None
        plain.settimeout(_left(deadline))
        if tls_name is None:
            return plain
        secure = _tls().wrap_socket(plain, server_hostname=tls_name)
        secure.deadline = deadline  # type: ignore[attr-defined]
        return secure
    except BaseException:
        plain.close()
        raise


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _Socket(socket.socket):
    """Each wait for bytes is cut short, or a server that sends one now and then would hold us for ever."""

    deadline: float

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*args)


class _TlsSocket(ssl.SSLSocket):
    deadline: float

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*args)


@cache
def _tls() -> ssl.SSLContext:
    """Made once: it reads some hundred certificates, the system's own or those that SSL_CERT_FILE names."""
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context
