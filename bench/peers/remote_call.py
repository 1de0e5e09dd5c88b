"""gRPC with messages of bytes and no limit on their size.

Twice: as LeRobot does it, the pickled observation as a stream of parts of 2 MiB and a second call
for the pickled actions; and as well as gRPC goes, one unary call with the arrays' bytes in it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from bench.contestant import Exchange
from bench.payload import Payload, Sink, Source

_SERVICE = "bench.Policy"
_PART = 2 * 2**20
_MIDDLE, _END = b"\x02", b"\x03"
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class RemoteCall:
    """A server of one worker, so that calls of one client are in order."""

    busy = False
    name: str

    def methods(self, sink: Sink) -> dict[str, Any]:
        """gRPC handlers by name."""
        raise NotImplementedError

    def caller(self, source: Source, channel: grpc.Channel) -> Exchange:
        raise NotImplementedError

    def serve(self, sink: Sink, link: Connection) -> None:
        server = grpc.server(ThreadPoolExecutor(1), options=_OPTIONS)
        handler = grpc.method_handlers_generic_handler(_SERVICE, self.methods(sink))
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        link.send(port)
        server.wait_for_termination()

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        with grpc.insecure_channel(f"127.0.0.1:{link.recv()}", options=_OPTIONS) as channel:
            yield self.caller(source, channel)


class AsLeRobot(RemoteCall):
    name = "grpc LeRobot"

    def methods(self, sink: Sink) -> dict[str, Any]:
        latest: list[np.ndarray] = []

        def send_observations(parts: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
            whole = io.BytesIO()
            for part in parts:
                whole.write(memoryview(part)[1:])
            latest[:] = [sink.take(pickle.loads(whole.getvalue()))]
            return b""

        def get_actions(_request: bytes, _: grpc.ServicerContext) -> bytes:
            return pickle.dumps(latest[0])

        return {
            "SendObservations": grpc.stream_unary_rpc_method_handler(send_observations),
            "GetActions": grpc.unary_unary_rpc_method_handler(get_actions),
        }

    def caller(self, source: Source, channel: grpc.Channel) -> Exchange:
        send: Callable[..., bytes] = channel.stream_unary(f"/{_SERVICE}/SendObservations")
        get: Callable[..., bytes] = channel.unary_unary(f"/{_SERVICE}/GetActions")

        def parts(data: bytes) -> Iterator[bytes]:
            for start in range(0, len(data), _PART):
                state = _END if start + _PART >= len(data) else _MIDDLE
                yield state + data[start : start + _PART]

        def exchange() -> None:
            send(parts(pickle.dumps(source.arrays)))
            source.take(pickle.loads(get(b"")))

        return exchange


class OneCall(RemoteCall):
    name = "grpc"

    def methods(self, sink: Sink) -> dict[str, Any]:
        def infer(request: bytes, _: grpc.ServicerContext) -> bytes:
            return sink.take(_views(sink.payload, request)).tobytes()

        return {"Infer": grpc.unary_unary_rpc_method_handler(infer)}

    def caller(self, source: Source, channel: grpc.Channel) -> Exchange:
        infer: Callable[..., bytes] = channel.unary_unary(f"/{_SERVICE}/Infer")

        def exchange() -> None:
            reply = infer(b"".join(array.data for array in source.arrays.values()))
            source.take(np.frombuffer(reply, np.float32).reshape(source.actions.shape))

        return exchange


def _views(payload: Payload, data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a message in which one follows the other without a gap."""
    views, start = {}, 0
    for name, spec in payload.observation.specs.items():
        count = int(np.prod(spec.shape))
        views[name] = np.frombuffer(data, spec.dtype, count, start).reshape(spec.shape)
        start += views[name].nbytes
    return views


CONTESTANTS = (AsLeRobot(), OneCall())
