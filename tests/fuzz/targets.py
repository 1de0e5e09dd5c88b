"""Fuzz targets by name: every parser of data from a peer, as a function of bytes.

A target raises only if a guarantee is broken: an undocumented exception, excessive memory or
descriptors, a write outside of its own memory, or an accepted message that is invalid. A refusal by
a parser is no violation.
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
"""Allowed growth of the process by one input: 50 times the longest message of any target."""

_FUNCTIONS = {
    "control": "parsers:control",
    "hello": "parsers:hello",
    "segment_offer": "parsers:segment_offer",
    "schema": "parsers:schema",
    "description": "parsers:description",
    "error": "parsers:error",
    "chunk": "parsers:chunk",
    "demand": "parsers:demand",
    "trace_key": "parsers:trace_key",
    "pictures": "pictures:pictures",
    "jpeg": "pictures:jpeg_data",
    "openpi_frame": "gateway_openpi:openpi_frame",
    "session": "channels:session",
    "dialer": "client_side:dialer",
    "ilstudio": "gateway_ilstudio:ilstudio",
    "lerobot_pickle": "gateway_lerobot:lerobot_pickle",
    "lerobot_parts": "gateway_lerobot:lerobot_parts",
    "groot_npy": "gateway_groot:npy",
    "groot_request": "gateway_groot:request",
    "groot_zmtp": "gateway_groot:zmtp",
}
_CONTEXTS = {
    "segments": "channels:segments",
    "handshake": "server_side:handshake",
    "listener": "server_side:listener",
    "shm_acceptor": "server_side:shm_acceptor",
    "authenticator": "server_side:authenticator",
    "client_handshake": "client_side:client_handshake_target",
}
"""Targets that need resources, which a context manager acquires and releases."""


def broken(data: bytes) -> None:
    """A parser that trusts a length in its input, to test that a violation is found."""
    count = int.from_bytes(data[:1], "little")
    if count and data[count] == ord("!"):
        reached["believed"] += 1


def _from_function(path: str) -> Callable[[], AbstractContextManager[Target]]:
    return lambda: contextlib.nullcontext(_import(path))


def _from_context(path: str) -> Callable[[], AbstractContextManager[Target]]:
    def made() -> AbstractContextManager[Target]:
        context: AbstractContextManager[Target] = _import(path)()
        return context

    return made


def _import(path: str) -> Callable[..., Any]:
    """Import a target; only its own module is imported."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"tests.fuzz.{module}"), name)


TARGETS = MappingProxyType(
    {name: _from_function(path) for name, path in _FUNCTIONS.items()}
    | {name: _from_context(path) for name, path in _CONTEXTS.items()}
)
BROKEN = MappingProxyType({"broken": _from_function("targets:broken")})
"""A target that runs only if it is named."""


@contextlib.contextmanager
def open_target(name: str) -> Iterator[Target]:
    """Acquire the target of this name, wrapped in ``bounded``."""
    with {**TARGETS, **BROKEN}[name]() as target:
        yield bounded(target)


def bounded(target: Target) -> Target:
    """Wrap ``target`` to raise if one input makes the process grow by more than
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
