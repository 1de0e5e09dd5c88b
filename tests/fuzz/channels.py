"""Targets that are one side of a session whose peer sends or writes arbitrary data."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.errors import InferenceError
from runtime.protocol import messages
from tests.fuzz import samples
from tests.fuzz.feed import Feed, reached
from tests.fuzz.targets import Target
from transport.base_channel import SLOTS
from transport.channel import MAX_BODY_BYTES, Kind, Message
from transport.errors import PeerGone, TransportError
from transport.schema import USED, Schema
from transport.shm.channel import ShmChannel
from transport.shm.segment import ShmResources
from transport.shm.segment_layout import PAGE, SegmentLayout
from transport.zeromq.channel import ZmqChannel

STEPS = 12
_SLOT = struct.Struct("<8q")
PAIRS = (
    (samples.REPLY, samples.OBSERVATION),
    (samples.OBSERVATION, samples.REPLY),
    (samples.REPLY, samples.VARYING),
    (samples.SMALL, samples.SMALL),
    (samples.SMALL, samples.EMPTY),
    (samples.EMPTY, samples.SMALL),
)
"""What one side sends, and what it receives."""


class ScriptedConnection:
    """A ``FrameConnection`` without a peer; its queue may be full and it may be broken."""

    def __init__(self) -> None:
        self.sent, self.full = 0, False
        self.gone_reason: str | None = None

    def send(self, frame: Any) -> bool:
        if self.gone_reason:
            raise PeerGone(self.gone_reason)
        self.sent += not self.full
        return not self.full

    def pump(self, timeout_s: float) -> str | None:
        return self.gone_reason

    def close(self, reason: str) -> None: ...


def check(message: Message, schema: Schema) -> None:
    """Check the guarantees of every received message."""
    reached[message.kind.name] += 1
    assert message.kind in Kind and message.request_id >= 0 and message.budget_ns >= 0
    assert len(message.body) <= MAX_BODY_BYTES
    if message.kind is Kind.DATA:
        assert list(message.arrays) == list(schema.specs)
        for name, spec in schema.specs.items():
            array = message.arrays[name]
            assert array.dtype == spec.dtype and not array.flags.writeable
            if name == schema.tail:
                assert 1 <= len(array) <= spec.shape[0]
            else:
                assert array.shape == spec.shape
        _read(message, schema)
    elif message.kind is Kind.ERROR:
        messages.decode_error(message.body)


def _read(message: Message, schema: Schema) -> None:
    """Read every byte, where a read outside of the message would be noticed."""
    for array in message.arrays.values():
        array.tobytes()
    if schema == samples.REPLY:
        with contextlib.suppress(InferenceError):
            messages.read_chunk(message.arrays, samples.CONTRACT)
            reached["chunks"] += 1


def session(data: bytes) -> None:
    """Frames that reach one side of a session over ZMQ."""
    feed = Feed(data)
    send, recv = PAIRS[feed.byte() % len(PAIRS)]
    connection = ScriptedConnection()
    channel = ZmqChannel(send, recv, samples.EPOCH, connection)
    held: list[Message] = []
    delivered = credited = 0
    for _ in range(STEPS):
        if not feed.left:
            break
        step = feed.byte() % 8
        if step < 4:
            frame, fine = _frame(feed, channel, recv)
            delivered += 1
            before = channel.dropped_malformed + channel.dropped_epoch
            channel.deliver(memoryview(frame))
            dropped = channel.dropped_malformed + channel.dropped_epoch - before
            assert dropped in (0, 1) and not (fine and dropped), "a valid message was dropped"
            assert len(channel._inbox) + len(held) <= SLOTS
            credited += not dropped and frame[6:8] == b"\x0a\0"
        else:
            _use(feed, step, channel, connection, held)
        assert len(channel._send_buffers._under_way) <= SLOTS
        assert channel._peer_tail <= channel._head <= channel._peer_tail + SLOTS
    left = len(channel._inbox)
    statistics = channel.statistics()
    assert delivered == left + credited + sum(
        (statistics.received, statistics.dropped_malformed, statistics.dropped_epoch)
    )
    channel.close()
    for message in held:
        message.release()


def _frame(feed: Feed, channel: ZmqChannel, schema: Schema) -> tuple[bytes, bool]:
    """The next message as the peer would send it, or near it; whether it must be accepted."""
    how, kind = feed.byte(), (1, 1, 1, 2, 3, 4, 9, 0)[feed.byte() & 7]
    fields: dict[str, Any] = {
        "sequence": channel._window.cursor,
        "released": channel._peer_tail,
        "received": channel._head,
        "number": feed.byte(),
        "kind": kind,
        "payload": samples.payload(schema) if kind == 1 else feed.take(feed.byte() & 15),
    }
    if how & 1:
        name = (*fields, "budget_ns")[feed.byte() % 4]
        fields[name] = feed.word()
    if how & 2:
        fields["payload"] = feed.bytes_near(fields["payload"])
    if how & 4:
        fields["opcode"] = 10
    if how & 8 and kind == 1 and schema.tail is not None:
        used = 1 + feed.byte() % schema.specs[schema.tail].shape[0]
        at, short = schema.offsets[schema.tail + USED], bytearray(samples.payload(schema))
        short[at : at + 8] = used.to_bytes(8, "little")
        itemsize = np.dtype(schema.specs[schema.tail].dtype).itemsize
        fields["payload"] = bytes(short[: schema.offsets[schema.tail] + used * itemsize])
    fine = not how & 0x17 and kind in range(1, 5) and not channel._window.full
    frame = samples.message(**fields)
    if how & 16:
        return feed.bytes_near(frame), False
    return frame, fine


def _use(feed: Feed, step: int, channel: Any, connection: Any, held: list[Message]) -> None:
    """One call that the owner of the channel makes."""
    with contextlib.suppress(TransportError):  # WouldBlock and PeerGone, as they say
        if step == 4:
            message = channel.poll()
            if message is not None:
                check(message, channel.recv_schema)
                held.append(message)
        elif step == 5 and held:
            held.pop(feed.byte() % len(held)).release()
        elif step == 6 and feed.byte() & 1:
            channel.send_body(Kind.ERROR, 1, b"body")
        elif step == 6:
            loan = channel.loan()
            for name, array in loan.arrays.items():
                array[...] = 1
                assert name in channel.send_schema.specs
            loan.publish(feed.byte())
        elif isinstance(connection, ScriptedConnection):
            connection.full = feed.byte() & 3 == 1
            connection.gone_reason = "gone" if feed.byte() == 255 else None


# Shared memory


class Region:
    """A segment without a name: our mapping of it, read-only where it is the peer's, and the
    peer's own."""

    def __init__(self, nbytes: int, *, writable: bool) -> None:
        fd = os.memfd_create("fuzz")
        os.ftruncate(fd, nbytes + 2 * PAGE)
        ours = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._memory = mmap.mmap(fd, nbytes + 2 * PAGE, prot=ours)
        self._other = mmap.mmap(fd, nbytes + 2 * PAGE)
        os.close(fd)
        self.nbytes = nbytes
        self.buffer = memoryview(self._memory)[PAGE : PAGE + nbytes]
        self.bytes = np.frombuffer(self.buffer, np.uint8)
        self.address = self.bytes.ctypes.data
        self.peer = memoryview(self._other)[PAGE : PAGE + nbytes]

    def wipe(self) -> None:
        self._other[:] = bytes(len(self._other))

    def intact(self) -> bool:
        """Whether nothing was written before and behind the segment."""
        return self._other[:PAGE] == self._other[-PAGE:] == bytes(PAGE)

    def put(self, offset: int, word: int) -> None:
        self.peer[offset : offset + 8] = word.to_bytes(8, "little", signed=True)

    def word(self, offset: int) -> int:
        return int.from_bytes(self.peer[offset : offset + 8], "little", signed=True)

    def close(self) -> None:
        """As ``Mapping``: the memory is used again."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Both sides' memory for one pair of schemas."""

    send: Schema
    recv: Schema
    own: Region
    peer: Region
    layout: SegmentLayout
    """Of the peer's."""

    @classmethod
    def of(cls, send: Schema, recv: Schema) -> Segments:
        own, layout = Region(SegmentLayout.of(send).nbytes, writable=True), SegmentLayout.of(recv)
        return cls(send, recv, own, Region(layout.nbytes, writable=False), layout)


