"""One way to exchange a payload between two processes, and the names of all of them.

A contestant is two halves that meet over a ``link``, a pipe for addresses and descriptors. A
module's contestants are imported by name, in the process that needs them: a package that is not
installed takes its own rows away and nothing else, and the report says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Protocol

from bench.payload import PAYLOADS, Sink, Source

Exchange = Callable[[], None]
"""Send ``source.arrays``, wait for the reply, copy it to ``source.actions``."""


class Contestant(Protocol):
    """Attributes:
    name: In tables, and on a command line.
    busy: Its server never sleeps, so it is stopped while others are measured.
    """

    name: str
    busy: bool

    def serve(self, sink: Sink, link: Connection) -> None:
        """Answer exchanges until killed."""

    def connect(self, source: Source, link: Connection) -> AbstractContextManager[Exchange]:
        """The client's half; the server's has been started."""


class Absent(Exception):
    """A contestant that cannot run here; the reason."""


_MODULES: Mapping[str, tuple[str, ...]] = {
    "bench.floor": ("floor",),
    "bench.ours": ("shm spin", "shm default", "shm block", "zmq", "zmq loaned"),
    "bench.ours_policy": ("policy shm", "policy shm 7 idle", "policy zmq"),
    "bench.ours_ring": ("ring", "ring fused"),
    "bench.peers.zeromq": ("pyzmq tcp", "pyzmq tcp owned", "pyzmq ipc"),
    "bench.peers.pickle_tcp": ("pickle tcp ILStudio", "pickle tcp"),
    "bench.peers.websocket": ("websocket",),
    "bench.peers.remote_call": ("grpc LeRobot", "grpc"),
    "bench.peers.iceoryx": ("iceoryx2",),
    "bench.peers.pipe": ("pipe",),
    "bench.peers.zenoh_topics": ("zenoh", "zenoh shm"),
}
HOMES: dict[str, str] = {name: module for module, names in _MODULES.items() for name in names}
"""Where each contestant is."""
_PAYLOADS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_MODULES["bench.ours_policy"], ("1", "2", "4")),
    "ring fused": ("64B",),
}
"""Contestants that take some payloads only: a policy has a camera, and the compiled copy is of one
array, word by word."""


def payloads_of(name: str) -> tuple[str, ...]:
    """The payloads that the contestant of that name can exchange."""
    return _PAYLOADS.get(name, tuple(PAYLOADS))


def check(name: str, payload: str) -> None:
    """Raises ``ValueError``: no such contestant or payload, or the one does not take the other."""
    if name not in HOMES:
        raise ValueError(f"contestant: got {name!r}, expected one of {tuple(HOMES)}")
    if payload not in payloads_of(name):
        raise ValueError(
            f"payload: got {payload!r} for {name!r}, which takes only {list(payloads_of(name))}"
        )


def find(name: str) -> Contestant:
    """The contestant of that name.

    Raises:
        Absent: Its package is not installed, or not usable.
        ValueError: No such name.
    """
    if name not in HOMES:
        raise ValueError(f"contestant: got {name!r}, expected one of {tuple(HOMES)}")
    try:
        module = importlib.import_module(HOMES[name])
    except ImportError as error:
        raise Absent(f"not installed: {error}") from error
    contestants: dict[str, Contestant] = {each.name: each for each in module.CONTESTANTS}
    return contestants[name]
