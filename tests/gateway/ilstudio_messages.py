"""Messages as ILStudio writes them, and a client that sends any bytes."""

from __future__ import annotations

import pickle
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from runtime.server import PolicyServer
from tests.runtime.toy_policy import STATE_DIM

LENGTH = struct.Struct(">I")


class MetaObs:
    """ILStudio's observation, as far as a pickle shows it."""


MetaObs.__module__, MetaObs.__qualname__ = "benchmark.base", "MetaObs"
_BASE = types.ModuleType("benchmark.base")
_BASE.MetaObs = MetaObs  # type: ignore[attr-defined]
_MODULES = {"benchmark": types.ModuleType("benchmark"), "benchmark.base": _BASE}


def meta_obs(rows: int = 1, t: int | None = 0, value: float = 0.0, **fields: Any) -> Any:
    """What ILStudio's client sends to a ``ToyPolicy``; row i has the state ``value + i``."""
    found = MetaObs()
    state = np.full((rows, STATE_DIM), value, np.float32) + np.arange(rows, dtype="f4")[:, None]
    given = {
        **dict.fromkeys(("state_ee", "state_joint", "state_obj", "depth", "pc")),
        "state": state,
        "image": np.full((rows, 1, 3, 24, 32), 100, np.uint8),
        "raw_lang": ["Transfer the cube."] * rows,
        "timestep": -1 if t is None else np.array([[t]] * rows),
        **fields,
    }
    found.__dict__.update(given)
    return found


def dumps(value: Any, protocol: int = 4) -> bytes:
    with mock.patch.dict(sys.modules, _MODULES):
        return pickle.dumps(value, protocol)


class RawClient:
    """A connection to a gateway."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: bytes) -> None:
        self.socket.sendall(LENGTH.pack(len(message)))  # in two sends, as ILStudio does
        self.socket.sendall(message)

    def receive(self) -> Any:
        """The next answer.

        Raises:
            EOFError: The gateway closed the connection.
        """
        return pickle.loads(self._exactly(LENGTH.unpack(self._exactly(LENGTH.size))[0]))

    def ask(self, obs: Any) -> Any:
        self.send(obs if isinstance(obs, bytes) else dumps(obs))
        return self.receive()

    def actions(self, obs: Any) -> np.ndarray:
        """The answer to ``obs``: (T, N, A)."""
        answer = self.ask(obs)
        assert answer, "the answer is empty"
        return np.array([[row["action"] for row in step] for step in answer])

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def wait_until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def names(server: PolicyServer) -> list[str]:
    return [each["client"] for each in server.call_in_serving_thread(server.status)["sessions"]]


def asked(actions: np.ndarray) -> list[int]:
    """How often each row's session was asked in its episode."""
    return [int(count) for count in actions[0, :, 0]]
