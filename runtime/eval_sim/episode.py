"""One episode in a simulated world: lockstep, or by the wall clock.

Both are the same ``ControlLoop`` and the same ``ChunkExecutor``. In lockstep the clock is a manual
one: the world waits for the policy, so that the result depends on the seed alone. In real time the
world does not wait: a tick that was missed is a tick in which the last command went on.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from envs.world import World
from policies.types import MetaObs, Policy, PolicyContract
from runtime.client.policy_client import PolicyClient
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.clock import ManualClock, MonotonicClock, spin_for
from runtime.control.control_loop import ControlLoop
from runtime.errors import RuntimeFault
from runtime.evaluation.episode_result import Episode
from runtime.protocol import messages
from runtime.stats import LatencyEstimate, StageTimes
from runtime.trace import recorder as trace

OnTick = Callable[[World], None]
"""Called after every step of the world; must be quick in real time."""


@dataclass(slots=True)
class _Progress:
    """What both kinds of episode note as they go."""

    world: World
    on_tick: OnTick | None
    reward: float = -math.inf
    success: bool = False
    ticks: int = 0
    ages_s: list[float] = field(default_factory=list)
    stages: StageTimes = field(default_factory=StageTimes)
    began_s: float = field(default_factory=time.monotonic)

    def step(self, command: NDArray[np.float32]) -> bool:
        """Step the world; whether the episode goes on."""
        with trace.span("world_step"):
            result = self.world.step(command)
        self.ticks += 1
        self.reward = max(self.reward, result.reward)
        self.success = self.success or result.success
        if self.on_tick is not None:
            self.on_tick(self.world)
        return not (result.success or result.terminated or result.truncated)


def _begin(
    world: World, policy: Policy, executor: ChunkExecutor, seed: int, on_tick: OnTick | None
) -> _Progress:
    """Put everything at the start of the episode ``seed``."""
    progress = _Progress(world, on_tick)
    world.reset(seed)
    policy.reset()
    executor.reset()
    return progress


def run_lockstep(
    world: World, policy: Policy, executor: ChunkExecutor, seed: int, on_tick: OnTick | None = None
) -> Episode:
    """Run one episode in which the world waits for the policy.

    Raises:
        PolicyError, ServerLost, RequestTimeout: From the policy.
    """
    progress = _begin(world, policy, executor, seed, on_tick)

    def step(tick: int) -> bool:
        if executor.wants_chunk(tick):
            obs = _observe(world, policy, tick)
            executor.requested(tick)
            began_ns = time.monotonic_ns()
            chunk = policy.infer(obs)
            if trace.on and not isinstance(policy, PolicyClient):  # which says so itself
                trace.inferred(chunk.stages_ns, began_ns, tick)
            progress.stages.add(chunk.stages_ns)
            if not executor.accept(chunk):
                raise RuntimeFault(
                    f"the policy answered for tick {chunk.obs_timestep}, asked for {tick}: it must "
                    "pass obs.timestep on"
                )
        with trace.span("execute", tick):
            command = executor.command(tick)
        progress.ages_s.append((tick - executor.last_source) * world.dt_s)
        return progress.step(command)

    loop = ControlLoop(ManualClock(), world.dt_s)
    loop.run(step, world.max_timesteps)
    return _episode(seed, progress, executor, None)


def run_realtime(
    world: World,
    policy: PolicyClient,
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
    progress = _begin(world, policy, executor, seed, on_tick)
    captured_ns: dict[int, int] = {}
    latency = LatencyEstimate(world.dt_s)
    last_tick = -1
    ended = False

    def observe(tick: int) -> MetaObs:
        obs = _observe(world, policy, tick)
        captured_ns[tick] = obs.t_capture_ns
        executor.requested(tick)
        return obs

    first = policy.infer(observe(0))
    latency.add(time.monotonic_ns() - first.t_capture_ns)
    progress.stages.add(first.stages_ns)
    executor.accept(first)

    def step(tick: int) -> bool:
        nonlocal last_tick
        while (chunk := policy.poll()) is not None:
            latency.add(time.monotonic_ns() - chunk.t_capture_ns)
            progress.stages.add(chunk.stages_ns)
            executor.accept(chunk)
        if not missed_until(tick):
            return False
        last_tick = tick
        with trace.span("execute", tick):
            command = executor.command(tick)
        source_ns = captured_ns[executor.last_source]
        progress.ages_s.append((time.monotonic_ns() - source_ns) / 1e9)
        return progress.step(command)

    def missed_until(tick: int) -> bool:
        """Play the ticks that were missed: the world went on with the last command."""
        return all(progress.step(executor.last_command) for _ in range(last_tick + 1, tick))

    def slack(tick: int) -> None:
        if executor.wants_chunk(tick + 1, latency.ticks()):
            policy.submit(observe(tick + 1))

    def end() -> bool:
        nonlocal ended
        ended = True
        return False

    loop = ControlLoop(MonotonicClock(spin_for(0)), world.dt_s)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        loop.run(lambda tick: step(tick) or end(), world.max_timesteps, slack=slack)
    finally:
        gc.enable()
        gc.unfreeze()
    if not ended:  # the last ticks may have been missed
        missed_until(world.max_timesteps)
    return _episode(seed, progress, executor, loop)


def _observe(world: World, policy: Policy, tick: int) -> MetaObs:
    """Observe, rendering straight into the next message where there is one."""
    into = policy.loan_images() if isinstance(policy, PolicyClient) and policy.transport else None
    t_capture_ns = time.monotonic_ns()
    with trace.span("observe", tick):
        obs = world.observe(into)
    obs.timestep, obs.t_capture_ns = tick, t_capture_ns
    return obs


def _episode(
    seed: int,
    progress: _Progress,
    executor: ChunkExecutor,
    loop: ControlLoop | None,
) -> Episode:
    return Episode(
        seed=seed,
        success=progress.success,
        reward=float(progress.reward),
        horizon=progress.ticks,
        missed_ticks=loop.statistics().missed_ticks if loop else 0,
        executor=executor.statistics(),
        action_age_s=np.asarray(progress.ages_s),
        lateness_s=loop.lateness_ns() / 1e9 if loop else np.empty(0),
        stages_ns=progress.stages.samples_ns(),
        wall_s=time.monotonic() - progress.began_s,
    )


def check_world(world: World, policy: Policy, contract: PolicyContract) -> None:
    """Check what a server checks at the handshake, and what it cannot see.

    Ends with one request that nobody counts: it opens the session and warms everything up.

    Args:
        contract: The policy's, with the rate that the user gave where it does not say its own.

    Raises:
        ContractMismatch: Cameras, sizes, dtypes or state length.
        RuntimeFault: The world's tick or action is not the policy's; names both.
        PolicyError, ServerLost, RequestTimeout: From the request.
    """
    world.reset(0)
    obs = world.observe()
    messages.check_observation_schema(messages.observation_schema(obs), contract)
    if world.action_dim != contract.action_dim:
        raise RuntimeFault(
            f"action_dim: the world has {world.action_dim}, the policy was trained with "
            f"{contract.action_dim}"
        )
    control = (contract.ctrl_space, contract.ctrl_type)
    if world.control is not None and control != world.control:
        raise RuntimeFault(
            f"control: the policy commands {control}, the world takes {world.control}"
        )
    if contract.first_action_offset:
        raise RuntimeFault(
            f"first_action_offset: got {contract.first_action_offset}, expected 0: a simulated "
            "episode starts with the first observation's own tick"
        )
    policy_hz, world_hz = 1 / contract.dt_s, 1 / world.dt_s
    if not math.isclose(policy_hz, world_hz, rel_tol=1e-6):
        raise RuntimeFault(
            f"control rate: the policy's actions are 1/{policy_hz:g} s apart, the world runs at "
            f"{world_hz:g} Hz; expected the same (--fps overrides the policy's)"
        )
    policy.infer(obs)
