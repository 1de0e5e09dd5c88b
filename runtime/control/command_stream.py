"""A robot's commands from chunks: control rate, limits, and a bounded stop when chunks stay away.

Guaranteed for every command, whatever the policy, the network and the server do:

* It keeps the robot's position, velocity and acceleration limits, and the robot can stop inside
  them from there (``robots.motion_limiter``).
* When no newer chunk comes, what is left of the plan is played ever more slowly, so that the robot
  comes to rest on its planned path, at the plan's end or before; commanded velocities fall to zero
  with it. It stays there, and goes on when a chunk comes, its offset faded out. After
  ``fault_after_s`` without one, a fault is latched.
* A latched fault ends with ``resume`` and nothing else. Until then chunks are refused.
* After ``fail`` (NaN, a watchdog, an emergency key) every joint brakes as hard as it may.

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
    """What a ``CommandStream`` is doing; rest means coming to rest, and staying there."""

    WAITING = "waiting"  # holding a pose until a chunk comes
    RUNNING = "running"  # playing the plan
    STARVED = "starved"  # rest along what is left of the plan, until a chunk comes
    FAULT = "fault"  # rest, until ``resume``


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """Counts since the last ``reset``.

    Attributes:
        executor: Of chunks and policy ticks.
        clamps: Of the limits, per control tick.
        stops: How often chunks stayed away for so long that the robot slowed down.
        faults: How often a fault was latched.
        refused_chunks: Chunks that came while it was.
    """

    executor: ExecutorStatistics
    clamps: ClampStatistics
    stops: int
    faults: int
    refused_chunks: int


class CommandStream:
    """Chunks in, one command per control tick out.

    A tick allocates nothing that outlives it. Not thread-safe: one loop owns it.

    Args:
        contract: Of the policy.
        strategy: How chunks combine.
        limits: Of the robot's actuators.
        actions: What each number of a command is; none: positions.
        ratio: Control ticks per policy tick, see ``control_ratio``.
        hold: Joints that step at a policy tick, where the others move on a line to the next.
        fault_after_s: How long chunks may stay away, from the first tick that slows down.
        log: Where it is said that something was latched or resumed.

    Raises:
        ValueError: Limits for another number of joints than the policy's actions, actions that are
            not absolute or of a kind that has no rest, a ratio below 1, or a time that is not
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
        self._playback = PlanSampler(self.executor, contract.action_dim, ratio, hold)
        self._worst_ticks = self.limiter.worst_ticks_to_rest()
        self.stop_lead_ticks = max(0, math.ceil((self._worst_ticks - 1) / 2 / ratio))
        """Policy ticks of the plan that the longest stop along it takes up."""
        self.rest_within_s = 3 * self._worst_ticks * self.period_s
        """How long any stop takes at most, from the first command that slows down."""
        self.reset(self.limiter.command)

    def reset(self, position: ArrayLike) -> None:
        """A new episode: hold ``position``, (A,), until a chunk comes.

        Raises:
            ValueError: Another length than A, or NaN or infinity.
        """
        self.limiter.reset(position)
        self._motion = Motion.WAITING
        self._fault: str | None = None
        self._aligns = self._brakes = self._on_plan = False
        self._playback.forget()
        self._stops = self._faults = self._refused = self._starved_for = self._slow_ticks = 0
        self._phase = 0.0
        self._path_end = -1
        self.executor.reset()

    @property
    def motion(self) -> Motion:
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
        """(A,) float32: the last command, or where ``reset`` said the robot is."""
        return self.limiter.command

    def wants_chunk(self, tick: int, latency_ticks: int = 0) -> bool:
        """Whether to observe and ask at control tick ``tick``; see ``ChunkExecutor.wants_chunk``.

        Asks so much earlier that the answer comes before the robot would begin to slow down.

        Args:
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

        A chunk that must not be played (NaN, infinity, a wrong shape) latches a fault.
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
            self.executor.pass_by(policy_tick)
            return self.limiter.brake()
        return self._slow_down(policy_tick)

    def hold(self) -> NDArray[np.float32]:
        """The command, (A,) float32, of a period without a tick: rest, or a step nearer to it."""
        return self.limiter.brake()

    def fail(self, reason: str) -> None:
        """Latch a fault and brake as hard as the limits allow, from the next command on."""
        self._brakes = True
        self._latch(reason)

    def resume(self) -> bool:
        """End a fault: wait for a chunk from a new observation. False while still moving."""
        if self._motion is not Motion.FAULT or not self.limiter.at_rest:
            return False
        self.executor.flush()
        self._path_end = self.executor.next_tick - 1
        self._motion, self._fault = Motion.WAITING, None
        self._aligns, self._brakes = True, False
        self._log.info("resumed at policy tick %d", self.executor.next_tick)
        return True

    def statistics(self) -> StreamStatistics:
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
        # At an even deceleration over n commands the plan goes on for (n − 1)/2 of their periods.
        if left < (self.limiter.ticks_to_rest() - 1) / 2:
            self._starve()
            return self._slow_down(policy_tick)
        self._emit(policy_tick)
        if self._aligns:
            self._playback.align(policy_tick, part, self.limiter.position)
            self._aligns = False
        self._phase = policy_tick + part / self.ratio
        self._on_plan = True
        self._playback.fade()
        self._playback.read(policy_tick, part / self.ratio)
        return self._limited()

    def _starve(self) -> None:
        """From here on the plan is played more slowly with every tick."""
        self._motion = Motion.STARVED
        self._aligns = True
        self._stops += 1
        self._starved_for = 0
        self._slow_ticks = max(1, self.limiter.ticks_to_rest())
        # A plan of which nothing was played is no path to stop along.
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
            self._playback.read(base, self._phase - base)
        # A path played at a part of its speed has that part of its velocities.
        self._playback.target[self.limiter.by_velocity] *= rate
        # A path too winding for its limits is left rather than followed for ever.
        self._brakes = self._brakes or self._starved_for > self._slow_ticks + self._worst_ticks
        return self.limiter.brake() if self._brakes else self._limited()

    def _emit(self, policy_tick: int) -> None:
        executor = self.executor
        if not executor.started and not executor.covers(policy_tick):
            executor.pass_by(policy_tick)
        elif policy_tick >= executor.next_tick:
            executor.command(policy_tick)

    def _limited(self) -> NDArray[np.float32]:
        try:
            return self.limiter.limit(self._playback.target)
        except UnsafeCommand as error:
            self.fail(str(error))
            return self.limiter.brake()
