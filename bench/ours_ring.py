"""The ring by itself, watched without end: no session, no channel, no wake-up.

``ring`` goes through its classes, message by message. ``ring fused`` calls the same compiled steps,
with the copy between them, once to send and once to receive: what is left of the difference to
``ring`` is Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np
from numba import njit

from bench.contestant import Exchange
from bench.payload import Payload, Sink, Source
from transport.base_channel import ReceivedMessage
from transport.channel import Kind
from transport.shm import ring_kernels
from transport.shm.atomics import load, pause, store
from transport.shm.ring import RingReader, RingWriter
from transport.shm.segment import MappedSegment, create_anonymous
from transport.shm.segment_layout import SegmentLayout

_EPOCH = bytes(range(16))
_ROUNDS = 100_000


def _layouts(payload: Payload) -> tuple[SegmentLayout, SegmentLayout]:
    return SegmentLayout.of(payload.observation), SegmentLayout.of(payload.reply)


def _next(reader: RingReader) -> ReceivedMessage:
    while (record := reader.take()) is None:
        reader.spin(_ROUNDS)
    return record


class Ring:
    name, busy = "ring", True

    def serve(self, sink: Sink, link: Connection) -> None:
        theirs, ours = _layouts(sink.payload)
        peer = MappedSegment(recv_handle(link), theirs.nbytes, writable=False)
        own = MappedSegment(recv_handle(link), ours.nbytes, writable=True)
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
    def _segment(link: Connection, layout: SegmentLayout) -> MappedSegment:
        fd = create_anonymous("ring", layout.nbytes)
        # Both sides of the benchmark are ours: the second mapping need not be read-only here.
        mapping = MappedSegment(fd, layout.nbytes, writable=True)
        send_handle(link, fd, os.getpid())
        os.close(fd)
        return mapping


_WORD = 8
# Compiled anew each time: a cache would not see that the ring's steps have changed.


@njit("void(i8, i8, i8)")
def _copy(source: int, target: int, nbytes: int) -> None:
    for offset in range(0, nbytes, _WORD):
        store(target + offset, load(source + offset))


@njit("i8(i8, i8, i8, i8, i8)")
def _send(state: int, payloads: int, stride: int, source: int, nbytes: int) -> int:
    place = ring_kernels.claim(state)
    if place >= 0:
        _copy(source, payloads + place * stride, nbytes)
        ring_kernels.publish(state, 1, 0, ring_kernels.DATA, nbytes)
    return place


@njit("i8(i8, i8, i8, i8, i8, i8)")
def _receive(  # noqa: PLR0917  of compiled code
    state: int, payloads: int, stride: int, target: int, nbytes: int, rounds: int
) -> int:
    """1 once a message was copied and released, 0 where none came within so many looks."""
    for _ in range(rounds):
        found, sequence, _, _, _, _, place = ring_kernels.take(state)
        if found == ring_kernels.TAKEN:
            _copy(payloads + place * stride, target, nbytes)
            ring_kernels.release(state, sequence)
            return 1
        pause()
    return 0


class _End:
    """One end's arguments, worked out once."""

    def __init__(
        self, ring: RingReader | RingWriter, memory: MappedSegment, layout: SegmentLayout
    ) -> None:
        first = layout.payload_offset(0)
        stride = layout.payload_offset(1) - first
        self.ring, self.place = ring, (ring._state, memory.address + first, stride)


class FusedRing(Ring):
    name = "ring fused"

    def serve(self, sink: Sink, link: Connection) -> None:
        theirs, ours = _layouts(sink.payload)
        peer = MappedSegment(recv_handle(link), theirs.nbytes, writable=False)
        own = MappedSegment(recv_handle(link), ours.nbytes, writable=True)
        observation, reply = sink.payload.observation, sink.payload.reply
        reader = _End(RingReader(own, peer, _EPOCH, observation, theirs), peer, theirs)
        writer = _End(RingWriter(own, peer, _EPOCH, reply, ours), own, ours)
        came = (*reader.place, sink.mirror["state"].ctypes.data, observation.nbytes, _ROUNDS)
        while True:
            while not _receive(*came):
                pass
            actions = sink.answer()
            _send(*writer.place, actions.__array_interface__["data"][0], reply.nbytes)

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        ours, theirs = _layouts(source.payload)
        own, peer = (self._segment(link, layout) for layout in (ours, theirs))
        observation, reply = source.payload.observation, source.payload.reply
        reader = _End(RingReader(own, peer, _EPOCH, reply, theirs), peer, theirs)
        writer = _End(RingWriter(own, peer, _EPOCH, observation, ours), own, ours)
        goes = (*writer.place, source.arrays["state"].ctypes.data, observation.nbytes)
        comes = (*reader.place, source.actions.ctypes.data, reply.nbytes, _ROUNDS)

        def exchange() -> None:
            _send(*goes)
            while not _receive(*comes):
                pass

        yield exchange


CONTESTANTS = (Ring(), FusedRing())
