"""Commands a robot can follow and can always stop from.

A joint is driven by positions, one per control period h. From one command to the next it moves by
h·v, and v may change by no more than u = a·h. Guaranteed for every command that ``MotionLimiter``
lets out, joint by joint, whatever is asked for (float64; what is sent is that, rounded to float32
inside the position limits):

* |v| <= velocity limit, |Δv| <= u.
* The position is inside its limits, *and the joint can still stop inside them*: braking at u from
  now on ends before the limit.
* A request that keeps to the limits passes unchanged, bit for bit.
* One that does not is followed as fast as the limits allow and met without overshoot.

How: ``robots.braking``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robots.braking import ROUNDING, brake, limit
from robots.errors import UnsafeCommand
from robots.limits import Limits


@dataclass(frozen=True, slots=True)
class ClampStatistics:
    """What the limits changed since the last ``reset``.

    Attributes:
        commands: Commands let out by ``limit``.
        clamped_ticks: Those that were not what was asked for, in any joint.
        position, velocity, acceleration: How often each joint met each limit. Position: asked for
            outside, or faster towards a limit than can be stopped. One command may meet several.
    """

    commands: int
    clamped_ticks: int
    position: tuple[int, ...]
    velocity: tuple[int, ...]
    acceleration: tuple[int, ...]


class MotionLimiter:
    """Clamps position commands; see the module for what is guaranteed.

    It goes by the last two commands that it let out, never by measurements, and takes commands to
    be one period apart: after a missed tick the true speeds are lower. ``limit`` and ``brake``
    allocate nothing that outlives the call.

    Args:
        limits: Of the robot's A actuators.
        period_s: Between two commands, seconds.

    Raises:
        ValueError: ``period_s`` is not positive.
    """

    def __init__(self, limits: Limits, period_s: float) -> None:
        if not (period_s > 0 and math.isfinite(period_s)):
            raise ValueError(f"period_s: got {period_s}, expected a positive number of seconds")
        self.limits = limits
        self.period_s = period_s
        lower, upper = limits.position_lower, limits.position_upper
        # Columns: lower, upper, velocity, u; and position, velocity, the position aimed at.
        self._bounds = np.ascontiguousarray(
            np.stack([lower, upper, limits.velocity, limits.acceleration * period_s], axis=1)
        )
        self._state = np.zeros((len(lower), 3))
        self._inside = np.ascontiguousarray(
            np.stack([_round_up(lower), -_round_up(-upper)], axis=1), np.float32
        )
        self._target = np.zeros(len(lower))
        self._sent = np.zeros(len(lower), np.float32)
        self._counts = np.zeros((3, len(lower)), np.int64)
        self._commands = self._clamped = 0
        self.reset(np.clip(np.zeros(len(lower)), lower, upper))

    def reset(self, position: ArrayLike, before: ArrayLike | None = None) -> None:
        """Start from a pose, with all counts at zero.

        Args:
            position: (A,) where the robot is, or the last command it was given. A joint outside
                its limits never moves further out and comes inside within the other limits.
            before: (A,) the command before that, one period earlier; None for a robot at rest.

        Raises:
            ValueError: Another length than A, or NaN or infinity.
        """
        last = self._checked("position", position)
        earlier = last if before is None else self._checked("before", before)
        self._state[:, 0] = self._state[:, 2] = last
        self._state[:, 1] = (last - earlier) / self.period_s
        self._sent[:] = last
        self._counts.fill(0)
        self._commands = self._clamped = 0

    def _checked(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        array = np.asarray(values, np.float64)
        if array.shape != self._target.shape or not np.isfinite(array).all():
            raise ValueError(
                f"{name}: got {array}, expected {self._target.size} finite numbers, one per joint"
            )
        return array

    def limit(self, target: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float32]:
        """The command nearest to ``target`` that keeps the guarantees.

        Args:
            target: (A,) positions asked for.

        Returns:
            (A,) float32, valid until the next call.

        Raises:
            UnsafeCommand: NaN or infinity was asked for; names the joint. Nothing has changed: go
                on with ``brake``.
        """
        self._target[:] = target
        result = limit(
            self._target,
            self._bounds,
            self._inside,
            self.period_s,
            self._state,
            self._sent,
            self._counts,
        )
        if result < 0:
            joint = -1 - result
            raise UnsafeCommand(
                f"joint {joint}: got {target[joint]} for a command, expected a finite number"
            )
        self._commands += 1
        self._clamped += result
        return self._sent

    def brake(self) -> NDArray[np.float32]:
        """The next command of the shortest stop, each joint on its own; at rest, the same again.

        Returns:
            (A,) float32, valid until the next call.
        """
        brake(self._bounds, self._inside, self.period_s, self._state, self._sent)
        return self._sent

    @property
    def command(self) -> NDArray[np.float32]:
        """(A,) float32: the last command, or where ``reset`` said the robot is."""
        return self._sent

    @property
    def position(self) -> NDArray[np.float64]:
        """(A,) the last command before it was rounded; a view, not to be kept."""
        return self._state[:, 0]

    @property
    def velocity(self) -> NDArray[np.float64]:
        """(A,) per second, of the last command against the one before; a view, not to be kept."""
        return self._state[:, 1]

    @property
    def at_rest(self) -> bool:
        """Whether the last two commands were the same."""
        return not self._state[:, 1].any()

    def ticks_to_rest(self) -> int:
        """How many more ``brake`` commands until one repeats its predecessor."""
        return _ticks_to_rest(np.abs(self._state[:, 1]), self._bounds[:, 3])

    def worst_ticks_to_rest(self) -> int:
        """The same from every joint's highest speed."""
        return _ticks_to_rest(self._bounds[:, 2], self._bounds[:, 3])

    def statistics(self) -> ClampStatistics:
        position, velocity, acceleration = (tuple(map(int, row)) for row in self._counts)
        return ClampStatistics(self._commands, self._clamped, position, velocity, acceleration)


