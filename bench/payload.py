"""What is exchanged: an observation one way, a chunk of actions back, every byte touched.

The client writes each array of the observation into the transport, the server copies each array
that arrived into memory of its own, and the reply goes the same way. Whether they were the same
bytes is verified by ``verify`` and never while time is taken: the observation is marked, the
server answers with a pattern that follows from all the bytes it got, and the client compares the
whole reply with what its own bytes give.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transport.schema import ArraySpec, Schema

HEIGHT, WIDTH, STATE, CHUNK = 480, 640, 14, 100


@dataclass(frozen=True, slots=True)
class Payload:
    """One size of exchange, known by ``name`` on both sides.

    Attributes:
        observation, reply: What is sent and what comes back.
    """

    name: str
    observation: Schema
    reply: Schema

    @property
    def nbytes(self) -> int:
        """Of the observation."""
        return self.observation.nbytes


def _images(count: int) -> Payload:
    images = [ArraySpec(f"image{n}", "uint8", (HEIGHT, WIDTH, 3)) for n in range(count)]
    observation = Schema((*images, ArraySpec("state", "float32", (STATE,))))
    return Payload(str(count), observation, Schema((ArraySpec("actions", "float32", (CHUNK, 14)),)))


_SMALL = Payload(
    "64B",
    Schema((ArraySpec("state", "float32", (16,)),)),
    Schema((ArraySpec("actions", "float32", (16,)),)),
)
PAYLOADS: Mapping[str, Payload] = {p.name: p for p in (_SMALL, *map(_images, (1, 2, 4)))}
"""64 bytes both ways; 1, 2 and 4 cameras with a state, answered by a chunk."""


class Source:
    """The client's memory: ``arrays`` to send, ``actions`` to copy the reply to."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self._random = np.random.default_rng(0)
        specs = payload.observation.specs
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()
        }
        spec = payload.reply.specs["actions"]
        self.actions: NDArray[np.float32] = np.empty(spec.shape, np.float32)
        self._fill()

    def take(self, actions: NDArray[np.float32]) -> None:
        np.copyto(self.actions, actions)

    def verify(self, exchange: Callable[[], None]) -> None:
        """One exchange of new bytes, both ways compared.

        Raises:
            AssertionError: What came back does not follow from what was sent.
        """
        self._fill()
        self.arrays["state"][0] = -1.0
        expected = pattern(self.arrays, self.actions)
        exchange()
        self.arrays["state"][0] = 1.0
        if self.actions.tobytes() != expected.tobytes():
            raise AssertionError("the reply is not what the bytes sent give: some were changed")

    def _fill(self) -> None:
        for array in self.arrays.values():
            if array.dtype == np.uint8:
                array.reshape(-1)[:] = np.frombuffer(self._random.bytes(array.nbytes), np.uint8)
            else:
                array[...] = self._random.random(array.shape)
        self.arrays["state"][0] = 1.0


class Sink:
    """The server's memory: what arrived is copied to ``mirror``."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.mirror: dict[str, NDArray[Any]] = {
            name: np.zeros(spec.shape, spec.dtype)
            for name, spec in payload.observation.specs.items()
        }
        self._actions = np.ones(payload.reply.specs["actions"].shape, np.float32)
        # A memoryview gives a plain float, in half the time that numpy takes for its own.
        self._state = memoryview(self.mirror["state"])

    def take(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Copy every array; the actions to answer with."""
        for name, mirror in self.mirror.items():
            np.copyto(mirror, arrays[name])
        return self.answer()

    def answer(self) -> NDArray[np.float32]:
        """The actions for what is in ``mirror``."""
        return self._actions if self._state[0] > 0 else pattern(self.mirror, self._actions)


def pattern(arrays: Mapping[str, NDArray[Any]], like: NDArray[np.float32]) -> NDArray[np.float32]:
    """Finite values that follow from every byte of ``arrays``, shaped as ``like``."""
    checksum = 0
    for array in arrays.values():
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1), checksum)
    return np.random.default_rng(checksum).random(like.shape, np.float32)
