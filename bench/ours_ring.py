"""The ring by itself, watched without end: no session, no channel, no wake-up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np

from bench.contestant import Exchange
from bench.payload import Payload, Sink, Source
from transport.base import Record
from transport.channel import Kind
from transport.layout import Layout
from transport.ring import RingReader, RingWriter
from transport.shm import Mapping

_EPOCH = bytes(range(16))
_ROUNDS = 100_000


def _layouts(payload: Payload) -> tuple[Layout, Layout]:
    return Layout.of(payload.observation), Layout.of(payload.reply)


def _next(reader: RingReader) -> Record:
    while (record := reader.take()) is None:
        reader.spin(_ROUNDS)
    return record


class Ring:
    name, busy = "ring", True

    def serve(self, sink: Sink, link: Connection) -> None:
        theirs, ours = _layouts(sink.payload)
        peer = Mapping(recv_handle(link), theirs.nbytes, writable=False)
        own = Mapping(recv_handle(link), ours.nbytes, writable=True)
        reader = RingReader(own, peer, _EPOCH, sink.payload.observation, theirs)
        writer = RingWriter(own, peer, _EPOCH, sink.payload.reply, ours)
        while True:
            record = _next(reader)
            assert record.views is not None
            actions = sink.take(record.views.arrays)
            reader.release(record.sequence)
            slot = writer.claim()
            assert slot is not None
            np.copyto(slot["actions"], actions)
            writer.publish(Kind.DATA, 1, 0, None)

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        ours, theirs = _layouts(source.payload)
        own, peer = (self._segment(link, layout) for layout in (ours, theirs))
        reader = RingReader(own, peer, _EPOCH, source.payload.reply, theirs)
        writer = RingWriter(own, peer, _EPOCH, source.payload.observation, ours)

        def exchange() -> None:
            slot = writer.claim()
            assert slot is not None
            for name, view in slot.items():
                np.copyto(view, source.arrays[name])
            writer.publish(Kind.DATA, 1, 0, None)
            record = _next(reader)
            assert record.views is not None
            source.take(record.views.arrays["actions"])
            reader.release(record.sequence)

        yield exchange

    @staticmethod
    def _segment(link: Connection, layout: Layout) -> Mapping:
        fd = os.memfd_create("ring")
        os.ftruncate(fd, layout.nbytes)
        # Both sides of the benchmark are ours: the second mapping need not be read-only here.
        mapping = Mapping(fd, layout.nbytes, writable=True)
        send_handle(link, fd, os.getpid())
        os.close(fd)
        return mapping


CONTESTANTS = (Ring(),)
