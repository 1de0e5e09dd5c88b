"""The sending end of a live view, in the process that has something to show."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.types import STAGES
from runtime.live_view.layout import (
    CHUNKS,
    STATES,
    TEXT_BYTES,
    TEXTS,
    TICKS,
    LiveViewLayout,
    LiveViewSegment,
    camera_queue,
)
from transport.shm.text_field import put_text

MOST_PICTURES = 64
"""Pictures of one camera that wait beside a full queue; ticks, states and texts are not limited."""
PUMP_S = 0.002
Values = Mapping[str, Any]


class LiveViewWriter:
    """Writes messages without ever waiting, unless ``flush`` is called.

    Where a queue is full, its message is dropped and counted; or, if the layout ``keeps_all``, kept
    here until there is room.

    Args:
        fd: The segment's descriptor. The caller closes it.
        layout: As it was created with.
    """

    def __init__(self, fd: int, layout: LiveViewLayout) -> None:
        self._layout = layout
        self._segment = LiveViewSegment(fd, layout)
        self._queues = self._segment.writers()
        self._waiting: dict[str, deque[Values]] = {name: deque() for name in self._queues}
        self._pictures = {camera_queue(name) for name in layout.cameras}
        self._number = 0
        self._open = True

    def tick(
        self,
        time_ns: int,
        command: NDArray[np.float32],
        *,
        attempt: int,
        source: int,
        lateness_s: float = np.nan,
        age_s: float = np.nan,
    ) -> None:
        """Show a command.

        Args:
            time_ns: When it was given.
            command: (A,).
            attempt: Number of the episode; a seam is between two commands of one attempt.
            source: Tick of the observation that it is based on.
            lateness_s, age_s: After its deadline, and of that observation; NaN: not known.
        """
        self._put(
            TICKS,
            {
                "time_ns": time_ns,
                "number": self._number,
                "attempt": attempt,
                "source": source,
                "lateness_s": lateness_s,
                "age_s": age_s,
                "command": command,
            },
        )
        self._number += 1

    def state(self, time_ns: int, state: NDArray[np.float32]) -> None:
        """Show the measured joints, (S,)."""
        self._put(STATES, {"time_ns": time_ns, "state": state})

    def chunk(
        self,
        time_ns: int,
        first_ns: int,
        actions: NDArray[np.float32],
        stages_ns: Sequence[int] | NDArray[np.int64],
    ) -> None:
        """Show a chunk.

        Args:
            time_ns: When it arrived.
            first_ns: When its first action is due.
            actions: (n, A), n at most the layout's ``chunk_size``.
            stages_ns: (8,), the duration of each of ``STAGES``; 0 where it has none.
        """
        padded = np.zeros((self._layout.chunk_size, len(self._layout.action_names)), np.float32)
        padded[: len(actions)] = actions
        self._put(
            CHUNKS,
            {
                "time_ns": time_ns,
                "first_ns": first_ns,
                "count": len(actions),
                "stages_ns": np.asarray(stages_ns, np.int64),
                "actions": padded,
            },
        )

    def text(self, time_ns: int, text: str) -> None:
        """Show a line of text, cut to ``TEXT_BYTES``."""
        data = np.empty(TEXT_BYTES, np.uint8)
        put_text(data, text)
        self._put(TEXTS, {"time_ns": time_ns, "text": data})

    def picture(self, camera: str, time_ns: int, picture: NDArray[np.uint8]) -> None:
        """Show a picture, (height, width, 3) uint8 RGB, not larger than the layout's.

        Raises:
            ValueError: It is larger.
        """
        height, width = picture.shape[:2]
        room = self._layout.cameras[camera]
        if height * width > room[0] * room[1]:
            raise ValueError(
                f"picture of {camera!r}: got {height} x {width}, expected at most {room}"
            )
        self._put(
            camera_queue(camera),
            {"time_ns": time_ns, "height": height, "width": width, "pixels": picture},
        )

    def _put(self, name: str, values: Values) -> None:
        if not self._open:
            return
        self._pump(name)
        waiting = self._waiting[name]
        if not waiting and self._publish(name, values):
            return
        if self._layout.keeps_all and (name not in self._pictures or len(waiting) < MOST_PICTURES):
            waiting.append({key: np.array(value) for key, value in values.items()})
        else:
            dropped = self._segment.dropped[name]
            dropped.store(dropped.load() + 1)

    def _publish(self, name: str, values: Values) -> bool:
        views = self._queues[name].claim()
        if views is None:
            return False
        for key, value in values.items():
            if key == "pixels":
                views[key][: value.size] = value.reshape(-1)
            else:
                views[key][...] = value
        self._queues[name].publish()
        return True

    def _pump(self, name: str) -> None:
        waiting = self._waiting[name]
        while waiting and self._publish(name, waiting[0]):
            waiting.popleft()

    def pump(self) -> bool:
        """Move what waits into its queue where there is room; whether nothing waits any more."""
        for name in self._queues:
            self._pump(name)
        return not any(self._waiting.values())

    def flush(self, timeout_s: float, alive: Callable[[], bool]) -> bool:
        """Wait until nothing waits for a full queue; False after ``timeout_s``, or if not alive."""
        deadline_s = time.monotonic() + timeout_s
        while not self.pump():
            if time.monotonic() > deadline_s or not alive():
                return False
            time.sleep(PUMP_S)
        return True

    def dropped(self) -> dict[str, int]:
        """Return the messages that were dropped so far, in all processes, by queue."""
        return {name: count.load() for name, count in self._segment.dropped.items()}

    def give_up(self) -> None:
        """Ignore every message from now on: nobody reads them."""
        self._open = False
        for waiting in self._waiting.values():
            waiting.clear()

    def close(self) -> None:
        """Unmap the segment. Idempotent."""
        self.give_up()
        self._queues.clear()
        self._segment.close()


def stages_of(stages_ns: Mapping[str, int]) -> list[int]:
    """Return the durations of ``STAGES`` in their order; 0 where there is none."""
    return [stages_ns.get(stage, 0) for stage in STAGES]
