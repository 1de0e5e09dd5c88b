"""Turns chunks into a robot's commands: control rate, limits, and a bounded stop without chunks.

Guaranteed for every command, whatever the policy, the network and the server do:

* It keeps the robot's position, velocity and acceleration limits, and the robot can stop within
  them from there (``robots.motion_limiter``).
* When no newer chunk comes, the rest of the plan is played ever more slowly, so that the robot
  comes to rest on its planned path, at the plan's end or before. Commanded velocities fall to zero
  with it. The robot stays there until a chunk comes, and continues with an offset that fades out.
  After ``fault_after_s`` without a chunk, a fault is latched.
* Only ``resume`` or ``reset`` ends a latched fault. Until then chunks are refused.
* After ``fail`` (NaN, a watchdog, an emergency key) every joint brakes as hard as its limits allow.

Rejected: repeating the last command (no bound on acceleration), braking at the plan's end (leaves
the path).
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from policies.types import ActionChunk, PolicyContract
from robots.base import ActionSpec
from robots.errors import UnsafeCommand
from robots.joint_limits import JointLimits
from robots.motion_limiter import ClampStatistics, MotionLimiter
from runtime.control.blending import Strategy
from runtime.control.chunk_executor import ChunkExecutor, ExecutorStatistics
from runtime.control.plan_sampler import PlanSampler

logger = logging.getLogger(__name__)


class Motion(enum.StrEnum):
    """What a ``CommandStream`` is doing. "Rest" below: coming to rest, then staying there."""

    WAITING = "waiting"  # holding a pose until a chunk comes
    RUNNING = "running"  # playing the plan
    STARVED = "starved"  # rest along the rest of the plan, until a chunk comes
    FAULT = "fault"  # rest, until ``resume``


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """Counts since the last ``reset``.

    Attributes:
        executor: Counts of chunks and policy ticks.
        clamps: Counts of the limits, per control tick.
        stops: How often the robot slowed down for lack of chunks.
        faults: How often a fault was latched.
        refused_chunks: Chunks that came while a fault was latched.
    """

    executor: ExecutorStatistics
    clamps: ClampStatistics
    stops: int
    faults: int
    refused_chunks: int


class CommandStream:
    """Turns chunks into one command per control tick.

    A tick allocates nothing that outlives it. Not thread-safe: one loop owns it.

    Args:
        contract: The policy's contract; A is its action_dim.
        strategy: How chunks are requested and combined.
        limits: Limits of the robot's A actuators.
        actions: The kind of each of the A numbers; empty: positions.
        ratio: Control ticks per policy tick, see ``control_ratio``.
        hold: Joints that keep their value between policy ticks; the others are interpolated.
        fault_after_s: Time without a chunk, from the first tick that slows down, to a fault.
        log: Logs faults and resumptions.

    Attributes:
        ratio: As given.
        period_s: Seconds per control tick.
        executor: Holds the plan.
        limiter: Keeps the limits.
        stop_lead_ticks: Policy ticks of the plan that the longest stop along it takes.
        rest_within_s: Maximum duration of a stop, from the first command that slows down.

    Raises:
        ValueError: The limits have another number of joints than the policy's actions, the actions
            are not absolute or of a kind that has no rest, the ratio is below 1, or a time is not
            positive.
    """

    def __init__(
        self,
        contract: PolicyContract,
        strategy: Strategy,
        limits: JointLimits,
        *,
        actions: Sequence[ActionSpec] = (),
        ratio: int = 1,
        hold: Sequence[int] = (),
        fault_after_s: float = 1.0,
        log: logging.Logger = logger,
    ) -> None:
        self._log = log
        if contract.ctrl_type != "abs":
            raise ValueError(
                f"ctrl_type: got {contract.ctrl_type!r}, expected 'abs': the limits are positions"
            )
        if len(limits) != contract.action_dim:
            raise ValueError(
                f"limits: got {len(limits)} joints, expected the policy's {contract.action_dim}"
            )
        if ratio < 1:
            raise ValueError(f"ratio: got {ratio}, expected at least 1 per policy tick")
        if not fault_after_s > 0:
            raise ValueError(f"fault_after_s: got {fault_after_s}, expected a positive number")
        self.ratio, self.period_s = ratio, contract.dt_s / ratio
        self.executor = ChunkExecutor(contract, strategy)
        self.limiter = MotionLimiter(limits, self.period_s, actions)
        self._fault_after = max(1, math.ceil(fault_after_s / self.period_s))
        self._sampler = PlanSampler(self.executor, contract.action_dim, ratio, hold)
        self._worst_ticks = self.limiter.worst_ticks_to_rest()
        self.stop_lead_ticks = max(0, math.ceil((self._worst_ticks - 1) / 2 / ratio))
        self.rest_within_s = 3 * self._worst_ticks * self.period_s
        self.reset(self.limiter.command)

    def reset(self, position: ArrayLike) -> None:
        """Start a new episode: hold ``position``, (A,), until a chunk comes.

        Raises:
            ValueError: ``position`` has another length than A, or holds NaN or infinity.
        """
        self.limiter.reset(position)
        self._motion = Motion.WAITING
        self._fault: str | None = None
        self._aligns = self._brakes = self._on_plan = False
        self._sampler.clear_offset()
        self._stops = self._faults = self._refused = self._starved_for = self._slow_ticks = 0
        self._phase = 0.0
        self._path_end = -1
        self.executor.reset()

    @property
    def motion(self) -> Motion:
        """What the stream is doing now."""
        return self._motion

    @property
    def fault(self) -> str | None:
        """Why a fault is latched, or None."""
        return self._fault

    @property
    def at_rest(self) -> bool:
        """Whether the last command holds the robot still."""
        return self.limiter.at_rest

    @property
    def last_command(self) -> NDArray[np.float32]:
        """(A,) float32: the last command, or the position given to ``reset``."""
        return self.limiter.command

    def wants_chunk(self, tick: int, latency_ticks: int = 0) -> bool:
        """Whether to observe and request a chunk now; see ``ChunkExecutor.wants_chunk``.

        The request is early enough that the answer comes before the robot begins to slow down.

        Args:
            tick: The current control tick.
            latency_ticks: Policy ticks that an answer is expected to take.
        """
        if self._motion is Motion.FAULT:
            return False
        return self.executor.wants_chunk(tick // self.ratio, latency_ticks + self.stop_lead_ticks)

    def requested(self, tick: int) -> None:
        """Note that the observation of control tick ``tick`` was sent."""
        self.executor.requested(tick // self.ratio)

    def accept(self, chunk: ActionChunk) -> bool:
        """Blend ``chunk`` into the plan; False if it was dropped or refused.

        An invalid chunk (NaN, infinity, a wrong shape) latches a fault.
        """
        if self._motion is Motion.FAULT:
            self._refused += 1
            return False
        try:
            accepted = self.executor.accept(chunk, at_once=self._aligns)
        except ValueError as error:
            self.fail(str(error))
            return False
        if accepted and self.executor.covers(self.executor.next_tick):
            self._run()
        return accepted

    def command(self, tick: int) -> NDArray[np.float32]:
        """The command for control tick ``tick``, (A,) float32, valid until the next call."""
        policy_tick, part = divmod(tick, self.ratio)
        idle = self._motion in (Motion.WAITING, Motion.STARVED)
        if idle and policy_tick > self._path_end and self.executor.covers(policy_tick):
            self._run()
        if self._motion is Motion.RUNNING:
            return self._play(policy_tick, part)
        if self._motion is Motion.WAITING or (self._motion is Motion.FAULT and self._brakes):
            self.executor.skip(policy_tick)
            return self.limiter.brake()
        return self._slow_down(policy_tick)

    def hold(self) -> NDArray[np.float32]:
        """The command, (A,) float32, of a period without a tick: brake, or stay at rest."""
        return self.limiter.brake()

    def fail(self, reason: str) -> None:
        """Latch a fault and brake as hard as the limits allow, from the next command on."""
        self._brakes = True
        self._latch(reason)

    def resume(self) -> bool:
        """End a fault and wait for a chunk from a new observation.

        False, without effect, if there is no fault or the robot still moves.
        """
        if self._motion is not Motion.FAULT or not self.limiter.at_rest:
            return False
        self.executor.flush()
        self._path_end = self.executor.next_tick - 1
        self._motion, self._fault = Motion.WAITING, None
        self._aligns, self._brakes = True, False
        self._log.info("resumed at policy tick %d", self.executor.next_tick)
        return True

    def statistics(self) -> StreamStatistics:
        """The counts since the last ``reset``."""
        return StreamStatistics(
            executor=self.executor.statistics(),
            clamps=self.limiter.statistics(),
            stops=self._stops,
            faults=self._faults,
            refused_chunks=self._refused,
        )

    def _run(self) -> None:
        if self._motion is not Motion.RUNNING:
            self._motion = Motion.RUNNING
            self._on_plan = self._brakes = False

    def _latch(self, reason: str) -> None:
        if self._motion is Motion.FAULT:
            return
        self._motion, self._fault = Motion.FAULT, reason
        self._faults += 1
        self._log.error("fault at policy tick %d: %s", self.executor.next_tick, reason)

    def _play(self, policy_tick: int, part: int) -> NDArray[np.float32]:
        left = (self.executor.covered_to(policy_tick) - policy_tick) * self.ratio - part
        # Under constant deceleration, n commands use up (n − 1)/2 periods of the plan.
        if left < (self.limiter.ticks_to_rest() - 1) / 2:
            self._starve()
            return self._slow_down(policy_tick)
        self._emit(policy_tick)
        if self._aligns:
            self._sampler.align(policy_tick, part, self.limiter.position)
            self._aligns = False
        self._phase = policy_tick + part / self.ratio
        self._on_plan = True
        self._sampler.fade()
        self._sampler.read(policy_tick, part / self.ratio)
        return self._limited()

    def _starve(self) -> None:
        """Begin a stop: the plan is played more slowly with every tick."""
        self._motion = Motion.STARVED
        self._aligns = True
        self._stops += 1
        self._starved_for = 0
        self._slow_ticks = max(1, self.limiter.ticks_to_rest())
        # Without a tick played, the robot is not on the plan and cannot stop along it.
        self._brakes = not self._on_plan
        self._path_end = int(self._phase) if self._on_plan else -1
        while self._on_plan and self.executor.covers(self._path_end + 1):
            self._path_end += 1

    def _slow_down(self, policy_tick: int) -> NDArray[np.float32]:
        self._emit(policy_tick)
        self._starved_for += 1
        if self._starved_for > self._fault_after:
            self._latch(f"no chunk for {self._starved_for * self.period_s:.2f} s")
        rate = max(0.0, 1.0 - self._starved_for / self._slow_ticks)
        if rate > 0.0 and not self._brakes:
            self._phase = min(self._phase + rate / self.ratio, float(self._path_end))
            base = int(self._phase)
            self._sampler.read(base, self._phase - base)
        # Velocities scale with the rate at which the path is played.
        self._sampler.target[self.limiter.by_velocity] *= rate
        # A path that the limits cannot follow must not delay the stop for ever: leave it and brake.
        self._brakes = self._brakes or self._starved_for > self._slow_ticks + self._worst_ticks
        return self.limiter.brake() if self._brakes else self._limited()

    def _emit(self, policy_tick: int) -> None:
        """Count the policy tick in the executor, once."""
        executor = self.executor
        if not executor.started and not executor.covers(policy_tick):
            executor.skip(policy_tick)
        elif policy_tick >= executor.next_tick:
            executor.command(policy_tick)

    def _limited(self) -> NDArray[np.float32]:
        try:
            return self.limiter.limit(self._sampler.target)
        except UnsafeCommand as error:
            self.fail(str(error))
            return self.limiter.brake()