@contextlib.contextmanager
def segments() -> Iterator[Target]:
    """A ring whose peer writes arbitrary data anywhere in its own segment, at any time.

    What it may do to us is to be read wrongly, never more: its segment is mapped read-only, as in a
    real session, so that a store of ours there ends the process, and what lies around our own must
    stay zero.
    """
    made = [Segments.of(*pair) for pair in PAIRS]

    def target(data: bytes) -> None:
        feed = Feed(data)
        _ring(feed, made[feed.byte() % len(made)])

    yield target


def _ring(feed: Feed, memory: Segments) -> None:
    memory.own.wipe()
    memory.peer.wipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    eventfds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    parts = ShmResources(memory.own, memory.peer, *eventfds, ours)  # type: ignore[arg-type]
    channel = ShmChannel(memory.send, memory.recv, samples.EPOCH, parts, spin_us=0)
    held: list[Message] = []
    try:
        for _ in range(STEPS):
            if not feed.left:
                break
            step = feed.byte() % 10
            if step < 3:
                _publish(feed, memory.peer, memory.layout, memory.recv.nbytes)
            elif step == 3:
                _overwrite(feed, memory.peer, memory.layout)
            elif step < 7:
                _use(feed, step, channel, None, held)
            elif step == 7:
                _say(feed, theirs, channel)
            else:
                before = len(held)
                _use(feed, 4, channel, None, held)
                if len(held) > before:
                    held.pop().release()
            assert len(held) <= SLOTS
    finally:
        channel.close()
        for message in held:
            with contextlib.suppress(TransportError):
                message.release()
        theirs.close()
    assert memory.own.intact() and memory.peer.intact(), "written outside of the segment"


