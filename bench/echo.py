"""The other side of the transport benchmarks: takes an observation, copies it, sends a chunk.

``python bench/echo.py metronome`` is a listener, ``python bench/echo.py zmq`` a bare REP socket
with the same bytes in plain frames. Each prints its port and runs until it is killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transport.control import Welcome
from transport.errors import PeerGone
from transport.listener import Listener
from transport.schema import ArraySpec, Schema

CHUNK = Schema((ArraySpec("actions", "float32", (100, 14)),))


def observation_schema(cameras: int) -> Schema:
    images = [ArraySpec(f"image{n}", "uint8", (480, 640, 3)) for n in range(cameras)]
    return Schema((*images, ArraySpec("state", "float32", (14,))))


def main(kind: str) -> None:
    {"metronome": _metronome, "zmq": _bare}[kind]()


def _announce(port: int) -> None:
    print(port, flush=True)


def _metronome() -> None:
    # Both sides touch every byte: what arrives is copied out of the slot.
    mirror: dict[str, np.ndarray] = {}
    chunk = np.zeros((100, 14), np.float32)
    with Listener("127.0.0.1", 0, describe=dict, accept=lambda hello: Welcome(CHUNK)) as listener:
        _announce(listener.port)
        while True:
            for session in listener.wait(None):
                try:
                    while (message := session.channel.poll()) is not None:
                        with message:
                            for name, array in message.arrays.items():
                                if name not in mirror:
                                    mirror[name] = np.empty_like(array)
                                np.copyto(mirror[name], array)
                            session.channel.send({"actions": chunk}, message.request_id)
                except PeerGone:
                    continue


def _bare() -> None:
    mirror = np.empty(2**24, np.uint8)
    chunk = np.zeros((100, 14), np.float32)
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.linger = 0
        _announce(socket.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            for frame in socket.recv_multipart(copy=False):
                data = np.frombuffer(frame, np.uint8)
                np.copyto(mirror[: data.size], data)
            socket.send(chunk)


if __name__ == "__main__":
    main(sys.argv[1])
