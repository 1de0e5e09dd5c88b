"""What may reach a device of the commands for it, when the process that passes them on is held up.

Whoever commands keeps the limits from one command to the next. A process between it and the device
that is held up misses some, and the newest is then further away than one command may go.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robots.base import ActionKind, ActionSpec
from robots.errors import RobotLost
from robots.joint_limits import JointLimits

HELD_UP_S = 0.25
"""Commands missed for longer are not caught up with: the motion that they were of is over."""
LONGEST_STEP_S = 0.05
"""One step is at most what the limits allow in this time, or in one period of the commands."""
GAPS = 15
"""Between commands, whose median is their period."""
TOLERANCE = 1.1
"""Of times, for jitter."""


class CommandDelivery:
    """Follows commands at no more than the velocity limits, in short steps.

    A command that is one period after the one before passes unchanged. After missed ones the newest
    is followed step by step: positions keep their velocity limit, velocities their acceleration
    limit. The acceleration of positions is the sender's to keep, and is not kept here while
    catching up.

    Args:
        limits, actions: Of the robot.
        position: (A,) where it is, at rest.
    """

    def __init__(
        self, limits: JointLimits, actions: Sequence[ActionSpec], position: ArrayLike
    ) -> None:
        by_velocity = np.array([spec.kind is ActionKind.VELOCITY for spec in actions])
        self._fastest = np.where(by_velocity, limits.acceleration, limits.velocity)
        self._last = np.array(position, np.float64)
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._sent_ns = self._delivered_ns = 0
        self._refused = ""

    @property
    def refused(self) -> str:
        """Why commands are not followed; empty while they are."""
        return self._refused

    def reset(self, command: ArrayLike, now_ns: int) -> None:
        """Note that ``command``, (A,), was sent to the device without ``follow``."""
        self._last = np.array(command, np.float64)
        self._delivered_ns = now_ns

    def note(self, sent_ns: int) -> None:
        """Note that a command came, followed or not, which was sent at ``sent_ns``."""
        gap_s = (sent_ns - self._sent_ns) / 1e9
        self._sent_ns = sent_ns
        if 0 < gap_s < 1:
            self._gaps.append(gap_s)

    def follow(self, wanted: NDArray[np.float32], now_ns: int) -> NDArray[np.float32]:
        """What to send for ``wanted``, both (A,) float32; to be asked again until it is that.

        Args:
            now_ns: Our monotonic clock.

        Raises:
            RobotLost: Nothing was passed on for ``HELD_UP_S`` while the robot was to move. Until a
                command is near to where it was left, none is followed.
        """
        period_s = TOLERANCE * statistics.median(self._gaps) if self._gaps else 0.0
        longest_s = max(LONGEST_STEP_S, period_s)
        since_s = (now_ns - self._delivered_ns) / 1e9 if self._delivered_ns else longest_s
        near = bool((np.abs(wanted - self._last) <= self._fastest * longest_s).all())
        if near:
            self._refused = ""
        elif since_s > HELD_UP_S and not self._refused:
            self._refused = (
                f"commands were held up for {since_s:.2f} s while it was to move, expected less "
                f"than {HELD_UP_S:g} s"
            )
        if self._refused:
            raise RobotLost(self._refused)
        step = self._fastest * min(TOLERANCE * since_s, longest_s)
        action: NDArray[np.float32] = np.clip(
            wanted.astype(np.float64), self._last - step, self._last + step
        ).astype(np.float32)
        self.reset(action, now_ns)
        return action
