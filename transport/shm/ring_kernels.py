"""The ring's steps, compiled: what runs once per message.

``transport.shm.ring`` says what they guarantee together; here is each on its own. They work on
addresses and on integers, check what the peer wrote, and touch nothing of Python's.

Three records have named fields. ``WRITER`` and ``READER`` are what one end knows, in memory of its
own that no peer can write: plain loads and stores. ``FIRST_PAGE`` is shared. Its counters and flags
are accessed atomically, and each place where two processes meet is marked ``SYNC POINT`` and names
the place that it pairs with. A message's header is written plainly before it is published, and read
with relaxed atomic loads, once per field: a hostile peer may go on writing to it, and what was
checked must be what is used.

numba does not see that another file changed (``transport.jit``), so everything that the compiled
code depends on is defined here, and ``transport.shm.segment_layout`` takes the offsets from here.
"""

from __future__ import annotations

import numpy as np

from transport.jit import compiled
from transport.shm.atomics import fence, load, load_relaxed, record_at, store, store_relaxed

DATA = 1
"""The number of the kind of message whose length is given beforehand."""


def _words(*names: str) -> list[tuple[str, type]]:
    return [(name, np.int64) for name in names]


HEADER = np.dtype(
    _words(
        "epoch_low", "epoch_high", "sequence", "request_id", "budget_ns", "kind", "length", "place"
    ),
    align=True,
)
"""A message's header, in the writer's segment: ``place`` says where its payload is."""
HEADER_BYTES = HEADER.itemsize
EPOCH_LOW, EPOCH_HIGH, SEQUENCE, REQUEST_ID, BUDGET_NS, KIND, LENGTH, PLACE = (
    int(HEADER.fields[name][1])  # type: ignore[index]
    for name in HEADER.names or ()
)
"""Offsets within a header."""

MAX_SLOTS = 48
FIRST_PAGE = np.dtype(
    {
        "names": ["identity", "head", "tail", "asleep", "closed", "headers"],
        "formats": ["V128", *[np.int64] * 4, (HEADER, MAX_SLOTS)],
        "offsets": [0, 128, 256, 384, 512, 1024],
        "itemsize": 4096,
    },
    align=True,
)
"""The first page of a segment. Its owner, and nobody else, writes all of it: ``identity`` before
anybody else maps it (``transport.shm.segment_layout``), ``head`` (messages published in this
segment), ``tail`` (messages released in the other), ``asleep`` (1: ring the bell), ``closed`` (1:
nothing will follow) and the ``headers`` of the last messages, by sequence modulo the number of
slots. Counters are 128
bytes apart: processors fetch cache lines in pairs."""
HEAD, TAIL, ASLEEP, CLOSED_FLAG, HEADERS = (
    int(FIRST_PAGE.fields[name][1])  # type: ignore[index]
    for name in ("head", "tail", "asleep", "closed", "headers")
)
"""Offsets within a segment."""

_ENDS = _words("own", "peer", "slots", "epoch_low", "epoch_high")
WRITER = np.dtype(
    [*_ENDS, *_words("published", "released", "claimed"), ("places", np.int64, MAX_SLOTS)],
    align=True,
)
"""What a writer knows: addresses of its ``own`` segment and its ``peer``'s, constants, messages
``published``, messages that the reader was seen to have ``released``, the place it ``claimed``, and
the ``places`` of the last messages' payloads, by sequence modulo ``slots``."""
READER = np.dtype(
    [*_ENDS, *_words("data_length", "taken", "released", "released_early")], align=True
)
"""What a reader knows: addresses and constants as a writer, the length of DATA, messages ``taken``,
``released`` (all below it are), and ``released_early``: a bit per message from ``released`` on,
of those released before an older one."""

_header_at = record_at(HEADER)
_writer_at = record_at(WRITER)
_reader_at = record_at(READER)

NO_PLACE, BAD_TAIL = -1, -2
"""Of ``claim``."""
PUBLISHED, PUBLISHED_TO_A_SLEEPER = 0, 1
"""Of ``publish``."""
NOTHING, CLOSED, TAKEN, OTHER_EPOCH, MALFORMED, IMPOSSIBLE = range(6)
"""Of ``take``."""


@compiled("i8(i8)")
def claim(address: int) -> int:
    """The lowest place for a payload that no unreleased message is in; or ``NO_PLACE``, or
    ``BAD_TAIL`` where what the reader says it has released cannot be. ``address``: of a WRITER."""
    writer = _writer_at(address)
    # SYNC POINT: pairs with release.tail: the reader is done with the payloads below this tail, so
    # they may be overwritten.
    tail = load(writer.peer + TAIL)
    if tail < writer.released or tail > writer.published:
        return BAD_TAIL
    writer.released = tail
    slots = writer.slots
    taken = 0
    for sequence in range(tail, writer.published):
        taken |= 1 << writer.places[sequence % slots]
    for place in range(slots):
        if not taken >> place & 1:
            writer.claimed = place
            return place
    return NO_PLACE


