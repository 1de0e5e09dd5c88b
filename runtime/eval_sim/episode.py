"""One episode in a simulated world: lockstep, or by the wall clock.

Both are the same ``ControlLoop`` and the same ``ChunkExecutor``. In lockstep the clock is a manual
one: the world waits for the policy, so that the result depends on the seed alone. In real time the
world does not wait: a tick that was missed is a tick in which the last command went on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from envs.world import World
from policies.types import ActionChunk, AsyncPolicy, MetaObs, RolloutPolicy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.clock import ManualClock, MonotonicClock, spin_for
from runtime.control.control_loop import ControlLoop
from runtime.control.realtime import no_garbage_collection
from runtime.errors import RuntimeFault
from runtime.evaluation.episode_result import Episode
from runtime.stats import LatencyEstimate, StageTimes
from runtime.trace import recorder as trace

OnTick = Callable[[World], None]
"""Called after every step of the world; must be quick in real time."""


def run_lockstep(
    policy: RolloutPolicy,
    world: World,
    executor: ChunkExecutor,
    seed: int,
    on_tick: OnTick | None = None,
) -> Episode:
    """Run one episode in which the world waits for the policy.

    Raises:
        PolicyError, ServerLost, RequestTimeout: From the policy.
    """
    run = _Run(policy, world, executor, seed, on_tick)

    def step(tick: int) -> bool:
        if executor.wants_chunk(tick):
            chunk = policy.infer(run.observe(tick))
            if not run.accept(chunk):
                raise RuntimeFault(
                    f"the policy answered for tick {chunk.obs_timestep}, asked for {tick}: it must "
                    "pass obs.timestep on"
                )
        command = run.command(tick)
        run.ages_s.append((tick - executor.last_source) * world.dt_s)
        return run.step(command)

    ControlLoop(ManualClock(), world.dt_s).run(step, world.max_timesteps)
    return run.ended(missed_ticks=0, lateness_s=np.empty(0))


def run_realtime(
    policy: AsyncPolicy,
    world: World,
    executor: ChunkExecutor,
    seed: int,
    on_tick: OnTick | None = None,
) -> Episode:
    """Run one episode at the world's own rate, by the wall clock.

    The first chunk is waited for with the world at rest and no ticks counted. Observations are
    rendered and sent in the slack of a tick, after its command; they belong to the tick that
    follows. Garbage is collected between episodes, never within.

    Raises:
        PolicyError, ServerLost, RequestTimeout: From the policy.
    """
    run = _Run(policy, world, executor, seed, on_tick)
    captured_ns: dict[int, int] = {}
    latency = LatencyEstimate(world.dt_s)
    last_tick = -1
    ended = False

    def observe(tick: int) -> MetaObs:
        obs = run.observe(tick)
        captured_ns[tick] = obs.t_capture_ns
        return obs

    def accept(chunk: ActionChunk) -> None:
        latency.add(time.monotonic_ns() - chunk.t_capture_ns)
        run.accept(chunk)

    accept(policy.infer(observe(0)))

    def step(tick: int) -> bool:
        nonlocal last_tick
        while (chunk := policy.poll()) is not None:
            accept(chunk)
        if not missed_until(tick):
            return False
        last_tick = tick
        command = run.command(tick)
        run.ages_s.append((time.monotonic_ns() - captured_ns[executor.last_source]) / 1e9)
        return run.step(command)

    def missed_until(tick: int) -> bool:
        """Play the ticks that were missed: the world went on with the last command."""
        return all(run.step(executor.last_command) for _ in range(last_tick + 1, tick))

    def slack(tick: int) -> None:
        if executor.wants_chunk(tick + 1, latency.ticks()):
            policy.submit(observe(tick + 1))

    def end() -> bool:
        nonlocal ended
        ended = True
        return False

    loop = ControlLoop(MonotonicClock(spin_for(0)), world.dt_s)
    with no_garbage_collection():
        loop.run(lambda tick: step(tick) or end(), world.max_timesteps, slack=slack)
    if not ended:  # the last ticks may have been missed
        missed_until(world.max_timesteps)
    return run.ended(
        missed_ticks=loop.statistics().missed_ticks, lateness_s=loop.lateness_ns() / 1e9
    )


class _Run:
    """What both kinds of episode do, and what they note as they go.

    Attributes:
        ages_s: Per tick: time since the capture behind the command.
    """

    def __init__(
        self,
        policy: RolloutPolicy,
        world: World,
        executor: ChunkExecutor,
        seed: int,
        on_tick: OnTick | None,
    ) -> None:
        self._policy, self._world, self._executor = policy, world, executor
        self._seed, self._on_tick = seed, on_tick
        self._reward, self._success, self._ticks = -math.inf, False, 0
        self._stages = StageTimes()
        self._began_s = time.monotonic()
        self.ages_s: list[float] = []
        world.reset(seed)
        policy.reset()
        executor.reset()

    def observe(self, tick: int) -> MetaObs:
        """What a chunk is asked for with, rendered straight into the next message if there is
        one."""
        into = self._policy.loan_images()
        t_capture_ns = time.monotonic_ns()
        with trace.span("observe", tick):
            obs = self._world.observe(into)
        obs.timestep, obs.t_capture_ns = tick, t_capture_ns
        self._executor.requested(tick)
        return obs

    def accept(self, chunk: ActionChunk) -> bool:
        """Whether the chunk is one that was asked for."""
        self._stages.add(chunk.stages_ns)
        return self._executor.accept(chunk)

    def command(self, tick: int) -> NDArray[np.float32]:
        with trace.span("execute", tick):
            return self._executor.command(tick)

    def step(self, command: NDArray[np.float32]) -> bool:
        """Step the world; whether the episode goes on."""
        with trace.span("world_step"):
            result = self._world.step(command)
        self._ticks += 1
        self._reward = max(self._reward, result.reward)
        self._success = self._success or result.success
        if self._on_tick is not None:
            self._on_tick(self._world)
        return not (result.success or result.terminated or result.truncated)

    def ended(self, *, missed_ticks: int, lateness_s: NDArray[np.float64]) -> Episode:
        """What happened."""
        return Episode(
            seed=self._seed,
            success=self._success,
            reward=float(self._reward),
            horizon=self._ticks,
            missed_ticks=missed_ticks,
            executor=self._executor.statistics(),
            action_age_s=np.asarray(self.ages_s),
            lateness_s=lateness_s,
            stages_ns=self._stages.samples_ns(),
            wall_s=time.monotonic() - self._began_s,
        )
