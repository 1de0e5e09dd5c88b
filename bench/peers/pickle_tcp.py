"""Pickle over TCP behind a 4-byte big-endian length.

Twice: as ILStudio does it, header and body in two sends on a socket as it comes from the system,
where Nagle's algorithm holds the body back until the header's delayed acknowledgement; and as well
as the same idea goes, one send, no delay, received into memory that is already there.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from bench.contestant import Exchange
from bench.payload import Sink, Source

_LENGTH = struct.Struct(">I")


class AsItComes:
    """Two sends; received by joining what every ``recv`` gave."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, value: Any) -> None:
        body = pickle.dumps(value)
        self._socket.sendall(_LENGTH.pack(len(body)))
        self._socket.sendall(body)

    def receive(self) -> Any:
        (length,) = _LENGTH.unpack(self._exactly(4))
        return pickle.loads(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self._socket.recv(count - len(data))
        return data


class AtItsBest:
    """One gathered send without delay; received in place."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._memory = memoryview(bytearray(2**24))

    def send(self, value: Any) -> None:
        body = pickle.dumps(value, protocol=5)
        sent = self._socket.sendmsg([_LENGTH.pack(len(body)), body])
        if sent < _LENGTH.size + len(body):
            self._socket.sendall(memoryview(body)[sent - _LENGTH.size :])

    def receive(self) -> Any:
        # The first look usually brings the length and the beginning of the body at once.
        got = self._socket.recv_into(self._memory)
        while got < _LENGTH.size:
            got += self._socket.recv_into(self._memory[got:])
        (length,) = _LENGTH.unpack(self._memory[: _LENGTH.size])
        end = _LENGTH.size + length
        while got < end:
            got += self._socket.recv_into(self._memory[got:end])
        return pickle.loads(self._memory[_LENGTH.size : end])


class PickleTcp:
    busy = False

    def __init__(self, name: str, wire: Callable[[socket.socket], AsItComes | AtItsBest]) -> None:
        self.name, self._wire = name, wire

    def serve(self, sink: Sink, link: Connection) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            link.send(listener.getsockname())
            connected, _ = listener.accept()
        with connected:
            wire = self._wire(connected)
            while True:
                wire.send(sink.take(wire.receive()))

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        with socket.create_connection(link.recv()) as connected:
            wire = self._wire(connected)

            def exchange() -> None:
                wire.send(source.arrays)
                source.take(wire.receive())

            yield exchange


CONTESTANTS = (PickleTcp("pickle tcp ILStudio", AsItComes), PickleTcp("pickle tcp", AtItsBest))