def _publish(feed: Feed, peer: Region, layout: SegmentLayout, length: int) -> None:
    """The peer's next message as it should be, or with some words of its header changed."""
    head = peer.word(layout.head_offset)
    index = head % layout.slots
    kind = (1, 1, 2, 4)[feed.byte() & 3]
    epoch = [int.from_bytes(samples.EPOCH[i : i + 8], "little") for i in (0, 8)]
    header = [*epoch, head, 7, 0, kind, length if kind == 1 else 5, index]
    changes = feed.byte()
    for _ in range(changes & 3 if changes & 128 else 0):
        header[feed.byte() % 8] = feed.word()
    _SLOT.pack_into(peer.peer, layout.header_offset(index), *header)
    peer.put(layout.head_offset, min(head + 1, 2**63 - 1))


def _overwrite(feed: Feed, peer: Region, layout: SegmentLayout) -> None:
    """Overwrite any word of the first page, most often a polled one."""
    where = feed.byte()
    offsets = layout.head_offset, layout.tail_offset, layout.asleep_offset, layout.closed_offset
    offset = offsets[where & 3] if where < 192 else (where * 61 + feed.byte()) * 8 % (PAGE - 8)
    near = feed.byte()
    word = peer.word(offset) + near - 4 if near < 9 else feed.word()
    peer.put(offset, max(-(2**63), min(word, 2**63 - 1)))


def _say(feed: Feed, theirs: socket.socket, channel: ShmChannel) -> None:
    """Send a datagram or close the socket; then check the peer, and prepare a wait."""
    kind = feed.byte()
    with contextlib.suppress(OSError, TransportError):
        if kind & 3 == 1:
            theirs.send(feed.take(feed.byte()))
        elif kind & 3 == 2:
            theirs.shutdown(socket.SHUT_WR)
        if kind & 4:
            channel.check_peer()
        if kind & 8 and channel.prepare_to_wait():
            channel.finish_wait()
    assert channel.gone_reason is None or len(channel.gone_reason) <= MAX_BODY_BYTES
