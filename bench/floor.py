"""The limit of the machine: one process copies in, the other copies out, a word between them.

No header, no ring, no check, no sleep. Whatever goes through shared memory and touches every byte
on both sides costs at least this; by how much more is what a transport is to be judged by.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np
from numpy.typing import NDArray

from bench.contestant import Exchange
from bench.payload import Payload, Sink, Source
from transport.shm.atomics import spin, store_release

_PAGE = 4096
_ASKED, _ANSWERED, _REPLY = 0, 128, _PAGE
_ROUNDS = 100_000
"""A few milliseconds; then Python looks whether it was interrupted."""


class _Shared:
    """The counters' page, the reply, and on a page of its own the observation."""

    def __init__(self, fd: int, payload: Payload) -> None:
        observation = _REPLY + payload.reply.nbytes
        observation += -observation % _PAGE
        size = observation + payload.nbytes
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        memory = np.frombuffer(mapping, np.uint8)
        self.asked = int(memory.ctypes.data) + _ASKED
        self.answered = int(memory.ctypes.data) + _ANSWERED
        self.arrays = payload.observation.views(memory[observation:], writable=True)
        reply = memory[_REPLY : _REPLY + payload.reply.nbytes]
        self.actions: NDArray[np.float32] = payload.reply.views(reply, writable=True)["actions"]


class Floor:
    name = "floor"
    busy = True

    def serve(self, sink: Sink, link: Connection) -> None:
        fd = recv_handle(link)
        shared = _Shared(fd, sink.payload)
        number = 0
        while True:
            while spin(shared.asked, number, _ROUNDS) == number:
                pass
            np.copyto(shared.actions, sink.take(shared.arrays))
            number += 1
            store_release(shared.answered, number)

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        fd = os.memfd_create("floor")
        shared = _Shared(fd, source.payload)
        send_handle(link, fd, 0)
        os.close(fd)
        number = 0

        def exchange() -> None:
            nonlocal number
            for name, array in source.arrays.items():
                np.copyto(shared.arrays[name], array)
            store_release(shared.asked, number + 1)
            while spin(shared.answered, number, _ROUNDS) == number:
                pass
            number += 1
            source.take(shared.actions)

        yield exchange


CONTESTANTS = (Floor(),)
