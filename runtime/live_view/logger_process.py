"""The process that logs a live view: it reads messages from shared memory and logs them with Rerun.

The evaluation starts it as ``python -m runtime.live_view.logger_process``. When its standard input
ends, it logs what is left in the queues. While a viewer takes nothing it reads nothing, so the
queues fill and their writers drop.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.live_view.errors import LiveViewError
from runtime.live_view.layout import (
    CHUNKS,
    PICTURES,
    STATES,
    TEXTS,
    TICKS,
    LiveViewLayout,
    LiveViewSegment,
    camera_queue,
)
from runtime.live_view.rerun_log import RerunLog
from transport.child_process import write_event
from transport.shm.spsc_queue import QueueReader
from transport.shm.text_field import get_text

NICENESS = 10
"""Logging waits for a control loop or a policy on the same cores."""
PERIOD_S = 0.1
"""From one batch to the next; a batch costs about as much as one message."""
FLUSH_S, LAST_FLUSH_S = 1.0, 10.0
MOST_ROWS = 512
"""Rows of a batch."""


class Logger:
    """Moves messages from the queues into a log.

    Args:
        layout: The evaluation's.
        segment: The shared memory.
        log: Where they go.
    """

    def __init__(self, layout: LiveViewLayout, segment: LiveViewSegment, log: RerunLog) -> None:
        self._cameras = tuple(layout.cameras)
        self._queues = segment.readers()
        self._log = log

    def log_batch(self) -> int:
        """Log what is there, up to a limit; return the largest number of messages in a queue."""
        log, most = self._log, 0
        for name, log_rows in ((TICKS, log.ticks), (STATES, log.states)):
            if rows := _take(self._queues[name], MOST_ROWS):
                log_rows({key: np.stack([row[key] for row in rows]) for key in rows[0]})
                most = max(most, len(rows))
        for chunk in _take(self._queues[CHUNKS], MOST_ROWS):
            log.chunk(chunk)
            most = max(most, 1)
        for text in _take(self._queues[TEXTS], MOST_ROWS):
            log.text(int(text["time_ns"]), get_text(text["text"]))
            most = max(most, 1)
        for camera in self._cameras:
            most = max(most, self._log_pictures(camera))
        return most

    def _log_pictures(self, camera: str) -> int:
        queue, count = self._queues[camera_queue(camera)], 0
        while count < PICTURES and (views := queue.peek()) is not None:
            height, width = int(views["height"]), int(views["width"])
            pixels = views["pixels"][: height * width * 3].reshape(height, width, 3)
            self._log.picture(camera, int(views["time_ns"]), pixels)
            queue.release()
            count += 1
        return count


def _take(queue: QueueReader, most: int) -> list[dict[str, NDArray[Any]]]:
    rows: list[dict[str, NDArray[Any]]] = []
    while len(rows) < most and (views := queue.peek()) is not None:
        rows.append({name: value.copy() for name, value in views.items()})
        queue.release()
    return rows


def _run(logger: Logger, log: RerunLog, events_fd: int) -> None:
    """Log until standard input ends and the queues are empty. Raises ``LiveViewError``."""
    ended = stalled = False
    wait_s = 0.0
    while True:
        if not ended and select.select([0], [], [], wait_s)[0]:
            ended = not os.read(0, 4096)
        count = logger.log_batch()
        if ended and not count:
            break
        while not log.flush(FLUSH_S):
            if not stalled:
                stalled = True
                write_event(events_fd, "stalled")
            if ended or select.select([0], [], [], 0)[0]:
                return  # a viewer that takes nothing is not waited for
        # A camera's queue is the shortest.
        wait_s = 0.0 if count >= PICTURES // 2 else PERIOD_S
    log.flush(LAST_FLUSH_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the logging process. Returns the exit status."""
    cli = argparse.ArgumentParser(description="Started by the evaluations")
    cli.add_argument("--target", required=True)
    cli.add_argument("--layout", required=True, help="JSON")
    cli.add_argument("--segment", type=int, required=True, help="inherited descriptor")
    cli.add_argument("--events", type=int, required=True, help="inherited descriptor")
    args = cli.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    layout = LiveViewLayout.from_json(args.layout)
    try:
        log = RerunLog(args.target, layout)
        segment = LiveViewSegment(args.segment, layout)
        write_event(args.events, "ready")
        _run(Logger(layout, segment, log), log, args.events)
        log.close()
    except (LiveViewError, ImportError, OSError, RuntimeError, ValueError) as error:
        write_event(args.events, "failed", error=str(error))
        os._exit(1)
    os._exit(0)  # Rerun's own end may wait for a viewer for ever; all is flushed


if __name__ == "__main__":
    raise SystemExit(main())
