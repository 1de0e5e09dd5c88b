"""The ring against a model, against two processes, and against a peer that lies."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transport.channel import MAX_BODY_BYTES, Kind
from transport.errors import ProtocolError
from transport.schema import ArraySpec, Schema
from transport.shm.ring import RingReader, RingWriter
from transport.shm.segment import MappedSegment, Segment
from transport.shm.segment_layout import SegmentLayout

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Schema((ArraySpec("value", "int64", (3,)), ArraySpec("image", "uint8", (5, 7))))
EPOCH, OTHER_EPOCH = b"e" * 16, b"o" * 16
LAYOUT = SegmentLayout.of(SCHEMA)
PLACE = 56
"""Where a header says where its payload is."""
FRAMES = 20_000


@dataclass
class Both:
    """Two segments, each mapped as its two sides map them."""

    left: tuple[MappedSegment, MappedSegment]
    right: tuple[MappedSegment, MappedSegment]

    def writer(self, epoch: bytes = EPOCH) -> RingWriter:
        return RingWriter(*self.left, epoch, SCHEMA, SegmentLayout.of(SCHEMA))

    def reader(self) -> RingReader:
        return RingReader(*self.right, EPOCH, SCHEMA, SegmentLayout.of(SCHEMA))

    def close(self) -> None:
        for mapping in (*self.left, *self.right):
            mapping.close()


def make_both() -> Both:
    maps = []
    for _ in range(2):
        segment = Segment.create(SegmentLayout.of(SCHEMA).nbytes)
        maps.append((segment.map(writable=True), segment.map(writable=False)))
        segment.close()
    (left_own, left_seen), (right_own, right_seen) = maps
    return Both((left_own, right_seen), (right_own, left_seen))


@pytest.fixture
def both() -> Iterator[Both]:
    both = make_both()
    yield both
    both.close()


class RingMachine(RuleBasedStateMachine):
    """Whatever the order of calls, a reader gets what was published, in order, unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.both = make_both()
        self.writer, self.reader = self.both.writer(), self.both.reader()
        self.published: deque[tuple[Kind, int, bytes]] = deque()
        self.held: dict[int, tuple[object, tuple[Kind, int, bytes]]] = {}
        self.sent = 0
        self.taken = 0
        self.asleep = False

    @property
    def oldest(self) -> int:
        """The first sequence whose slot is not free."""
        return min(self.held, default=self.taken)

    def _expect_room(self, accepted: bool) -> None:
        assert accepted == (self.sent - self.oldest < LAYOUT.slots)

    def _sent(self, *message: Any) -> None:
        """It was published; a signal is needed exactly if the reader sleeps."""
        assert self.writer.must_signal_reader == self.asleep
        self.published.append(message)
        self.sent += 1

    @rule(scribble=st.integers(0, 255))
    def claim_and_cancel(self, scribble: int) -> None:
        """Data in an unpublished place is not visible."""
        views = self.writer.claim()
        self._expect_room(views is not None)
        for view in (views or {}).values():
            view[...] = scribble

    @rule(value=st.integers(0, 2**62), budget=st.integers(0, 2**62))
    def publish_data(self, value: int, budget: int) -> None:
        views = self.writer.claim()
        self._expect_room(views is not None)
        if views is None:
            assert not self.writer.publish(Kind.DATA, value, budget, None)
            return
        views["value"][...] = value
        views["image"][...] = value % 251
        assert self.writer.publish(Kind.DATA, value, budget, None)
        self._sent(Kind.DATA, value, struct.pack("<q", value))

    @rule(body=st.binary(max_size=64), kind=st.sampled_from([Kind.ERROR, Kind.RESET]))
    def publish_body(self, body: bytes, kind: Kind) -> None:
        accepted = self.writer.publish(kind, 1, 0, body)
        self._expect_room(accepted)
        if accepted:
            self._sent(kind, 1, body)

    @rule()
    def take(self) -> None:
        record = self.reader.take()
        assert (record is None) == (not self.published)
        if record is not None:
            self.held[record.sequence] = (record, self.published.popleft())
            assert record.sequence == self.taken
            self.taken += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[sequence]
        self.reader.release(sequence)

    @rule()
    def prepare_to_wait(self) -> None:
        """Only if no message is left; a reader that does not sleep needs no signal."""
        self.asleep = self.reader.prepare_to_wait()
        assert self.asleep == (not self.published)

    @rule()
    def finish_wait(self) -> None:
        self.reader.finish_wait()
        self.asleep = False

    @invariant()
    def no_two_unreleased_messages_share_a_place(self) -> None:
        """Those that were released before an older one count: the writer does not know yet."""
        headers = [LAYOUT.header_offset(n % LAYOUT.slots) for n in range(self.oldest, self.sent)]
        memory = self.both.right[1].buffer
        places = {struct.unpack_from("<q", memory, header + PLACE)[0] for header in headers}
        assert len(places) == len(headers)
        assert places <= set(range(LAYOUT.slots))

    @invariant()
    def what_is_held_is_whole(self) -> None:
        for record, (kind, request_id, content) in self.held.values():
            assert (record.kind, record.request_id) == (kind, request_id)
            if kind is Kind.DATA:
                assert record.views.arrays["value"].tobytes() == content * 3
                assert (record.views.arrays["image"] == struct.unpack("<q", content)[0] % 251).all()
            else:
                assert record.raw_body == content

    @invariant()
    def unread_is_what_was_not_taken(self) -> None:
        assert self.reader.unread == bool(self.published)

    def teardown(self) -> None:
        self.held.clear()
        self.writer.close()
        self.reader.close()
        self.both.close()


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def poke(both: Both, offset: int, data: bytes) -> None:
    """Write into the writer's segment as a writer gone wrong would."""
    both.left[0].buffer[offset : offset + len(data)] = data


