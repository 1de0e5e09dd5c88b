"""Turns chunks into one command per tick, with a plan indexed by absolute tick.

Guaranteed:

* Action i of a chunk is for tick ``obs_timestep + first_action_offset + i``, and is played at that
  tick or never. Actions for ticks that were already emitted are discarded. The tick counter
  measures that delay; it is never estimated.
* A chunk whose observation is not newer than the newest accepted one is dropped and counted, so a
  late or repeated answer cannot move the arm back.
* ``command`` allocates nothing: the plan is a ring of ticks, allocated once.

A simulated world takes its commands from here. A robot takes them through
``runtime.control.command_stream``, which keeps its limits.

Rejected: a queue of actions popped per tick (it plays late chunks from their start, so latency
becomes a shift in time, and it cannot blend).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import ActionChunk, PolicyContract
from runtime.control.blending import Strategy, align

NEVER = -(2**62)
"""A tick number that never occurs; marks an empty slot of the plan."""


@dataclass(frozen=True, slots=True)
class ExecutorStatistics:
    """Counts since the last ``reset``.

    Attributes:
        chunks: Chunks accepted.
        dropped_stale: Chunks dropped because a newer one had been accepted.
        discarded_actions: Actions that arrived after their tick.
        starved_ticks: Ticks that no chunk covered. The last command was repeated; or, if actions
            are not absolute, zero was commanded.
        seam_jump: Largest |Δ| of any joint at the first tick of a new chunk, relative to the plan
            it replaced or else to the last command (in each action's own unit).
        staleness_ticks: Largest age of the newest observation behind a command, in ticks.
    """

    chunks: int
    dropped_stale: int
    discarded_actions: int
    starved_ticks: int
    seam_jump: float
    staleness_ticks: int


class ChunkExecutor:
    """Turns the chunks of one episode into commands.

    Args:
        contract: The policy's dimensions, chunk size and dt.
        strategy: How chunks are requested and combined.

    Raises:
        ValueError: The strategy aligns seams, and the policy's actions are not absolute.
    """

    def __init__(self, contract: PolicyContract, strategy: Strategy) -> None:
        self.strategy = strategy
        # A chunk whose steps are longer than a tick reaches further than chunk_size ticks.
        self._stretch = (strategy.step_s or contract.dt_s) / contract.dt_s
        reach = int(np.ceil(contract.chunk_size * self._stretch)) + contract.first_action_offset
        self._capacity = 2 * reach + 1
        self._plan = np.zeros((self._capacity, contract.action_dim))
        self._tick_of = np.empty(self._capacity, np.int64)
        self._count = np.zeros(self._capacity, np.int64)
        self._source = np.zeros(self._capacity, np.int64)
        self._command = np.zeros(contract.action_dim, np.float32)
        self._chunk_size, self._action_dim = contract.chunk_size, contract.action_dim
        self._absolute = contract.ctrl_type == "abs"
        if strategy.aligned and not self._absolute:
            raise ValueError(
                f"action manager: got {strategy.name!r} for actions that are "
                f"{contract.ctrl_type!r}, expected one without a seam to align"
            )
        self.reset()

    def reset(self) -> None:
        """Start a new episode at tick 0, with an empty plan and counts of 0."""
        self._tick_of.fill(NEVER)
        self._count.fill(0)
        self._next_tick = 0
        self._newest_obs = -1
        self._window_end = 0
        self._requested = -1
        self._last_source = -1
        self._started = False
        self._covered_to = -1
        self._chunks = self._stale = self._discarded = self._starved = self._staleness = 0
        self._seam_jump = 0.0

    def flush(self) -> None:
        """Drop the plan and the open request, and refuse older observations. Ticks go on."""
        self._tick_of.fill(NEVER)
        self._covered_to = self._next_tick - 1
        # An observation made after the last emitted tick may carry that tick's number.
        self._newest_obs = max(self._newest_obs, self._next_tick - 2)
        self._window_end = self._next_tick
        self._requested = -1

    def wants_chunk(self, tick: int, latency_ticks: int = 0) -> bool:
        """Whether to observe and request a chunk at ``tick``, so that it arrives when it is due.

        Args:
            tick: The current tick.
            latency_ticks: Ticks that an answer is expected to take; 0 in lockstep. The estimate
                affects when a chunk is requested, never the ticks at which it is played.
        """
        if self._requested < 0:
            return True
        answered = self._newest_obs >= self._requested
        if self.strategy.windowed:
            return answered and tick + latency_ticks >= self._window_end
        if tick >= self._requested + self.strategy.stride:
            return True
        return answered and not self.covers(tick + latency_ticks)

    def requested(self, tick: int) -> None:
        """Note that the observation of ``tick`` was sent."""
        self._requested = tick

    def give_up_request(self, tick: int, after: int) -> None:
        """Forget the open request if it is older than ``after`` ticks at ``tick``.

        Then ``wants_chunk`` asks again. The answer is still accepted if it comes first.
        """
        if self._requested > self._newest_obs and tick - self._requested > after:
            self._requested = self._newest_obs

    def accept(self, chunk: ActionChunk, *, at_once: bool = False) -> bool:
        """Blend ``chunk`` into the plan; False if it was dropped because it is not newer.

        Args:
            chunk: At most chunk_size actions of shape (A,).
            at_once: Take over at the next tick, ignoring the window, because the robot is not
                where the plan says.

        Raises:
            ValueError: The chunk's shape is not the contract's, or it holds a NaN or infinity.
        """
        actions = chunk.actions
        if actions.ndim != 2 or actions.shape[1] != self._action_dim:
            raise ValueError(
                f"chunk: got shape {actions.shape}, expected (<= {self._chunk_size}, "
                f"{self._action_dim})"
            )
        if not 0 < len(actions) <= self._chunk_size:
            raise ValueError(f"chunk: got {len(actions)} actions, expected 1 to {self._chunk_size}")
        if not np.isfinite(actions).all():
            raise ValueError(
                "chunk: got NaN or infinity among its actions, expected finite numbers"
            )
        if chunk.obs_timestep <= self._newest_obs:
            self._stale += 1
            return False
        self._newest_obs = chunk.obs_timestep
        self._requested = max(self._requested, chunk.obs_timestep)
        self._chunks += 1

        first = chunk.obs_timestep + chunk.first_action_offset
        if self._stretch != 1.0:
            ticks = np.arange(int(np.ceil(len(actions) * self._stretch)))
            actions = actions[
                np.minimum((ticks / self._stretch + 1e-9).astype(int), len(actions) - 1)
            ]
        end = first + len(actions)
        start = max(first, self._next_tick)
        if self.strategy.windowed:
            if not at_once:
                start = max(start, self._window_end)
            self._window_end = max(self._window_end, min(start + self.strategy.stride, end))
        self._discarded += max(0, min(end, self._next_tick) - first)
        if start >= end:
            return True

        ticks = np.arange(start, end)
        slots = ticks % self._capacity
        count = np.where(self._tick_of[slots] == ticks, self._count[slots], 0)
        planned = self._plan[slots]
        new = actions[start - first :].astype(np.float64)
        before = planned[0].copy() if count[0] else self._just_before(start)
        self.strategy.blend(planned, new, count, self.strategy.coefficient)
        if self.strategy.aligned:
            earlier = self._just_before(start)
            if earlier is not None:
                align(planned, earlier, self.strategy.coefficient)
        if before is not None:
            self._seam_jump = max(self._seam_jump, float(np.abs(planned[0] - before).max()))
        self._plan[slots] = planned
        self._count[slots] = count + 1
        self._tick_of[slots] = ticks
        self._source[slots] = chunk.obs_timestep
        return True

    def _just_before(self, tick: int) -> NDArray[np.float64] | NDArray[np.float32] | None:
        """(A,) the action of the tick before ``tick``; None if it is not known."""
        if self.covers(tick - 1):
            return self._plan[(tick - 1) % self._capacity]  # type: ignore[no-any-return]
        return self._command if self._started and tick == self._next_tick else None

    def covers(self, tick: int) -> bool:
        """Whether the plan has an action for ``tick``."""
        return bool(self._tick_of[tick % self._capacity] == tick)

    def covered_to(self, tick: int) -> int:
        """The last tick covered without a gap from ``tick`` on; ``tick`` − 1 if there is none."""
        end = max(self._covered_to, tick - 1)
        while self._tick_of[(end + 1) % self._capacity] == end + 1:
            end += 1
        self._covered_to = end
        return end

    def copy_planned(self, tick: int, out: NDArray[np.float64]) -> None:
        """Copy the action planned for ``tick``, which must be covered, into ``out`` (A,)."""
        out[:] = self._plan[tick % self._capacity]

    @property
    def started(self) -> bool:
        """Whether a planned action was played in this episode."""
        return self._started

    @property
    def next_tick(self) -> int:
        """The first tick that has not been emitted."""
        return self._next_tick

    def command(self, tick: int) -> NDArray[np.float32]:
        """The command for ``tick``, (A,) float32; valid until the next call.

        A tick that no chunk covers counts as starved. The last command is repeated, so that an
        arm holds its pose; actions that are not absolute become zero, for the same reason.

        Raises:
            ValueError: ``tick`` was already emitted.
            LookupError: The tick is not covered and there is no last command to repeat.
        """
        if tick < self._next_tick:
            raise ValueError(f"tick: got {tick}, expected at least {self._next_tick}")
        slot = tick % self._capacity
        if self._tick_of[slot] == tick:
            self._command[:] = self._plan[slot]
            self._last_source = int(self._source[slot])
            self._started = True
        elif self._started:
            self._starved += 1
            if not self._absolute:
                self._command.fill(0)
        else:
            raise LookupError(f"no chunk has come yet, at tick {tick}")
        self._staleness = max(self._staleness, tick - self._last_source)
        self._next_tick = tick + 1
        return self._command

    def skip(self, tick: int) -> None:
        """Note that ``tick`` passes without a command from here. Its actions are not played."""
        self._next_tick = max(self._next_tick, tick + 1)

    @property
    def last_command(self) -> NDArray[np.float32]:
        """The command emitted last, (A,) float32; zeros before the first."""
        return self._command

    @property
    def last_source(self) -> int:
        """Timestep of the newest observation behind the last command, -1 before the first."""
        return self._last_source

    def statistics(self) -> ExecutorStatistics:
        """The counts since the last ``reset``."""
        return ExecutorStatistics(
            chunks=self._chunks,
            dropped_stale=self._stale,
            discarded_actions=self._discarded,
            starved_ticks=self._starved,
            seam_jump=self._seam_jump,
            staleness_ticks=self._staleness,
        )
