"""Who of the outside world may be asked, and the connection to them: for pulled models and captions alike.

- Only https, except for `host:port` that the operator names as local; those alone may have a private address.
- A name is looked up once: all its addresses have to be public, and the connection goes to one of those very addresses.

Runs in jobs, commands and requests; nothing here touches the database.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from lorapilot.errors import UserError

TIMEOUT_SECONDS = 30


class Interrupted(Exception):
    """The connection broke, or the server wants to be asked later: another try may work."""


@dataclass(frozen=True, slots=True)
class Place:
    """An address that may be asked: where it was found to be, and what to ask for there."""

    scheme: str
    host: str
    port: int
    target: str
    addresses: tuple[str, ...]

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port


def find_place(
    url: str, *, local_hosts: Collection[str], check_host: Callable[[str], None] = lambda _host: None
) -> Place:
    """Look the address up. `check_host` raises UserError for hosts that may not be asked; local ones are not checked.

    Raises UserError when it may not be asked, Interrupted when the name cannot be found now.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise UserError(f"{ascii(url)[:200]} is no address.") from None
    is_local = f"{host}:{port}" in local_hosts
    if parts.scheme != "https" and not (is_local and parts.scheme == "http"):
        raise UserError(f"{host} would be asked without encryption: only https is allowed.")
    if parts.username is not None or not host.isascii() or not url.isprintable():
        raise UserError(f"{ascii(url)[:200]} is no address.")
    if not is_local:
        check_host(host)
    addresses = _look_up(host, port)
    if not is_local and not all(map(is_public, addresses)):
        raise UserError(f"{host} leads to an address inside a private network, which is not asked.")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(parts.scheme, host, port, target, addresses)


def is_public(address: str) -> bool:
    """False for loopback, private, link-local and other special addresses, also where IPv6 wraps one of IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    wrapped = [found]
    if isinstance(found, ipaddress.IPv6Address):
        behind_nat64 = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in NAT64 else None
        wrapped += [ip for ip in (found.ipv4_mapped, found.sixtofour, behind_nat64) if ip is not None]
    return all((ip.is_global or ip in MAPPED) and not ip.is_multicast for ip in wrapped)


NAT64 = ipaddress.ip_network("64:ff9b::/96")
MAPPED = ipaddress.ip_network("::ffff:0:0/96")  # not global by itself: what it wraps decides


def _look_up(host: str, port: int) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Interrupted(f"{host} cannot be found. Is this machine connected to the network?") from None
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


class Connection(http.client.HTTPConnection):
    """Connects to the addresses that were checked, not to what a second look-up might say."""

    def __init__(self, place: Place, *, timeout: float = TIMEOUT_SECONDS) -> None:
        super().__init__(place.host, place.port, timeout=timeout)
        self.place = place
        self.default_port = 443 if place.scheme == "https" else 80  # decides whether Host names the port
        self.wire: socket.socket | None = None  # http.client forgets its own as soon as the answer has begun

    def connect(self) -> None:
        for address in self.place.addresses:
            with contextlib.suppress(OSError):
                self.sock = socket.create_connection((address, self.place.port), timeout=self.timeout)
                break
        else:
            raise ConnectionError(f"{self.place.host} does not answer")
        if self.place.scheme == "https":
            self.sock = tls().wrap_socket(self.sock, server_hostname=self.place.host)
        self.wire = self.sock

    def hang_up(self) -> None:
        """Ends what another thread reads or writes, at once."""
        if self.wire is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.wire, socket.SHUT_RDWR)  # not TLS's own, which is not made for threads


@lru_cache(maxsize=1)
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()