@pytest.mark.parametrize("head", [-1, 5, 2**62])
def test_impossible_head_is_an_error(both: Both, head: int) -> None:
    reader = both.reader()
    poke(both, SegmentLayout.of(SCHEMA).head_offset, struct.pack("<q", head))
    with pytest.raises(ProtocolError, match=f"head: got {head}, expected 0 to 4"):
        reader.take()


@pytest.mark.parametrize("tail", [-1, 5, 2**62])
def test_impossible_tail_is_an_error(both: Both, tail: int) -> None:
    writer = both.writer()
    for number in range(4):
        assert writer.publish(Kind.RESET, number, 0, b"")
    offset = SegmentLayout.of(SCHEMA).tail_offset
    both.right[0].buffer[offset : offset + 8] = struct.pack("<q", tail)
    with pytest.raises(ProtocolError, match=f"tail: got {tail}, expected 0 to 4"):
        writer.claim()


HEADER = struct.Struct("<16s6q")
GOOD = (EPOCH, 0, 7, 0, int(Kind.DATA), SCHEMA.nbytes, 0)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        *((1, 3), (2, -1), (3, -1), (4, 0), (4, 99)),
        *((5, SCHEMA.nbytes - 1), (5, 2**31 - 1), (5, -1)),
        *((6, -1), (6, 4), (6, 2**40)),
    ],
)
def test_slot_with_invalid_header_is_dropped(both: Both, position, value) -> None:
    writer, reader = both.writer(), both.reader()
    writer.publish(Kind.DATA, 7, 0, None)
    header = [*GOOD]
    header[position] = value
    poke(both, SegmentLayout.of(SCHEMA).header_offset(0), HEADER.pack(*header))
    writer.publish(Kind.RESET, 8, 0, b"")
    assert reader.take().request_id == 8
    assert reader.dropped_malformed == 1


@pytest.mark.parametrize("length", [MAX_BODY_BYTES + 1, 2**31 - 1, -1])
def test_a_body_of_an_impossible_length_is_dropped(both: Both, length: int) -> None:
    writer, reader = both.writer(), both.reader()
    writer.publish(Kind.ERROR, 7, 0, b"text")
    header = HEADER.pack(EPOCH, 0, 7, 0, int(Kind.ERROR), length, 0)
    poke(both, SegmentLayout.of(SCHEMA).header_offset(0), header)
    assert reader.take() is None
    assert reader.dropped_malformed == 1


def test_another_epoch_is_dropped_and_its_slot_comes_back(both: Both) -> None:
    stale, reader = both.writer(OTHER_EPOCH), both.reader()
    for number in range(4):
        assert stale.publish(Kind.RESET, number, 0, b"")
    assert reader.take() is None
    assert reader.dropped_epoch == 4
    assert stale.claim() is not None


def test_the_peers_segment_cannot_be_written(both: Both) -> None:
    with pytest.raises(TypeError):
        both.left[1].buffer[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        both.right[1].bytes[0] = 1


def test_a_segment_of_another_layout_is_refused(both: Both) -> None:
    layout = SegmentLayout.of(SCHEMA)
    poke(both, 0, layout.identity(b"n" * 16))
    assert layout.read_nonce(both.right[1].buffer) == b"n" * 16
    with pytest.raises(ProtocolError, match="segment identity"):
        SegmentLayout(layout.payload_bytes + 64).read_nonce(both.right[1].buffer)
    poke(both, 0, b"something else entirely")
    with pytest.raises(ProtocolError, match="segment identity"):
        layout.read_nonce(both.right[1].buffer)


PUBLISH = "from test_transport_ring import publish_frames; publish_frames()"
BIG = Schema((ArraySpec("frame", "uint8", (4096,)), ArraySpec("crc", "int64", ())))


def publish_frames() -> None:
    """The child: FRAMES frames of changing content, each with its checksum."""
    layout = SegmentLayout.of(BIG)
    maps = []
    for name, writable in zip(sys.argv[1:], (True, False), strict=True):
        segment = Segment.open(name, layout.nbytes, writable=writable)
        maps.append(segment.map(writable=writable))
        segment.close()
    writer = RingWriter(*maps, EPOCH, BIG, layout)
    generator = np.random.default_rng(0)
    content = generator.integers(0, 256, 4096, np.uint8)
    for number in range(FRAMES):
        while (views := writer.claim()) is None:
            pass
        content += np.uint8(number % 7 + 1)
        views["frame"][...] = content
        views["crc"][...] = zlib.crc32(content)
        writer.publish(Kind.DATA, number, 0, None)
    views = None
    writer.close()


def test_no_frame_is_torn_between_two_processes() -> None:
    layout = SegmentLayout.of(BIG)
    theirs, ours = Segment.create(layout.nbytes), Segment.create(layout.nbytes)
    own, peer = ours.map(writable=True), theirs.map(writable=False)
    reader = RingReader(own, peer, EPOCH, BIG, layout)
    child = subprocess.Popen(
        [sys.executable, "-c", PUBLISH, theirs.name, ours.name],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"},
    )
    got = 0
    try:
        while got < FRAMES:
            record = reader.take()
            if record is None:
                assert reader.spin(1000) or child.poll() is None or reader.unread
                continue
            assert record.request_id == got
            assert zlib.crc32(record.views.arrays["frame"]) == int(record.views.arrays["crc"])
            reader.release(record.sequence)
            got += 1
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        record = None
        reader.close()
        for closing in (theirs, ours, own, peer):
            closing.close()
    assert (reader.dropped_epoch, reader.dropped_malformed) == (0, 0)
