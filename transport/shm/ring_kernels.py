"""The ring's steps, compiled: what runs once per message, on the words of one end.

``transport.shm.ring`` says what they guarantee together; here is each on its own. They work on
addresses and on integers, check what the peer wrote, and touch nothing of Python's.

Compiled code is cached by this file's time and size: numba does not see that another file changed.
So no constant comes from elsewhere, and ``transport.shm.segment_layout`` takes the header's size
from here.
"""

from __future__ import annotations

from transport.shm.atomics import compiled, fence, load, store

HEADER_BYTES = 64
"""Of a message's header: eight words, in the order in which ``publish`` stores them."""
DATA = 1
"""The number of the kind of message whose length is given beforehand."""

_WORD = 8
HEAD_AT, TAIL_AT, ASLEEP_AT, CLOSED_AT, HEADERS_AT = range(5)
SLOT_COUNT, EPOCH_0, EPOCH_1, LENGTH, COUNT, TAIL, MARKS, PLACES = range(5, 13)
"""What one end knows, as words in memory of its own that no peer can write: addresses, constants
(``LENGTH``: of DATA), then what changes. ``COUNT`` is the writer's ``head`` or the reader's
cursor. ``MARKS``: a bit per slot from ``TAIL`` on, of messages released before an older one; for
the writer, the place it claimed. ``PLACES``: where the payloads of the last messages are."""

NO_PLACE, BAD_TAIL = -1, -2
PUBLISHED, PUBLISHED_TO_A_SLEEPER = 0, 1
NOTHING, CLOSED, TAKEN, OTHER_EPOCH, MALFORMED, IMPOSSIBLE = range(6)


@compiled("i8(i8)")
def claim(state: int) -> int:
    """The lowest place for a payload that no unreleased message is in; or ``NO_PLACE``, or
    ``BAD_TAIL`` where what the reader says it has released cannot be."""
    head, slots = load(state + _WORD * COUNT), load(state + _WORD * SLOT_COUNT)
    tail = load(load(state + _WORD * TAIL_AT))
    if tail < load(state + _WORD * TAIL) or tail > head:
        return BAD_TAIL
    store(state + _WORD * TAIL, tail)
    taken = 0
    for sequence in range(tail, head):
        taken |= 1 << load(state + _WORD * (PLACES + sequence % slots))
    for place in range(slots):
        if not taken >> place & 1:
            store(state + _WORD * MARKS, place)
            return place
    return NO_PLACE


@compiled("i8(i8, i8, i8, i8, i8)")
def publish(state: int, request_id: int, budget_ns: int, kind: int, length: int) -> int:
    """Make the claimed place's message visible; whether the reader must be woken."""
    head = load(state + _WORD * COUNT)
    index = head % load(state + _WORD * SLOT_COUNT)
    place = load(state + _WORD * MARKS)
    header = load(state + _WORD * HEADERS_AT) + index * HEADER_BYTES
    store(header, load(state + _WORD * EPOCH_0))
    store(header + _WORD, load(state + _WORD * EPOCH_1))
    store(header + 2 * _WORD, head)
    store(header + 3 * _WORD, request_id)
    store(header + 4 * _WORD, budget_ns)
    store(header + 5 * _WORD, kind)
    store(header + 6 * _WORD, length)
    store(header + 7 * _WORD, place)
    store(state + _WORD * (PLACES + index), place)
    store(state + _WORD * COUNT, head + 1)
    store(load(state + _WORD * HEAD_AT), head + 1)
    fence()
    if load(load(state + _WORD * ASLEEP_AT)) != 0:
        return PUBLISHED_TO_A_SLEEPER
    return PUBLISHED


@compiled("UniTuple(i8, 7)(i8)")
def take(state: int) -> tuple[int, int, int, int, int, int, int]:
    """What came of looking for the next message, its sequence, and of its header: request id,
    budget, kind, length, place. For ``IMPOSSIBLE``: the head.

    Every word of the header is loaded once: what was checked is what is used.
    """
    cursor = load(state + _WORD * COUNT)
    head = load(load(state + _WORD * HEAD_AT))
    if head == cursor:
        closed = load(load(state + _WORD * CLOSED_AT)) != 0
        return (CLOSED if closed else NOTHING, 0, 0, 0, 0, 0, 0)
    slots = load(state + _WORD * SLOT_COUNT)
    if head < cursor or head > load(state + _WORD * TAIL) + slots:
        return IMPOSSIBLE, head, 0, 0, 0, 0, 0
    header = load(state + _WORD * HEADERS_AT) + cursor % slots * HEADER_BYTES
    epoch_0, epoch_1 = load(header), load(header + _WORD)
    sequence = load(header + 2 * _WORD)
    request_id, budget_ns = load(header + 3 * _WORD), load(header + 4 * _WORD)
    kind, length = load(header + 5 * _WORD), load(header + 6 * _WORD)
    place = load(header + 7 * _WORD)
    store(state + _WORD * COUNT, cursor + 1)
    found = TAKEN
    if epoch_0 != load(state + _WORD * EPOCH_0) or epoch_1 != load(state + _WORD * EPOCH_1):
        found = OTHER_EPOCH
    elif (
        sequence != cursor
        or min(request_id, budget_ns, place, length) < 0
        or place >= slots
        or (kind == DATA and length != load(state + _WORD * LENGTH))
    ):
        found = MALFORMED
    return found, cursor, request_id, budget_ns, kind, length, place


@compiled("void(i8, i8)")
def release(state: int, sequence: int) -> None:
    """Let go of one message, in any order: the writer may go on behind the oldest that is held."""
    tail, marks = load(state + _WORD * TAIL), load(state + _WORD * MARKS)
    if tail <= sequence < load(state + _WORD * COUNT):
        marks |= 1 << (sequence - tail)
        while marks & 1:
            marks >>= 1
            tail += 1
        store(state + _WORD * MARKS, marks)
        store(state + _WORD * TAIL, tail)
        store(load(state + _WORD * TAIL_AT), tail)


@compiled("b1(i8)")
def fall_asleep(state: int) -> bool:
    """Say that the bell is needed from now on; False when there is something to take already:
    then it is not, or a reader that never sleeps again would be rung for at every message."""
    asleep = load(state + _WORD * ASLEEP_AT)
    store(asleep, 1)
    fence()
    if load(load(state + _WORD * HEAD_AT)) == load(state + _WORD * COUNT):
        return True
    store(asleep, 0)
    return False
