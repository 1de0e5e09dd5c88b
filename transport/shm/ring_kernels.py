"""The compiled functions of the ring, which run once per message.

``transport.shm.ring`` describes the protocol that they form. They work on addresses and integers,
check everything that the peer wrote, and use no Python objects.

Three records have named fields. ``WRITER`` and ``READER`` hold the private state of one end, which
no peer can write; it is accessed with plain loads and stores. ``FIRST_PAGE`` is shared. Its
counters and flags are accessed atomically. Each access that synchronizes two processes is marked
``SYNC POINT`` and names the access that it pairs with. A message's header is written with plain
stores before it is published. It is read with one relaxed atomic load per field, because a hostile
peer may keep writing to it, and the values that were checked must be the values that are used.

numba does not notice a change of another file (``transport.jit``), so everything that the compiled
code depends on is defined here. ``transport.shm.segment_layout`` takes the offsets from here.
"""

from __future__ import annotations

import numpy as np

from transport.jit import compiled
from transport.shm.atomics import fence, load, load_relaxed, record_at, store, store_relaxed

DATA = 1
"""Number of the message kind whose length the schema fixes."""


def _words(*names: str) -> list[tuple[str, type]]:
    return [(name, np.int64) for name in names]


HEADER = np.dtype(
    _words(
        "epoch_low", "epoch_high", "sequence", "request_id", "budget_ns", "kind", "length", "place"
    ),
    align=True,
)
"""A message's header, in the writer's segment. ``place`` is the index of its payload."""
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
"""The first page of a segment. Only the segment's owner writes it.

``identity`` is written before the peer maps the segment (``transport.shm.segment_layout``).
``head`` counts the messages published in this segment, ``tail`` the messages released in the other.
``asleep`` is 1 while the owner sleeps and needs a signal, ``closed`` is 1 when no message follows.
``headers`` are those of the last messages, by sequence modulo the number of slots. Counters are 128
bytes apart, because processors fetch cache lines in pairs."""
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
"""Private state of a writer: addresses of its ``own`` segment and of its ``peer``'s, constants, the
number of messages ``published``, the last number of ``released`` ones it read, the ``claimed``
place, and the ``places`` of the last messages' payloads, by sequence modulo ``slots``."""
READER = np.dtype(
    [*_ENDS, *_words("data_length", "taken", "released", "released_early")], align=True
)
"""Private state of a reader: addresses and constants as in ``WRITER``, the length of DATA, the
number of messages ``taken``, ``released`` (all messages below it are released), and
``released_early``: one bit per message from ``released`` on, set if it was released before an older
one."""

_header_at = record_at(HEADER)
_writer_at = record_at(WRITER)
_reader_at = record_at(READER)

NO_PLACE, BAD_TAIL = -1, -2
"""Failures of ``claim``."""
PUBLISHED, PUBLISHED_READER_ASLEEP = 0, 1
"""Results of ``publish``."""
NOTHING, CLOSED, TAKEN, OTHER_EPOCH, MALFORMED, IMPOSSIBLE = range(6)
"""Results of ``take``."""


@compiled("i8(i8)")
def claim(address: int) -> int:
    """Claim the lowest payload place that no unreleased message uses.

    Args:
        address: Of a WRITER.

    Returns:
        The place; ``NO_PLACE`` if there is none; ``BAD_TAIL`` if the reader's tail is impossible.
    """
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
    """Publish the message in the claimed place.

    Args:
        address: Of a WRITER.

    Returns:
        ``PUBLISHED_READER_ASLEEP`` if the reader must be woken, else ``PUBLISHED``.
    """
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
    # SYNC POINT: pairs with prepare_to_wait.fence: of the two stores before the fences, head here
    # and asleep there, at least one is seen by the load after the other's fence.
    fence()
    if load(writer.peer + ASLEEP) != 0:
        return PUBLISHED_READER_ASLEEP
    return PUBLISHED


@compiled("UniTuple(i8, 7)(i8)")
def take(address: int) -> tuple[int, int, int, int, int, int, int]:
    """Take the next message.

    Args:
        address: Of a READER.

    Returns:
        A result, ``NOTHING`` to ``IMPOSSIBLE``; the message's sequence (for ``IMPOSSIBLE``: the
        head); and from its header request id, budget, kind, length, place.
    """
    reader = _reader_at(address)
    cursor, slots = reader.taken, reader.slots
    # SYNC POINT: pairs with publish.head: headers and payloads of all messages below it are whole.
    head = load(reader.peer + HEAD)
    if head == cursor:
        # SYNC POINT: pairs with RingWriter.close.closed: the last head is stored before.
        if load(reader.peer + CLOSED_FLAG) == 0:
            return NOTHING, 0, 0, 0, 0, 0, 0
        # SYNC POINT: pairs with publish.head: messages published between the two loads above.
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
    """Release one message, in any order. The tail moves up to the oldest message that is held.

    Args:
        address: Of a READER.
        sequence: Of the message. One that is not held is ignored.
    """
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
            # SYNC POINT: pairs with claim.tail: all reads of the payloads below it are done.
            store(reader.own + TAIL, tail)


@compiled("b1(i8)")
def prepare_to_wait(address: int) -> bool:
    """Set the ``asleep`` flag, so that the writer signals.

    Args:
        address: Of a READER.

    Returns:
        False if a message has arrived already. The flag is then cleared, because a reader that does
        not sleep would otherwise be signalled for every message.
    """
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
