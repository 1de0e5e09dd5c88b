"""A logging handler that passes log records to the parent process through shared memory."""

from __future__ import annotations

import logging
import time

from transport.shm.spsc_queue import QueueWriter
from transport.shm.text_field import put_text

ORPHAN_HOLD_S = 1.0
"""How long a process without a parent goes on commanding the pose after a stop."""


class EventLog(logging.Handler):
    """Writes log records of level INFO and above to the queue ``events``, which the parent prints.

    A record is dropped when the queue is full, so logging never blocks the control loop.

    Attributes:
        attempt, tick: Written with each record; set by the control process.
    """

    def __init__(self, events: QueueWriter) -> None:
        super().__init__(logging.INFO)
        self._events = events
        self.attempt = self.tick = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of ``record`` to the queue, cut to ``TEXT_BYTES``."""
        views = self._events.claim()
        if views is not None:
            views["stamp_ns"][...] = time.monotonic_ns()
            views["attempt"][...], views["tick"][...] = self.attempt, self.tick
            put_text(views["text"], record.getMessage())
            self._events.publish()
