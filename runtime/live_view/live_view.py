"""The live view as its evaluation sees it: a process that logs, and the end that writes to it.

Nothing that happens to it ends the evaluation: a problem is told once, and the view is over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from runtime.live_view.layout import LiveViewLayout, create_segment
from runtime.live_view.live_view_writer import LiveViewWriter
from transport.child_process import ChildProcess
from transport.errors import ChildFailed

READY_WITHIN_S = 30.0
LOGGED_WITHIN_S = 60.0
"""For the process to log what it was sent, at the end or where the evaluation can wait for it."""


class LiveView:
    """Shows an evaluation in a process of its own.

    Args:
        target: ``VIEWER``, a viewer's URL, or the file to write.
        layout: What the evaluation's messages have in common.
        tell: Called with one line of text for every problem.

    Attributes:
        layout: As given.
        fd: The shared memory's descriptor, for another process that writes.
        writer: This process' sending end.
    """

    def __init__(self, target: str, layout: LiveViewLayout, tell: Callable[[str], None]) -> None:
        self.layout, self._tell, self._target = layout, tell, target
        self._over = False
        self.fd = create_segment(layout)
        self.writer = LiveViewWriter(self.fd, layout)
        self._process = ChildProcess(
            "runtime.live_view.logger_process",
            ["--target", target, "--layout", layout.to_json(), "--segment", str(self.fd)],
            name="the live view",
            pass_fds=[self.fd],
            outlives=True,
            # A viewer that the process opens outlives it, and so must the streams it prints to.
            events_flag="--events",
            shares_output=True,
        )
        try:
            self._process.wait_ready(READY_WITHIN_S)
        except ChildFailed as failed:
            self._end(f"no live view: {failed.error or failed}")
        except BaseException:
            self.close()
            raise

    def text(self, line: str) -> None:
        """Show a line of text, now."""
        self.writer.text(time.monotonic_ns(), line)

    def poll(self) -> None:
        """Write what waits for room, and take the process' news."""
        if self._over:
            return
        self.writer.pump()
        for event in self._process.events():
            if event["event"] == "stalled":
                self._tell("live view: the viewer takes nothing; what does not fit is dropped")
            elif event["event"] == "failed":
                self._end(f"the live view is over: {event['error']}")
            elif event["event"] == "ended":
                self._end(f"the live view is over: its process ended ({self._process.status})")

    def wait(self) -> None:
        """Wait until there is room for what waits, where the view keeps all."""
        self.poll()
        if not self._over and not self.writer.flush(LOGGED_WITHIN_S, lambda: self._process.alive):
            self.poll()
            self._end("the live view is over: its process takes nothing")

    def _end(self, why: str) -> None:
        if not self._over:
            self._over = True
            self.writer.give_up()
            self._tell(why)

    def close(self) -> None:
        """Have everything logged, and end the process. Tells what was dropped. Idempotent."""
        if self.fd < 0:
            return
        self.wait()
        if dropped := {name: count for name, count in self.writer.dropped().items() if count}:
            counts = ", ".join(f"{count} of {name}" for name, count in dropped.items())
            self._tell(f"live view: dropped because {self._target} was slow: {counts}")
        self._process.close(LOGGED_WITHIN_S)
        if self._process.returncode and not self._over:
            self._tell(f"the live view is incomplete: its process ended ({self._process.status})")
        self.writer.close()
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
