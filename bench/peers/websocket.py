"""MessagePack over a websocket, as openpi does it: an asyncio server, a synchronous client.

Compression off and no limit on the size, as there. Arrays are packed as their bytes, dtype and
shape; without the copy that ``tobytes`` would make, and unpacked as views of the message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.sync.client import connect

from bench.contestant import Exchange
from bench.payload import Sink, Source

_OPTIONS: dict[str, Any] = {"compression": None, "max_size": None}


def _pack(value: Any) -> bytes:
    return msgpack.packb(value, default=_encode)


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, object_hook=_decode, max_bin_len=2**30)


def _encode(array: np.ndarray) -> dict[str, Any]:
    return {"nd": array.data.cast("B"), "dtype": array.dtype.str, "shape": array.shape}


def _decode(value: dict[str, Any]) -> Any:
    if "nd" not in value:
        return value
    return np.frombuffer(value["nd"], value["dtype"]).reshape(value["shape"])


class Websocket:
    name, busy = "websocket", False

    def serve(self, sink: Sink, link: Connection) -> None:
        async def answer(connection: ServerConnection) -> None:
            async for data in connection:
                await connection.send(_pack({"actions": sink.take(_unpack(data))}))

        async def run() -> None:
            async with serve(answer, "127.0.0.1", 0, ping_interval=None, **_OPTIONS) as server:
                link.send(next(iter(server.sockets)).getsockname()[1])
                await server.serve_forever()

        asyncio.run(run())

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        address = f"ws://127.0.0.1:{link.recv()}"
        with connect(address, ping_interval=None, **_OPTIONS) as connection:

            def exchange() -> None:
                connection.send(_pack(source.arrays))
                source.take(_unpack(connection.recv())["actions"])

            yield exchange


CONTESTANTS = (Websocket(),)
