"""Every parser of what a peer sends, by name, as a function of bytes.

A target raises only where a promise is broken: an exception that the parser does not name, memory
or descriptors out of proportion, a store outside of what is ours, or something accepted that is not
what it says. What a parser refuses is no violation.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from types import MappingProxyType

from tests.fuzz import channels, client_side, parsers, pictures, server_side
from tests.fuzz.channels import Target

MAX_GROWTH_KB = 64 * 1024
"""Of the process, by a single input. The longest message of any target is a fiftieth of it."""


def _plain(target: Target) -> Callable[[], contextlib.AbstractContextManager[Target]]:
    return lambda: contextlib.nullcontext(target)


def broken(data: bytes) -> None:
    """A parser that believes a length it was told: to see that a violation is found."""
    count = int.from_bytes(data[:4], "little")
    assert data[4 : 4 + count] == data[4:][:count] and (count < 1 << 31 or len(data) > count)


TARGETS = MappingProxyType(
    {
        "control": _plain(parsers.control),
        "hello": _plain(parsers.hello),
        "offer": _plain(parsers.offer),
        "schema": _plain(parsers.schema),
        "description": _plain(parsers.description),
        "error": _plain(parsers.error),
        "chunk": _plain(parsers.chunk),
        "demand": _plain(parsers.demand),
        "trace_key": _plain(parsers.trace_key),
        "pictures": _plain(pictures.pictures),
        "jpeg": _plain(pictures.jpeg_data),
        "session": _plain(channels.session),
        "segments": channels.segments,
        "handshake": server_side.handshake,
        "listener": server_side.listener,
        "door": server_side.door,
        "gatekeeper": server_side.gatekeeper,
        "dialer": _plain(client_side.dialer),
        "join": client_side.side_socket,
    }
)
BROKEN = MappingProxyType({"broken": _plain(broken)})
"""Never run unless it is named."""


@contextlib.contextmanager
def opened(name: str) -> Iterator[Target]:
    """The target of this name, which also raises where one input makes the process grow by more
    than ``MAX_GROWTH_KB``."""
    with {**TARGETS, **BROKEN}[name]() as target:
        peak_kb = 0

        def measured(data: bytes) -> None:
            nonlocal peak_kb
            target(data)
            before_kb = peak_kb
            peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            grown_kb = peak_kb - before_kb
            assert not before_kb or grown_kb <= MAX_GROWTH_KB, f"one input took {grown_kb} KB"

        yield measured
