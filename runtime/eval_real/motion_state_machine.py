"""The robot's command in each control period: hold, move to the start, play the policy, stop.

A ``MotionStateMachine`` is a function of its inputs: it reads no clock, no sensor and no file. The
same chunks and calls in the same periods give the same commands, bit for bit; ``replay`` relies on
this.

A *tick* is a control period in which the policy plays, counted from the start of a rollout. Periods
in which the robot holds, approaches or waits are not ticks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policies.types import ActionChunk
from robots.base import ActionSpec
from runtime.control.command_stream import CommandStream, Motion
from runtime.eval_real.control_enums import Phase

MAX_APPROACHES = 3
"""Moves to the start of the policy's motion before a rollout fails, because it begins elsewhere."""


class MotionStateMachine:
    """The motion of one robot: a phase, and one command per control period.

    Args:
        stream: Makes commands within the robot's limits from chunks.
        max_ticks: Control ticks per rollout; then the robot stops.
        start_pose: (A,) where a rollout begins; None for the robot's current pose.
        start_velocity: (A,) per second, the maximum during an approach.
        near: (A,) the largest distance of the policy's first action from the last command, in each
            joint's unit; from further away the robot approaches it first. Velocities are not
            compared: a robot at rest reaches any of them within its limits.
        actions: The kind of each of the A numbers; empty: positions.

    Attributes:
        stream: As given.
        phase: What the robot does now.
        tick: The next control tick of the rollout.
    """

    def __init__(
        self,
        stream: CommandStream,
        *,
        max_ticks: int,
        start_pose: NDArray[np.float32] | None,
        start_velocity: NDArray[np.float64],
        near: NDArray[np.float64],
        actions: Sequence[ActionSpec] = (),
    ) -> None:
        self.stream = stream
        self._actions = actions
        self._by_velocity = stream.limiter.by_velocity
        self._max_ticks = max_ticks
        self._start_pose, self._near = start_pose, near
        self._start_velocity = np.minimum(start_velocity, stream.limiter.limits.velocity)
        self._from = np.zeros(len(near))
        self._to = np.zeros(len(near))
        self._target = np.zeros(len(near))
        self._span = 0
        self._step = 0
        self._approaches = 0
        self._fault = ""
        self.phase = Phase.HOLD
        self.tick = 0

    # Changes of phase

    def reset(self, pose: ArrayLike) -> None:
        """Hold ``pose`` (A,), at which the robot rests, until ``start``."""
        self.stream.reset(pose)
        self._fault = ""
        self.tick = 0
        self.phase = Phase.HOLD

    def start(self) -> None:
        """Begin a rollout: move to the start pose, if there is one, and wait for a chunk.

        Raises:
            ValueError: The phase is not ``HOLD``.
        """
        if self.phase is not Phase.HOLD:
            raise ValueError(f"start: got phase {self.phase.name}, expected HOLD")
        self.stream.reset(self.stream.last_command)
        self.tick = self._approaches = 0
        self.phase = Phase.WAIT
        if self._start_pose is not None:
            self._approach(self._start_pose)

    def stop(self) -> None:
        """Come to rest and hold."""
        if self.phase not in (Phase.HOLD, Phase.FAULT):
            self.phase = Phase.STOP

    def fail(self, reason: str) -> None:
        """Come to rest and latch a fault until ``resume`` or ``reset``. The first reason counts."""
        if self.phase is Phase.FAULT or self._fault:
            return
        self._fault = reason
        self.stream.fail(reason)
        self.phase = Phase.STOP

    def resume(self) -> None:
        """Wait at the current pose for a chunk from a new observation, then play it.

        After a fault the rollout's ticks continue. Otherwise (a predecessor died) they restart.

        Raises:
            ValueError: The phase is neither ``HOLD`` nor ``FAULT``.
        """
        if self.phase not in (Phase.HOLD, Phase.FAULT):
            raise ValueError(f"resume: got phase {self.phase.name}, expected HOLD or FAULT")
        if self.phase is Phase.HOLD or not self.stream.resume():
            self.stream.reset(self.stream.last_command)
            self.tick = 0
        # An observation belongs to a whole policy tick, so the rest of a started one is skipped.
        self.tick = -(-self.tick // self.stream.ratio) * self.stream.ratio
        self._fault = ""
        self._approaches = 0
        self.phase = Phase.WAIT

    @property
    def fault(self) -> str:
        """Why it stopped; empty without a fault."""
        return self._fault

    @property
    def finished(self) -> bool:
        """Whether all ticks of the rollout were played."""
        return self.tick >= self._max_ticks

    # Chunks

    def wants_chunk(self, latency_ticks: int) -> bool:
        """Whether to request a chunk now; in ``WAIT`` for ``tick``, with the arm at rest.

        Args:
            latency_ticks: Policy ticks that an answer is expected to take.
        """
        if self.phase is Phase.WAIT:
            return True
        return self.phase is Phase.RUN and self.stream.wants_chunk(self.tick, latency_ticks)

    def requested(self, timestep: int) -> None:
        """Note that the observation of policy tick ``timestep`` was sent."""
        self.stream.executor.requested(timestep)

    def accept(self, chunk: ActionChunk) -> bool:
        """Take a chunk; False if it was dropped, or if the robot must approach its start first."""
        if self.phase not in (Phase.WAIT, Phase.RUN):
            return False
        if self.phase is Phase.WAIT and not self._begins_near(chunk):
            return False
        accepted = self.stream.accept(chunk)
        self._check_stream()
        if accepted and self.phase is Phase.WAIT and self.stream.motion is Motion.RUNNING:
            self.phase = Phase.RUN
        return accepted

    def _begins_near(self, chunk: ActionChunk) -> bool:
        """Whether the arm is near the chunk's first action; otherwise start an approach to it."""
        index = self.tick // self.stream.ratio - chunk.obs_timestep - chunk.first_action_offset
        if not np.isfinite(chunk.actions).all():
            return True  # the stream refuses it, with a message
        limits = self.stream.limiter.limits
        first = np.clip(
            chunk.actions[min(max(index, 0), len(chunk) - 1)].astype(np.float64),
            limits.position_lower,
            limits.position_upper,
        )
        far = np.where(self._by_velocity, 0.0, np.abs(first - self.stream.last_command))
        if (far <= self._near).all():
            return True
        if self._approaches >= MAX_APPROACHES:
            joint = int(np.argmax(far / self._near))
            spec = self._actions[joint] if self._actions else ActionSpec("")
            self.fail(
                f"joint {joint} ({spec.name}): the policy begins {far[joint]:.3f} {spec.unit} away "
                f"(--near: {self._near[joint]:g}), after {MAX_APPROACHES} moves to where its "
                "chunks began"
            )
            return False
        self._approaches += 1
        self._approach(first)
        return False

    # Commands

    def command(self, advance: int = 1) -> NDArray[np.float32]:
        """The command of this period, (A,) float32, valid until the next call.

        Args:
            advance: Periods since the last call; more than one where some were missed.
        """
        if self.phase is Phase.RUN:
            return self._play(advance)
        if self.phase is Phase.APPROACH:
            return self._move(advance)
        if self.phase is Phase.STOP:
            command = self.stream.hold()
            if self.stream.at_rest:
                self.phase = Phase.FAULT if self._fault else Phase.HOLD
            return command
        return self.stream.hold()

    def _play(self, advance: int) -> NDArray[np.float32]:
        # The missed periods count as ticks.
        self.tick += advance - 1
        command = self.stream.command(self.tick)
        self.tick += 1
        self._check_stream()
        if self.phase is Phase.RUN and self.finished:
            self.phase = Phase.STOP
        return command

    def _check_stream(self) -> None:
        """Take over a fault that the stream latched: starved for too long, or a chunk with NaN."""
        if self.stream.fault is not None and not self._fault:
            self._fault = self.stream.fault
            self.phase = Phase.STOP

    def _approach(self, pose: ArrayLike) -> None:
        """Start a slow move to ``pose``: q(u) = q0 + (q1 − q0)·(3u² − 2u³), at rest at both ends.

        Its peak speed is 1.5·Δ/T and its peak acceleration 6·Δ/T²; T is the shortest time in which
        both stay within their limits.
        """
        self._from[:] = self.stream.last_command
        self._to[:] = pose
        self._from[self._by_velocity] = self._to[self._by_velocity] = 0.0
        distance = np.abs(self._to - self._from)
        with np.errstate(divide="ignore", invalid="ignore"):
            by_speed = 1.5 * distance / self._start_velocity
            by_acceleration = np.sqrt(6.0 * distance / self.stream.limiter.limits.acceleration)
        duration_s = np.where(distance > 0, np.maximum(by_speed, by_acceleration), 0.0)
        seconds = float(duration_s.max())
        self._span = math.ceil(seconds / self.stream.period_s)
        self._step = 0
        if self._span:
            self.phase = Phase.APPROACH

    def _move(self, advance: int) -> NDArray[np.float32]:
        # Missed periods delay the move: its path matters, not its time.
        del advance
        self._step += 1
        u = min(1.0, self._step / self._span)
        part = u * u * (3.0 - 2.0 * u)
        np.subtract(self._to, self._from, out=self._target)
        self._target *= part
        self._target += self._from
        command = self.stream.limiter.limit(self._target)
        if u == 1.0 and self.stream.at_rest:
            self.phase = Phase.WAIT
        return command
