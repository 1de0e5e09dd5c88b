"""Parse, format and resolve addresses. ZMQ is given numeric ones, because it resolves no names."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket

from transport.errors import TransportError

_ADDRESS = re.compile(r"(?:tcp://)?(?:\[(?P<v6>[^\[\]]*)\]|(?P<name>[^:/\[\]]*)):(?P<port>\d+)")


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of ``host:port``, ``[v6]:port`` or ``tcp://host:port``.

    Raises:
        TransportError: ``text`` has none of these forms; the message says how it was read.
    """
    match = _ADDRESS.fullmatch(text)
    host = match and (match["v6"] or match["name"])
    if not match or not host:
        raise TransportError(
            f"address: got {text!r}, expected host:port or [v6]:port{_hint_brackets(text)}"
        )
    # A very long number would take long to convert.
    port = int(match["port"]) if len(match["port"]) <= 9 else -1
    if not 1 <= port <= 65535:
        raise TransportError(f"address {text!r}: got port {match['port']}, expected 1 to 65535")
    return host, port


def format_address(host: str, port: int) -> str:
    """Format an address for ``parse_address``: ``host:port`` or ``[v6]:port``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is ``localhost`` or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bare_host(host: str) -> str:
    """Return ``host`` without the brackets around an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def resolve(host: str, port: int, *, listening: bool = False) -> tuple[str, bool]:
    """Resolve ``host`` to a numeric address, and say whether it is IPv6.

    IPv4 is preferred where a name has both, so that servers and clients agree.

    Raises:
        TransportError: Unknown name, invalid port, or an IPv6 address on a machine without IPv6.
    """
    if not 0 <= port <= 65535:
        raise TransportError(f"port: got {port}, expected {'0 (any)' if listening else 1} to 65535")
    flags = socket.AI_PASSIVE if listening else 0
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        if listening:
            raise TransportError(
                f"host {host!r} is not an address of this machine: {error}"
                f"{_hint_port_in_host(host)}"
            ) from error
        raise TransportError(f"cannot resolve {host!r}: {error}") from error
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    ipv6 = family == socket.AF_INET6
    if ipv6 and not has_ipv6():
        raise TransportError(
            f"{format_address(host, port)}: this machine has no IPv6; expected an IPv4 address or "
            "a name that has one"
        )
    numeric, scope = str(address[0]), address[3] if len(address) == 4 else 0
    if scope and "%" not in numeric:  # a link-local address is ambiguous without its interface
        numeric = f"{numeric}%{socket.if_indextoname(scope)}"
    return numeric, ipv6


def has_ipv6() -> bool:
    """Whether the kernel supports IPv6 and IPv6 is enabled."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def hint_port_in_ipv6(host: str) -> str:
    """A hint for an error: the last group of an IPv6 ``host`` may be meant as a port. Or empty."""
    before, _, port = host.rpartition(":")
    if not _is_ipv6(host) or not _is_ipv6(before) or not port.isdecimal():
        return ""
    return f"; all of it is read as an address: for port {port} of {before} give {before} alone"


def _hint_port_in_host(host: str) -> str:
    before, colon, port = host.rpartition(":")
    if colon and before and port.isdecimal():
        return f"; expected a host alone: {bare_host(before)}, with port {port} beside it"
    return ""


def _hint_brackets(text: str) -> str:
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not _is_ipv6(host) or not port.isdecimal():
        return ""
    return f"; an IPv6 address is written in brackets: [{host}]:{port}"


def _is_ipv6(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).version == 6
    return False
