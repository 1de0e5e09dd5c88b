"""Read a ZMQ server's security mechanism from its ZMTP greeting.

Two ends of ZMQ with different mechanisms both hang up, and the slower one only sees that the other
did. So a client that was disconnected connects once more without ZMQ, and does not hang up first.
ZMTP 3 (RFC 23) begins with 64 bytes from each side: a signature, a version, and the name of the
mechanism. Each side sends the rest of its greeting once it has received the other's version.
"""

from __future__ import annotations

import contextlib
import socket
import time
from urllib.parse import urlsplit

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_VERSION = b"\x03"
_GREETING_BYTES = 64
_MECHANISM = slice(12, 32)
TIMEOUT_S = 0.5


def read_mechanism(endpoint: str) -> str:
    """Return ``"NULL"``, ``"CURVE"``, …; empty if no ZMQ server answers.

    Args:
        endpoint: In ZMQ's form, ``tcp://HOST:PORT``.
    """
    where = urlsplit(endpoint)
    received, until = b"", time.monotonic() + TIMEOUT_S
    with (
        contextlib.suppress(OSError),
        socket.create_connection((where.hostname or "", where.port or 0), TIMEOUT_S) as connection,
    ):
        connection.sendall(_SIGNATURE + _VERSION)
        while len(received) < _GREETING_BYTES and (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            more = connection.recv(_GREETING_BYTES - len(received))
            if not more:
                break
            received += more
    ends = _SIGNATURE[0], _SIGNATURE[9]
    if len(received) < _GREETING_BYTES or (received[0], received[9]) != ends:
        return ""
    return received[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