class StopPlanner:
    """Brings a robot to rest from its last two commands, whoever gave them, then holds.

    For who takes over from a dead control process. Inside the velocity, acceleration and position
    limits if the two commands came from a ``MotionLimiter``; from any other state the position
    limits hold and the deceleration is what they demand.

    Args:
        limits: Of the robot's A actuators.
        period_s: Between two commands, seconds.
        last, before: (A,) the newest command and the one a period earlier.

    Raises:
        ValueError: Another length than A, NaN or infinity, or ``period_s`` is not positive.
    """

    def __init__(self, limits: Limits, period_s: float, last: ArrayLike, before: ArrayLike) -> None:
        self._limiter = MotionLimiter(limits, period_s)
        self._limiter.reset(last, before)

    def step(self) -> NDArray[np.float32]:
        """The next command, (A,) float32, valid until the next call; at rest, the same again."""
        return self._limiter.brake()

    @property
    def at_rest(self) -> bool:
        return self._limiter.at_rest

    @property
    def velocity(self) -> NDArray[np.float64]:
        """(A,) per second, of the last command against the one before; a view, not to be kept."""
        return self._limiter.velocity

    @property
    def ticks_to_rest(self) -> int:
        """Commands until one repeats its predecessor."""
        return self._limiter.ticks_to_rest()


def _ticks_to_rest(speed: NDArray[np.float64], quantum: NDArray[np.float64]) -> int:
    with np.errstate(invalid="ignore"):  # any speed over any acceleration: at once
        ticks = np.nan_to_num(np.ceil(speed / quantum - ROUNDING), nan=1.0, posinf=np.inf)
    return int(np.maximum(ticks, speed > 0.0).max(initial=0.0))


def _round_up(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The least float32 that is not below, where plain rounding may be."""
    rounded = values.astype(np.float32)
    below = rounded.astype(np.float64) < values
    return np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
