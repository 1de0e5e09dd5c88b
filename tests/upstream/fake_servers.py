"""Foreign servers in a thread of the test's process, which answer whatever a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgpack
import numpy as np
import zmq
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from runtime.wire_formats.msgpack_arrays import pack, unpack
from runtime.wire_formats.npy_arrays import decode_array, encode_array
from tests.upstream.foreign_model import toy

KEY = "0123456789abcdef"


def openpi_toy(observation: dict[str, Any]) -> bytes:
    image = observation["images"]["cam_high"].transpose(1, 2, 0)
    return pack({"actions": toy(image, observation["state"]), "server_timing": {"infer_ms": 1.0}})


class FakeOpenpi:
    """Answers each observation with ``answer``: bytes, text, or None for nothing at all.

    Attributes:
        observations: What it was asked.
        connections: How many there were.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], bytes | str | None] = openpi_toy,
        *,
        hello: bytes | str | None = b"\x80",
        api_key: str = "",
        port: int = 0,
    ) -> None:
        self.answer, self._hello, self._api_key = answer, hello, api_key
        self.observations: list[dict[str, Any]] = []
        self.connections = 0
        self._server = serve(
            self._talk,
            "127.0.0.1",
            port,
            compression=None,
            process_request=self._check,
            max_size=None,
            close_timeout=0.1,
        )
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _check(self, connection: Any, request: Any) -> Any:
        given = request.headers.get("Authorization")
        if self._api_key and given != f"Api-Key {self._api_key}":
            return connection.respond(HTTPStatus.UNAUTHORIZED, "no\n")
        return None

    def _talk(self, connection: Any) -> None:
        self.connections += 1
        try:
            if self._hello is not None:
                connection.send(self._hello)
            for frame in connection:
                self.observations.append(unpack(frame))
                answer = self.answer(self.observations[-1])
                if answer is not None:
                    connection.send(answer)
        except ConnectionClosed:
            pass

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()

    def __enter__(self) -> FakeOpenpi:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


MODALITIES = {
    "video": ["front"],
    "state": ["left", "right"],
    "action": ["left", "right"],
    "language": ["task"],
}


def modalities(**changes: Any) -> dict[str, Any]:
    """What ``get_modality_config`` answers; ``state=…`` replaces keys, ``state_ticks`` ticks."""
    ticks = {"video": [0], "state": [0], "action": list(range(10)), "language": [0]}
    return {
        name: {
            "__ModalityConfig_class__": True,
            "as_json": {
                "delta_indices": changes.get(f"{name}_ticks", ticks[name]),
                "modality_keys": changes.get(name, keys),
            },
        }
        for name, keys in MODALITIES.items()
    }


def groot_toy(request: dict[str, Any]) -> Any:
    if request["endpoint"] == "get_modality_config":
        return modalities()
    if request["endpoint"] == "reset":
        return {}
    observation = request["data"]["observation"]
    state = np.concatenate([observation["state"][key][0, 0] for key in ("left", "right")])
    actions = toy(observation["video"]["front"][0, 0], state)[None]
    return [{"left": actions[..., :7], "right": actions[..., 7:]}, {}]


class FakeGroot:
    """Answers each request with ``answer``: any value, bytes as they are, None for nothing.

    Attributes:
        requests: What it was asked.
    """

    def __init__(
        self, answer: Callable[[dict[str, Any]], Any] = groot_toy, *, token: str = "", port: int = 0
    ) -> None:
        self.answer, self._token = answer, token
        self.requests: list[dict[str, Any]] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        if port:
            self._socket.bind(f"tcp://127.0.0.1:{port}")
        self.port = port or self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(10):
                continue
            identity, empty, message = self._socket.recv_multipart()
            request = msgpack.unpackb(message, object_hook=decode_array)
            self.requests.append(request)
            if self._token and request.get("api_token") != self._token:
                answer: Any = {"error": "Unauthorized: Invalid API token"}
            else:
                answer = self.answer(request)
            if answer is not None:
                raw = isinstance(answer, bytes)
                reply = answer if raw else msgpack.packb(answer, default=encode_array)
                self._socket.send_multipart([identity, empty, reply])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def __enter__(self) -> FakeGroot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
