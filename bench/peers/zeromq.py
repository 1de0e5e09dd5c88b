"""Bare pyzmq, REQ and REP: one frame per array, sent and received without pyzmq's own copies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import zmq

from bench.contestant import Exchange
from bench.payload import Sink, Source


class ZeroMq:
    """Strict alternation lets the client send its own arrays: none changes before the reply.

    Args:
        owned: Send from memory of its own instead, as whoever goes on at once has to.
    """

    busy = False

    def __init__(self, name: str, endpoint: str, *, owned: bool = False) -> None:
        self.name, self._endpoint, self._owned = name, endpoint, owned

    def serve(self, sink: Sink, link: Connection) -> None:
        specs = sink.payload.observation.specs
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.bind(self._endpoint)
            link.send(socket.get_string(zmq.LAST_ENDPOINT))
            while True:
                frames = socket.recv_multipart(copy=False)
                arrays = {
                    name: np.frombuffer(frame, spec.dtype).reshape(spec.shape)
                    for (name, spec), frame in zip(specs.items(), frames, strict=True)
                }
                socket.send(sink.take(arrays), copy=False)

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        given = list(source.arrays.values())
        parts = [array.copy() for array in given] if self._owned else given
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(link.recv())

            def exchange() -> None:
                if self._owned:
                    for part, array in zip(parts, given, strict=True):
                        np.copyto(part, array)
                socket.send_multipart(parts, copy=False)
                frame = socket.recv(copy=False)
                source.take(np.frombuffer(frame, np.float32).reshape(source.actions.shape))

            yield exchange


CONTESTANTS = (
    ZeroMq("pyzmq tcp", "tcp://127.0.0.1:*"),
    ZeroMq("pyzmq tcp owned", "tcp://127.0.0.1:*", owned=True),
    # An abstract name: no file that could stay.
    ZeroMq("pyzmq ipc", f"ipc://@bench-{os.getpid()}"),
)
