"""Log records of a real-time process, handed to the parent through shared memory."""

from __future__ import annotations

import logging
import time

from runtime.eval_real.shared_state import put_text
from transport.shm.spsc_queue import QueueWriter

ORPHAN_HOLD_S = 1.0
"""How long the pose is commanded on after a stop when there is no parent any more."""


class EventLog(logging.Handler):
    """Log records into the mailbox; the parent shows them."""

    def __init__(self, events: QueueWriter) -> None:
        super().__init__(logging.INFO)
        self._events = events
        self.attempt = self.tick = 0

    def emit(self, record: logging.LogRecord) -> None:
        views = self._events.claim()
        if views is not None:
            views["stamp_ns"][...] = time.monotonic_ns()
            views["leg"][...], views["tick"][...] = self.attempt, self.tick
            put_text(views["text"], record.getMessage())
            self._events.publish()
