"""Sockets to checked addresses, with a deadline for every wait. Knows nothing of HTTP.

The URLs of a catalogue are untrusted: one may name a service that only this machine can reach. So
a host is resolved once, and the address that was checked is the one that is connected to. A name
server that changes its answer gains nothing.
"""

import socket
import ssl
import time
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, NamedTuple

CONNECT_SECONDS = 10.0
"""For each address of a host. If one is down, nothing answers there, and the next may be up."""

_NAT64 = IPv6Network("64:ff9b::/96")
_CLOUD_METADATA = tuple(map(ip_address, ("168.63.129.16", "100.100.100.200", "fd00:ec2::254")))
"""Where Azure, Alibaba and AWS serve a machine's keys, at addresses that aren't link-local."""


class AddressError(Exception):
    """A host that must not be connected to. The message holds its address, not the URL."""


class AddressFault(NamedTuple):
    """Why an address is refused."""

    reason: str
    can_be_allowed: bool
    """True if ingest.photos.http.private_addresses allows it."""


def connect(host: str, port: int, tls: bool, private: bool, deadline: float) -> socket.socket:
    """A socket to the first address of the host that answers.

    With `tls`, the server's certificate has been checked against the host. `private` allows private
    addresses. `deadline` is a time of time.monotonic(). Only the resolution of the name may take
    longer, since it can't be interrupted. Raises AddressError, OSError, and TimeoutError at the
    deadline.
    """
    resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in resolved:
        _check(str(address[0]), private)
    failure: OSError = ConnectionError("the host has no address")
    for family, *_, address in resolved:
        try:
            return _open(family, address, host if tls else None, deadline)
        except OSError as error:
            failure = error
    raise failure


def address_fault(address: str) -> AddressFault | None:
    """Why an address is refused; None if it is public."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        ip = _embedded_ipv4(ip)
    for kind, reason in (
        ("unspecified", "no host's"),
        ("loopback", "this machine's own"),
        ("link_local", "link-local"),
        ("multicast", "for many hosts"),
        ("reserved", "reserved"),
    ):
        if getattr(ip, f"is_{kind}"):
            return AddressFault(reason, can_be_allowed=kind == "loopback")
    if ip in _CLOUD_METADATA:
        return AddressFault("the cloud platform's own", can_be_allowed=False)
    # Not is_private: it leaves out the range that providers share, 100.64.0.0/10.
    if ip.is_global and not getattr(ip, "is_site_local", False):
        return None
    return AddressFault("private", can_be_allowed=True)


def _embedded_ipv4(ip: IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that a gateway or the kernel would forward to."""
    if ip in _NAT64:
        return IPv4Address(ip.packed[-4:])
    return ip.ipv4_mapped or ip.sixtofour or ip


def _check(address: str, private: bool) -> None:
    fault = address_fault(address)
    if fault is None or (fault.can_be_allowed and private):
        return
    hint = "; allow it by ingest.photos.http.private_addresses" if fault.can_be_allowed else ""
    raise AddressError(f"the address is {fault.reason} ({address}){hint}")


def _open(family: int, address: Any, tls_name: str | None, deadline: float) -> socket.socket:
    plain = _Socket(family, socket.SOCK_STREAM)
    try:
        plain.deadline = deadline
        plain.settimeout(min(CONNECT_SECONDS, _seconds_until(deadline)))
        try:
            plain.connect(address)
        except TimeoutError:
            _seconds_until(deadline)
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from None
        plain.settimeout(_seconds_until(deadline))
        if tls_name is None:
            return plain
        secure = _tls().wrap_socket(plain, server_hostname=tls_name)
        secure.deadline = deadline  # type: ignore[attr-defined]
        return secure
    except BaseException:
        plain.close()
        raise


def _seconds_until(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _Socket(socket.socket):
    """Ends each wait at the deadline, or a server that drips bytes would hold the task for ever."""

    deadline: float

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_seconds_until(self.deadline))
        return super().recv_into(*args)


class _TlsSocket(_Socket, ssl.SSLSocket):
    """The same for TLS."""


@cache
def _tls() -> ssl.SSLContext:
    """Cached, since it reads a hundred certificates: the system's, or those of SSL_CERT_FILE."""
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context
