"""Zenoh: an observation's topic and an action's, peer to peer over loopback.

Once over TCP and once with its shared memory. The package fills a shared buffer from ``bytes`` or
``bytearray`` only and reads one as ``bytes`` only, so a copy on the way out is its interface's.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zenoh
from zenoh import shm

from bench.contestant import Exchange
from bench.payload import Payload, Sink, Source
from transport.shm.segment import FOLDER

_OBSERVATION, _ACTIONS = "bench/observation", "bench/actions"


def _session(*, shared: bool, listen: str | None = None, connect: str | None = None) -> Any:
    config = zenoh.Config()
    config.insert_json5("mode", '"peer"')
    config.insert_json5("scouting/multicast/enabled", "false")
    config.insert_json5("transport/shared_memory/enabled", json.dumps(shared))
    config.insert_json5("listen/endpoints", json.dumps([listen] if listen else []))
    config.insert_json5("connect/endpoints", json.dumps([connect] if connect else []))
    return zenoh.open(config)


def _publisher(session: Any, topic: str) -> Any:
    """Not batched, and waiting rather than dropping when the way is congested."""
    return session.declare_publisher(
        topic, express=True, congestion_control=zenoh.CongestionControl.BLOCK
    )


def _views(payload: Payload, data: bytes) -> dict[str, np.ndarray]:
    views, start = {}, 0
    for name, spec in payload.observation.specs.items():
        count = int(np.prod(spec.shape))
        views[name] = np.frombuffer(data, spec.dtype, count, start).reshape(spec.shape)
        start += views[name].nbytes
    return views


class _Outbox:
    """Publishes arrays; through shared memory from two regions that take turns."""

    def __init__(self, publisher: Any, nbytes: int, *, shared: bool) -> None:
        self._publisher, self._nbytes = publisher, nbytes
        self._provider = shm.ShmProvider.default_backend(8 * nbytes + 2**20) if shared else None

    def send(self, arrays: list[np.ndarray]) -> None:
        if self._provider is None:
            self._publisher.put(b"".join(array.data for array in arrays))
            return
        region = self._provider.alloc(self._nbytes, shm.BlockOn(shm.GarbageCollect()))
        start = 0
        for array in arrays:
            region[start : start + array.nbytes] = array.tobytes()
            start += array.nbytes
        self._publisher.put(region)


class Zenoh:
    busy = False

    def __init__(self, name: str, *, shared: bool) -> None:
        self.name, self._shared = name, shared

    def serve(self, sink: Sink, link: Connection) -> None:
        address = link.recv()
        with _session(shared=self._shared, listen=address) as session:
            subscriber = session.declare_subscriber(_OBSERVATION)
            publisher = _publisher(session, _ACTIONS)
            outbox = _Outbox(publisher, sink.payload.reply.nbytes, shared=self._shared)
            link.send(None)
            _await(publisher)
            link.send(None)
            for sample in subscriber:
                outbox.send([sink.take(_views(sink.payload, sample.payload.to_bytes()))])

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        before = set(_segments())
        try:
            with self._connected(source, link) as exchange:
                yield exchange
        finally:
            # Zenoh leaves them to the next process that opens a session.
            for segment in set(_segments()) - before:
                segment.unlink(missing_ok=True)

    @contextmanager
    def _connected(self, source: Source, link: Connection) -> Iterator[Exchange]:
        address = f"tcp/127.0.0.1:{_free_port()}"
        link.send(address)
        link.recv()
        parts = list(source.arrays.values())
        with _session(shared=self._shared, connect=address) as session:
            subscriber = session.declare_subscriber(_ACTIONS)
            publisher = _publisher(session, _OBSERVATION)
            outbox = _Outbox(publisher, source.payload.nbytes, shared=self._shared)

            def exchange() -> None:
                outbox.send(parts)
                data = subscriber.recv().payload.to_bytes()
                source.take(np.frombuffer(data, np.float32).reshape(source.actions.shape))

            # What is published before the other side's subscriber is known is lost: both wait.
            _await(publisher)
            link.recv()
            yield exchange


def _segments() -> Iterator[Path]:
    return FOLDER.glob("*.zenoh")


def _await(publisher: Any) -> None:
    """Until the other side's subscriber is known here."""
    deadline = time.monotonic() + 10
    while not publisher.matching_status.matching:
        if time.monotonic() > deadline:
            raise TimeoutError("Zenoh: no subscriber was found in 10 s")
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


CONTESTANTS = (Zenoh("zenoh", shared=False), Zenoh("zenoh shm", shared=True))
