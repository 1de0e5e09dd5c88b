"""Limits the step to a command after the process that forwards commands has missed some.

The sender keeps the limits from one command to the next. If the process between the sender and the
device is delayed, it misses commands, and the newest one is further away than one step may go.
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

MAX_DELAY_S = 0.25
"""After a longer delay, missed commands are not caught up with: their motion is over."""
UNCOMMANDED_S = 0.25
"""Without a command for so long, an owner process brings all velocities to zero."""
LONGEST_STEP_S = 0.05
"""One step is at most what the limits allow in this time, or in one period of the commands."""
GAPS = 15
"""Number of gaps between commands whose median is taken for the commands' period."""
TOLERANCE = 1.1
"""Factor on times, for jitter."""


class CommandDelivery:
    """Follows commands in short steps within the velocity limits.

    A command one period after the previous one passes unchanged. After missed commands the newest
    is approached step by step: positions keep their velocity limit, velocities their acceleration
    limit. The acceleration limit of positions is not kept while catching up; the sender keeps it
    otherwise.

    Args:
        limits, actions: Of the robot.
        position: (A,) the robot's position, at rest.
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

    @property
    def period_s(self) -> float:
        """The median time between commands, seconds; 0 before the second one."""
        return statistics.median(self._gaps) if self._gaps else 0.0

    def reset(self, command: ArrayLike, now_ns: int) -> None:
        """Record that ``command``, (A,), was sent to the device without ``follow``."""
        self._last = np.array(command, np.float64)
        self._delivered_ns = now_ns

    def record_arrival(self, sent_ns: int) -> None:
        """Record that a command arrived, followed or not, which was sent at ``sent_ns``."""
        gap_s = (sent_ns - self._sent_ns) / 1e9
        self._sent_ns = sent_ns
        if 0 < gap_s < 1:
            self._gaps.append(gap_s)

    def follow(self, wanted: NDArray[np.float32], now_ns: int) -> NDArray[np.float32]:
        """The command to send now on the way to ``wanted``. To be repeated until it is ``wanted``.

        Args:
            wanted: (A,) float32, the newest command.
            now_ns: This host's monotonic clock.

        Returns:
            (A,) float32.

        Raises:
            RobotLost: No command was forwarded for ``MAX_DELAY_S`` while the robot was to move.
                Commands stay refused until one is near the last command that was sent.
        """
        longest_s = max(LONGEST_STEP_S, TOLERANCE * self.period_s)
        since_s = (now_ns - self._delivered_ns) / 1e9 if self._delivered_ns else longest_s
        near = bool((np.abs(wanted - self._last) <= self._fastest * longest_s).all())
        if near:
            self._refused = ""
        elif since_s > MAX_DELAY_S and not self._refused:
            self._refused = (
                f"commands were delayed for {since_s:.2f} s while the robot was to move, expected "
                f"less than {MAX_DELAY_S:g} s: is the bus slow, or the machine overloaded?"
            )
        if self._refused:
            raise RobotLost(self._refused)
        step = self._fastest * min(TOLERANCE * since_s, longest_s)
        action: NDArray[np.float32] = np.clip(
            wanted.astype(np.float64), self._last - step, self._last + step
        ).astype(np.float32)
        self.reset(action, now_ns)
        return action
