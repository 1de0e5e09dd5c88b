"""A GR00T gateway in a thread of the test's process, and REQ sockets as its clients."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import zmq

from policies.types import PolicyContract
from runtime.gateway.config import GatewayCommand, SessionOptions
from runtime.gateway.groot.gateway import GrootGateway
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from runtime.wire_formats.npy_arrays import decode_array, encode_array
from tests.gateway.served import served
from tests.runtime.toy_policy import CONTRACT, STATE_DIM

NO_KEYS = ObservationKeys()
REPLY_MS = 20_000
"""How long a client waits before the test fails."""


@contextlib.contextmanager
def gateway(
    server: str,
    *,
    keys: ObservationKeys = NO_KEYS,
    api_keys: ApiKeys | None = None,
    contract: PolicyContract = CONTRACT,
    timeout_s: float = 10.0,
    port: int = 0,
    sessions: SessionOptions | None = None,
    **options: Any,
) -> Iterator[GrootGateway]:
    """A gateway to ``server``, served in a thread until the end of the block."""
    command = GatewayCommand("groot", server=server, port=port, **options)
    command = dataclasses.replace(command, sessions=sessions or SessionOptions(timeout_s=timeout_s))
    made = GrootGateway(command, keys, api_keys, contract)
    with served(made):
        yield made


class GrootPeer:
    """A REQ socket, or one of another kind."""

    def __init__(
        self, port: int, token: str | None = None, kind: int = zmq.REQ, heartbeat_ms: int = 0
    ) -> None:
        self._context, self._token = zmq.Context(), token
        self.socket = self._context.socket(kind)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVTIMEO, REPLY_MS)
        self.socket.set(zmq.HEARTBEAT_IVL, heartbeat_ms)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def call(self, endpoint: str | None = None, data: Any = None) -> Any:
        self.send(endpoint, data)
        return self.receive()

    def send(self, endpoint: str | None = None, data: Any = None) -> None:
        request: dict[str, Any] = {"data": data}
        if endpoint is not None:
            request["endpoint"] = endpoint
        if self._token is not None:
            request["api_token"] = self._token
        self.send_raw(msgpack.packb(request, default=encode_array))

    def send_raw(self, request: bytes) -> None:
        self.socket.send(request)

    def receive(self) -> Any:
        return msgpack.unpackb(self.socket.recv(), object_hook=decode_array)

    def act(self, value: float = 0.0, shade: int = 100) -> Any:
        return self.call("get_action", {"observation": observation(value, shade), "options": None})

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> GrootPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def observation(value: float = 0.0, shade: int = 100) -> dict[str, Any]:
    return {
        "video": {"top": np.full((1, 1, 24, 32, 3), shade, np.uint8)},
        "state": {"state": np.full((1, 1, STATE_DIM), value, np.float32)},
        "language": {"annotation.human.task_description": [["go"]]},
    }


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.005)
    return True
