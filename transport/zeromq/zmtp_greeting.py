"""What a ZMQ server asks of those who connect, read from the greeting that it begins with.

Two ends of ZMQ that want different security both hang up, and the one that looks second only sees
that the other did. So a client that was hung up on asks once more, by hand, and does not hang up
first: ZMTP 3 (RFC 23) begins with 64 bytes of each side, a signature, a version, and the name of
the mechanism. A side sends its own once it knows the other's version.
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
PATIENCE_S = 0.5


def mechanism(endpoint: str) -> str:
    """``"NULL"``, ``"CURVE"``, …; empty where nothing answers as ZMQ does.

    Args:
        endpoint: As ZMQ writes it, ``tcp://HOST:PORT``.
    """
    where = urlsplit(endpoint)
    said, until = b"", time.monotonic() + PATIENCE_S
    with (
        contextlib.suppress(OSError),
        socket.create_connection((where.hostname or "", where.port or 0), PATIENCE_S) as link,
    ):
        link.sendall(_SIGNATURE + _VERSION)
        while len(said) < _GREETING_BYTES and (left := until - time.monotonic()) > 0:
            link.settimeout(left)
            more = link.recv(_GREETING_BYTES - len(said))
            if not more:
                break
            said += more
    if len(said) < _GREETING_BYTES or (said[0], said[9]) != (_SIGNATURE[0], _SIGNATURE[9]):
        return ""
    return said[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