@compiled("i8(i8, i8, i8, i8, i8)")
def publish(address: int, request_id: int, budget_ns: int, kind: int, length: int) -> int:
    """Make the claimed place's message visible; whether the reader must be woken. ``address``: of a
    WRITER."""
    writer = _writer_at(address)
    sequence = writer.published
    index = sequence % writer.slots
    header = _header_at(writer.own + HEADERS + index * HEADER_BYTES)
    header.epoch_low = writer.epoch_low
    header.epoch_high = writer.epoch_high
    header.sequence = sequence
    header.request_id = request_id
    header.budget_ns = budget_ns
    header.kind = kind
    header.length = length
    header.place = writer.claimed
    writer.places[index] = writer.claimed
    writer.published = sequence + 1
    # SYNC POINT: pairs with take.head: publishes the header above and the payload before it.
    store(writer.own + HEAD, sequence + 1)
    # SYNC POINT: pairs with fall_asleep.fence: of the two stores before the fences, head here and
    # asleep there, at least one is seen by the load after the other's fence.
    fence()
    if load(writer.peer + ASLEEP) != 0:
        return PUBLISHED_TO_A_SLEEPER
    return PUBLISHED


@compiled("UniTuple(i8, 7)(i8)")
def take(address: int) -> tuple[int, int, int, int, int, int, int]:
    """What came of looking for the next message, its sequence, and of its header: request id,
    budget, kind, length, place. For ``IMPOSSIBLE``: the head. ``address``: of a READER."""
    reader = _reader_at(address)
    cursor, slots = reader.taken, reader.slots
    # SYNC POINT: pairs with publish.head: headers and payloads of all messages below it are whole.
    head = load(reader.peer + HEAD)
    if head == cursor:
        # SYNC POINT: pairs with RingWriter.close.closed: the last head is stored before.
        if load(reader.peer + CLOSED_FLAG) == 0:
            return NOTHING, 0, 0, 0, 0, 0, 0
        # SYNC POINT: pairs with publish.head: what came between the two loads above.
        head = load(reader.peer + HEAD)
        if head == cursor:
            return CLOSED, 0, 0, 0, 0, 0, 0
    if head < cursor or head > reader.released + slots:
        return IMPOSSIBLE, head, 0, 0, 0, 0, 0
    header = reader.peer + HEADERS + cursor % slots * HEADER_BYTES
    epoch_low, epoch_high = load_relaxed(header + EPOCH_LOW), load_relaxed(header + EPOCH_HIGH)
    sequence, request_id = load_relaxed(header + SEQUENCE), load_relaxed(header + REQUEST_ID)
    budget_ns, kind = load_relaxed(header + BUDGET_NS), load_relaxed(header + KIND)
    length, place = load_relaxed(header + LENGTH), load_relaxed(header + PLACE)
    reader.taken = cursor + 1
    found = TAKEN
    if epoch_low != reader.epoch_low or epoch_high != reader.epoch_high:
        found = OTHER_EPOCH
    elif (
        sequence != cursor
        or min(request_id, budget_ns, place, length) < 0
        or place >= slots
        or (kind == DATA and length != reader.data_length)
    ):
        found = MALFORMED
    return found, cursor, request_id, budget_ns, kind, length, place


@compiled("void(i8, i8)")
def release(address: int, sequence: int) -> None:
    """Let go of one message, in any order: the writer may go on behind the oldest that is held.
    ``address``: of a READER."""
    reader = _reader_at(address)
    tail = reader.released
    if tail <= sequence < reader.taken:
        early = reader.released_early | 1 << (sequence - tail)
        while early & 1:
            early >>= 1
            tail += 1
        reader.released_early = early
        if tail != reader.released:
            reader.released = tail
            # SYNC POINT: pairs with claim.tail: whatever was read of the payloads below it is read.
            store(reader.own + TAIL, tail)


@compiled("b1(i8)")
def fall_asleep(address: int) -> bool:
    """Say that the bell is needed from now on; False when there is something to take already:
    then it is not, or a reader that never sleeps again would be rung for at every message.
    ``address``: of a READER."""
    reader = _reader_at(address)
    asleep = reader.own + ASLEEP
    store(asleep, 1)
    # SYNC POINT: pairs with publish.fence: of the two stores before the fences, asleep here and
    # head there, at least one is seen by the load after the other's fence.
    fence()
    if load(reader.peer + HEAD) == reader.taken:
        return True
    store_relaxed(asleep, 0)
    return False
