"""Flow control of a reader: which messages it holds, and how many more its writer may send.

The ZMQ channel and the in-process channel use this class. The shared-memory ring follows the same
rules in compiled code, on counters that processes share: ``take`` and ``release`` of
``transport.shm.ring_kernels``.

Sequence numbers count messages from 0 and never wrap (2**63 messages outlast the machine).
``tail <= held sequences < cursor <= tail + slots``: the writer may use the slot of sequence ``s``
once ``tail > s - slots``.
"""

from __future__ import annotations


class ReceiveWindow:
    """The reader's side of a ring of ``slots`` slots.

    Attributes:
        cursor: Sequence of the next message to take.
        tail: All messages below it are released. The writer is sent this number.
    """

    __slots__ = ("_early", "cursor", "slots", "tail")

    def __init__(self, slots: int) -> None:
        self.slots, self.cursor, self.tail = slots, 0, 0
        self._early: set[int] = set()  # released before one below them

    @property
    def full(self) -> bool:
        """Whether the writer may not have sent a further message."""
        return self.cursor - self.tail >= self.slots

    def take(self) -> int:
        """Hold the next message and return its sequence number."""
        sequence = self.cursor
        self.cursor = sequence + 1
        return sequence

    def release(self, sequence: int) -> bool:
        """Release one message, in any order; whether ``tail`` moved."""
        if sequence != self.tail or sequence >= self.cursor:
            if self.tail < sequence < self.cursor:
                self._early.add(sequence)
            return False
        tail = sequence + 1
        while tail in self._early:
            self._early.remove(tail)
            tail += 1
        self.tail = tail
        return True
