"""Limits commands to those that a robot can follow and from which it can always stop.

Most joints are commanded by position, once per control period h. From one command to the next such
a joint moves by h·v, and v may change by no more than u = a·h, where a is the acceleration limit.
Every command that ``MotionLimiter`` returns has these properties for each joint, for any request
(computed in float64; the command is rounded to float32 inside the position limits):

* |v| <= velocity limit, |Δv| <= u.
* The position is inside its limits, *and the joint can still stop inside them*: braking at u from
  now on ends before the limit.
* A request within the limits passes unchanged, bit for bit.
* Any other request is approached as fast as the limits allow and reached without overshoot.

A joint that is commanded by velocity keeps |v| <= velocity limit, v within its position limits
(which bound the number that is sent) and |Δv| <= u. Braking brings v to zero, which is its rest:
repeating its last velocity would keep it moving.

The arithmetic is in ``robots.braking_kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robots.base import ActionKind, ActionSpec
from robots.braking_kernels import ROUNDING, brake, limit
from robots.errors import UnsafeCommand
from robots.joint_limits import JointLimits


@dataclass(frozen=True, slots=True)
class ClampStatistics:
    """What the limits changed since the last ``reset``.

    Attributes:
        commands: Commands returned by ``limit``.
        clamped_ticks: Those that differ from the request in any joint.
        position, velocity, acceleration: How often each limit changed each joint's command.
            Position: a request outside the limits, or too fast towards a limit to stop there. One
            command may count for several limits.
    """

    commands: int
    clamped_ticks: int
    position: tuple[int, ...]
    velocity: tuple[int, ...]
    acceleration: tuple[int, ...]


class MotionLimiter:
    """Limits commands; the module's docstring lists the guarantees.

    It computes from its own last two commands, never from measurements, and assumes that commands
    are one period apart: after a missed tick the true speeds are lower. ``limit`` and ``brake``
    allocate nothing that outlives the call.

    Args:
        limits: Of the robot's A actuators.
        period_s: Time between two commands, seconds.
        actions: What each of the A numbers means; empty: all are positions.

    Attributes:
        by_velocity: (A,) bool, which of them are velocities.

    Raises:
        ValueError: ``period_s`` is not positive, there are not A actions, a kind cannot be limited
            (delta, effort), or the limits of a velocity exclude zero.
    """

    def __init__(
        self, limits: JointLimits, period_s: float, actions: Sequence[ActionSpec] = ()
    ) -> None:
        if not (period_s > 0 and math.isfinite(period_s)):
            raise ValueError(f"period_s: got {period_s}, expected a positive number of seconds")
        self.limits = limits
        self.period_s = period_s
        self._names = [spec.name for spec in actions]
        self.by_velocity = _by_velocity(limits, actions)
        lower, upper, fastest = limits.position_lower, limits.position_upper, limits.velocity
        lower = np.where(self.by_velocity, np.maximum(lower, -fastest), lower)
        upper = np.where(self.by_velocity, np.minimum(upper, fastest), upper)
        fastest = np.where(self.by_velocity, np.maximum(-lower, upper), fastest)
        # Columns of the bounds: lower, upper, velocity, u; of the state: command, velocity, target.
        self._bounds = np.ascontiguousarray(
            np.stack([lower, upper, fastest, limits.acceleration * period_s], axis=1)
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
        """Start from a pose and set all counts to zero.

        Args:
            position: (A,) the robot's position or its last command; for a velocity, its last
                command, which is zero for a robot at rest. A joint outside its limits never moves
                further out, and comes inside within the other limits.
            before: (A,) the command one period earlier; None for a robot at rest.

        Raises:
            ValueError: Not A numbers, or NaN or infinity.
        """
        last = self._checked("position", position)
        previous = last if before is None else self._checked("before", before)
        self._state[:, 0] = self._state[:, 2] = last
        self._state[:, 1] = np.where(self.by_velocity, last, (last - previous) / self.period_s)
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
        """The command nearest to ``target`` that has the guaranteed properties.

        Args:
            target: (A,) the requested positions or velocities.

        Returns:
            (A,) float32, valid until the next call.

        Raises:
            UnsafeCommand: ``target`` has NaN or infinity; names the joint. The state is unchanged:
                continue with ``brake``.
        """
        self._target[:] = target
        result = limit(
            self._target,
            self._bounds,
            self._inside,
            self.by_velocity,
            self.period_s,
            self._state,
            self._sent,
            self._counts,
        )
        if result < 0:
            joint = -1 - result
            name = f" ({self._names[joint]})" if self._names else ""
            raise UnsafeCommand(
                f"joint {joint}{name}: got {target[joint]} for a command, expected a finite number"
            )
        self._commands += 1
        self._clamped += result
        return self._sent

    def brake(self) -> NDArray[np.float32]:
        """The next command of the shortest stop, joint by joint; at rest, the last command again.

        Returns:
            (A,) float32, valid until the next call.
        """
        brake(self._bounds, self._inside, self.by_velocity, self.period_s, self._state, self._sent)
        return self._sent

    @property
    def command(self) -> NDArray[np.float32]:
        """(A,) float32: the last command, or the position given to ``reset``."""
        return self._sent

    @property
    def position(self) -> NDArray[np.float64]:
        """(A,) float64: the last command before rounding. A view; copy it to keep it."""
        return self._state[:, 0]

    @property
    def velocity(self) -> NDArray[np.float64]:
        """(A,) per second, between the last two commands. A view; copy it to keep it."""
        return self._state[:, 1]

    @property
    def at_rest(self) -> bool:
        """Whether the last two commands had the same positions, and all velocities are zero."""
        return not self._state[:, 1].any()

    @property
    def clamped_ticks(self) -> int:
        """``statistics().clamped_ticks``, cheap enough to read in every period."""
        return self._clamped

    def ticks_to_rest(self) -> int:
        """Number of ``brake`` commands from the present state until one repeats its predecessor."""
        return _ticks_to_rest(np.abs(self._state[:, 1]), self._bounds[:, 3])

    def worst_ticks_to_rest(self) -> int:
        """``ticks_to_rest`` from every joint's velocity limit."""
        return _ticks_to_rest(self._bounds[:, 2], self._bounds[:, 3])

    def statistics(self) -> ClampStatistics:
        """Counts since the last ``reset``."""
        position, velocity, acceleration = (tuple(map(int, row)) for row in self._counts)
        return ClampStatistics(self._commands, self._clamped, position, velocity, acceleration)


