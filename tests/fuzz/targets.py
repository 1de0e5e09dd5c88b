"""Every parser of what a peer sends, by name, as a function of bytes.

A target raises only where a promise is broken: an exception that the parser does not name, memory
or descriptors out of proportion, a store outside of what is ours, or something accepted that is not
what it says. What a parser refuses is no violation.
"""

from __future__ import annotations

import contextlib
import importlib
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

from tests.fuzz.feed import reached

Target = Callable[[bytes], None]
MAX_GROWTH_KB = 64 * 1024
"""Of the process, by a single input. The longest message of any target is a fiftieth of it."""

_PLAIN = {
    "control": "parsers:control",
    "hello": "parsers:hello",
    "offer": "parsers:offer",
    "schema": "parsers:schema",
    "description": "parsers:description",
    "error": "parsers:error",
    "chunk": "parsers:chunk",
    "demand": "parsers:demand",
    "trace_key": "parsers:trace_key",
    "pictures": "pictures:pictures",
    "jpeg": "pictures:jpeg_data",
    "session": "channels:session",
    "dialer": "client_side:dialer",
}
_HOLDING = {
    "segments": "channels:segments",
    "handshake": "server_side:handshake",
    "listener": "server_side:listener",
    "door": "server_side:door",
    "gatekeeper": "server_side:gatekeeper",
    "join": "client_side:side_socket",
}
"""Those that make something first, and let go of it afterwards."""


def broken(data: bytes) -> None:
    """A parser that believes a length it was told: to see that a violation is found."""
    count = int.from_bytes(data[:1], "little")
    if count and data[count] == ord("!"):
        reached["believed"] += 1


def _plain(place: str) -> Callable[[], AbstractContextManager[Target]]:
    return lambda: contextlib.nullcontext(_found(place))


def _holding(place: str) -> Callable[[], AbstractContextManager[Target]]:
    def made() -> AbstractContextManager[Target]:
        context: AbstractContextManager[Target] = _found(place)()
        return context

    return made


def _found(place: str) -> Callable[..., Any]:
    """What is imported is what the one target needs."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"tests.fuzz.{module}"), name)


TARGETS = MappingProxyType(
    {name: _plain(place) for name, place in _PLAIN.items()}
    | {name: _holding(place) for name, place in _HOLDING.items()}
)
BROKEN = MappingProxyType({"broken": _plain("targets:broken")})
"""Never run unless it is named."""


@contextlib.contextmanager
def opened(name: str) -> Iterator[Target]:
    """The target of this name; see ``bounded``."""
    with {**TARGETS, **BROKEN}[name]() as target:
        yield bounded(target)


def bounded(target: Target) -> Target:
    """``target``, which also raises where one input makes the process grow by more than
    ``MAX_GROWTH_KB``."""
    peak_kb = 0

    def measured(data: bytes) -> None:
        nonlocal peak_kb
        target(data)
        before_kb = peak_kb
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        grown_kb = peak_kb - before_kb
        assert not before_kb or grown_kb <= MAX_GROWTH_KB, f"one input took {grown_kb} KB"

    return measured
