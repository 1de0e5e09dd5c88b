"""Which messages a reader holds, and how far its writer may go.

The ZMQ channel and the one within a process use this. The shared-memory ring follows the same rules
in compiled code, on words that processes share: ``take`` and ``release`` of
``transport.shm.ring_kernels``.

Sequence numbers count messages from 0 and never wrap (2**63 of them outlast the machine).
``tail <= held sequences < cursor <= tail + slots``: the writer may use the slot of sequence ``s``
once ``tail > s - slots``.
"""

from __future__ import annotations


class Window:
    """The reader's side of a ring of ``slots`` slots.

    Attributes:
        cursor: Sequence of the next message to take.
        tail: Everything below is released; what the writer is told.
    """

    __slots__ = ("_early", "cursor", "slots", "tail")

    def __init__(self, slots: int) -> None:
        self.slots, self.cursor, self.tail = slots, 0, 0
        self._early: set[int] = set()  # released before one below them

    @property
    def full(self) -> bool:
        """Whether a further message would be more than the writer may have sent."""
        return self.cursor - self.tail >= self.slots

    def take(self) -> int:
        """Hold the next message; its sequence."""
        sequence = self.cursor
        self.cursor = sequence + 1
        return sequence

    def release(self, sequence: int) -> bool:
        """Let go of one, in any order; whether ``tail`` moved."""
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