def _by_velocity(limits: JointLimits, actions: Sequence[ActionSpec]) -> NDArray[np.bool_]:
    """(A,) bool, which actuators are commanded by velocity. Raises as ``MotionLimiter``."""
    mask = np.zeros(len(limits), np.bool_)
    if actions and len(actions) != len(limits):
        raise ValueError(f"actions: got {len(actions)}, expected {len(limits)}, one per limit")
    for index, spec in enumerate(actions):
        if spec.kind is ActionKind.VELOCITY:
            lower, upper = limits.position_lower[index], limits.position_upper[index]
            if not lower <= 0 <= upper:
                raise ValueError(
                    f"joint {index} ({spec.name}): got a velocity between {lower:g} and {upper:g} "
                    f"{spec.unit}, expected limits with zero between them: a robot at rest needs "
                    "velocity zero"
                )
            mask[index] = True
        elif not spec.kind.holds_position:
            raise ValueError(
                f"joint {index} ({spec.name}): got a command of kind {spec.kind} ({spec.unit}), "
                f"expected {ActionKind.POSITION}, {ActionKind.GRIPPER} or {ActionKind.VELOCITY}: "
                "no other kind has a known command for rest"
            )
    return mask


def _ticks_to_rest(speed: NDArray[np.float64], quantum: NDArray[np.float64]) -> int:
    with np.errstate(invalid="ignore"):  # inf / inf, no limits: one tick
        ticks = np.nan_to_num(np.ceil(speed / quantum - ROUNDING), nan=1.0, posinf=np.inf)
    return int(np.maximum(ticks, speed > 0.0).max(initial=0.0))


def _round_up(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The smallest float32 that is not below; plain rounding may be below."""
    rounded = values.astype(np.float32)
    below = rounded.astype(np.float64) < values
    return np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
