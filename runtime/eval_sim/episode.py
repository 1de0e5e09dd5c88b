"""One episode in a simulated world, in lockstep or in real time.

A policy that takes several ticks (``n_obs_steps``) gets them from an ``ObservationHistory``. Ticks
are then observed without a request, too: in lockstep those that a request will need, in real time
every one, because there the next request's tick is not known.

Both use ``ControlLoop`` and ``ChunkExecutor``. In lockstep the clock is a ``ManualClock`` and the
world waits for the policy, so the result depends on the seed alone. In real time the world does not
wait: in a missed tick it is stepped with the last command.

A ``LatencyDial`` delays answers. In lockstep the world then does not wait for them, either: the
episode runs as in real time, by a clock on which computing takes no time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from envs.world import StepResult, World
from policies.types import ActionChunk, AsyncPolicy, MetaObs, RolloutPolicy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.clock import Clock, ManualClock, MonotonicClock, spin_for
from runtime.control.control_loop import ControlLoop
from runtime.control.observation_history import ObservationHistory
from runtime.control.realtime import no_garbage_collection
from runtime.errors import ServerBusy
from runtime.eval_sim.latency_dial import NO_DELAY, LatencyDial, LatencyDraws
from runtime.eval_sim.old_pictures import OldPictures
from runtime.eval_sim.requests import DelayedRequests, ImmediateRequests, Requests, require_tick
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.path_jerk import rms_jerk
from runtime.latency_stats import LatencyEstimate, StageTimes
from runtime.trace import recorder as trace


class TickObserver(Protocol):
    """Sees every step of the world; in real time it must be fast."""

    def before_step(
        self, world: World, command: NDArray[np.float32], source: int, age_s: float
    ) -> None:
        """Called before each step.

        Args:
            world: As ``command`` finds it.
            command: (A,), reused for the next one.
            source: Tick of the observation that the command is based on.
            age_s: That observation's age in seconds.
        """
        ...

    def after_step(self, world: World, result: StepResult) -> None:
        """Called after each step."""
        ...


class PolicyObserver(Protocol):
    """Sees what a policy gets and returns; in real time it must be fast."""

    def observed(self, obs: MetaObs) -> None:
        """Called with each observation before it is sent; its arrays are reused."""
        ...

    def chunk_arrived(self, chunk: ActionChunk) -> None:
        """Called with each chunk."""
        ...


def run_lockstep(
    policy: RolloutPolicy,
    world: World,
    executor: ChunkExecutor,
    seed: int,
    observers: Sequence[TickObserver] = (),
    *,
    policy_observer: PolicyObserver | None = None,
    dial: LatencyDial = NO_DELAY,
) -> Episode:
    """Run one episode in which the world waits for the policy, unless ``dial`` delays answers.

    Raises:
        PolicyError, ServerLost, RequestTimeout: Inference failed.
        RuntimeFault: The policy returned a chunk for another tick than the observation's.
    """
    draws = LatencyDraws(dial, seed)
    run = _Run(policy, world, executor, draws, observers, policy_observer=policy_observer)
    clock = ManualClock()
    if dial.delays_answers:
        requests = DelayedRequests(ImmediateRequests(policy), draws, clock)
        tick_ns = round(1e9 * world.dt_s)
        _run_pipelined(run, requests, clock, lambda: clock.advance_ns(tick_ns))
        return run.result(missed_ticks=0, lateness_s=np.empty(0))
    answers = ImmediateRequests(policy)
    n_obs_steps = policy.contract.n_obs_steps

    def step(tick: int) -> bool:
        if executor.wants_chunk(tick):
            run.accept(answers.infer(run.observe(tick)))
        elif any(executor.wants_chunk(tick + ahead) for ahead in range(1, n_obs_steps)):
            run.remember(tick)
        command = run.command(tick)
        run.ages_s.append((tick - executor.last_source) * world.dt_s)
        return run.step(command, run.ages_s[-1])

    ControlLoop(clock, world.dt_s).run(step, world.max_timesteps)
    return run.result(missed_ticks=0, lateness_s=np.empty(0))


def run_realtime(
    policy: AsyncPolicy,
    world: World,
    executor: ChunkExecutor,
    seed: int,
    observers: Sequence[TickObserver] = (),
    *,
    policy_observer: PolicyObserver | None = None,
    dial: LatencyDial = NO_DELAY,
) -> Episode:
    """Run one episode at the world's own rate, by the wall clock; ``dial`` adds to what is.

    Garbage is collected between episodes, never during one.

    Raises:
        PolicyError, ServerLost, RequestTimeout: Inference failed.
        RuntimeFault: The policy returned a chunk for a tick that was not observed.
    """
    draws = LatencyDraws(dial, seed)
    run = _Run(policy, world, executor, draws, observers, policy_observer=policy_observer)
    clock = MonotonicClock(spin_for(0))
    requests: Requests = policy
    if dial.delays_answers:
        requests = DelayedRequests(policy, draws, clock, round(1e9 * world.dt_s))
    loop = _run_pipelined(run, requests, clock)
    return run.result(
        missed_ticks=loop.statistics().missed_ticks, lateness_s=loop.lateness_ns() / 1e9
    )


def _run_pipelined(
    run: _Run, requests: Requests, clock: Clock, after_step: Callable[[], None] | None = None
) -> ControlLoop:
    """Run one episode whose world does not wait for answers; return the loop that ran it.

    Before the first tick the world stands still until the first chunk arrives. After a tick's
    command, in its remaining time, the observation of the next tick is rendered and sent.

    Args:
        run: The episode, at its start.
        requests: Its requests.
        clock: The time of everything measured here.
        after_step: Called after each step of the world, before the next observation; for a clock
            that does not go on by itself.
    """
    world, executor = run.world, run.executor
    captured_ns: dict[int, int] = {}
    latency = LatencyEstimate(world.dt_s)
    last_tick = -1
    ended = False

    def observe(tick: int) -> MetaObs:
        captured_ns[tick] = clock.now_ns()
        return run.observe(tick)

    def accept(chunk: ActionChunk) -> None:
        if chunk.obs_timestep not in captured_ns:
            require_tick(chunk, max(captured_ns))
        delay_ns = clock.now_ns() - captured_ns[chunk.obs_timestep]
        latency.add(delay_ns)
        run.accept(chunk, delay_ns / 1e9)

    accept(requests.infer(observe(0)))

    def step(tick: int) -> bool:
        nonlocal last_tick
        while (chunk := requests.poll()) is not None:
            accept(chunk)
        if not step_missed_ticks(tick):
            return False
        last_tick = tick
        command = run.command(tick)
        run.ages_s.append(age_s())
        return run.step(command, run.ages_s[-1])

    def age_s() -> float:
        return (clock.now_ns() - captured_ns[executor.last_source]) / 1e9

    def step_missed_ticks(tick: int) -> bool:
        """Step the world with the last command for every tick missed before ``tick``."""
        missed = range(last_tick + 1, tick)
        return all(run.step(executor.last_command, age_s()) for _ in missed)

    def send_observation(tick: int) -> None:
        if after_step is not None:
            after_step()
        if run.dial.drop:
            executor.give_up_request(tick + 1, latency.ticks())
        if executor.wants_chunk(tick + 1, latency.ticks()):
            try:
                requests.submit(observe(tick + 1))
            except ServerBusy:  # asked again at the next tick, with a newer observation
                executor.give_up_request(tick + 1, after=-1)
        else:
            run.remember(tick + 1)

    def end() -> bool:
        nonlocal ended
        ended = True
        return False

    loop = ControlLoop(clock, world.dt_s)
    with no_garbage_collection():
        loop.run(lambda tick: step(tick) or end(), world.max_timesteps, slack=send_observation)
    if not ended:  # the last ticks may have been missed
        step_missed_ticks(world.max_timesteps)
    return loop


class _Run:
    """One running episode: the steps that lockstep and real time share, and their measurements.

    Attributes:
        world, executor, dial: As given.
        ages_s: Per tick, the age of the observation that the command is based on, in seconds.
    """

    def __init__(
        self,
        policy: RolloutPolicy,
        world: World,
        executor: ChunkExecutor,
        draws: LatencyDraws,
        observers: Sequence[TickObserver],
        *,
        policy_observer: PolicyObserver | None,
    ) -> None:
        self.world, self.executor, self.dial = world, executor, draws.dial
        self._policy, self._draws = policy, draws
        self._observers = observers
        self._policy_observer = policy_observer
        self._reward, self._success, self._ticks = -math.inf, False, 0
        self._stages = StageTimes()
        self._began_s = time.monotonic()
        self._history = ObservationHistory(policy.contract.n_obs_steps)
        self._answer_delays_s: list[float] = []
        self._path: list[NDArray[np.float32]] = []
        self.ages_s: list[float] = []
        world.reset(draws.seed)
        policy.reset(draws.seed)
        executor.reset()
        self._old_pictures = OldPictures(world, self.dial.camera_ticks(world.dt_s))

    def observe(self, tick: int) -> MetaObs:
        """Return the observation for a request.

        A client's images are rendered into the message, unless it has several ticks or is kept
        before it is sent.
        """
        if self._history.n_obs_steps == 1:
            kept = self.dial.delays_answers
            obs = self._capture(tick, {} if kept else self._policy.loan_images())
        else:
            self.remember(tick)
            obs = self._history.stacked()
        if self._policy_observer is not None:
            self._policy_observer.observed(obs)
        self.executor.requested(tick)
        return obs

    def remember(self, tick: int) -> None:
        """Observe ``tick`` for a later request; does nothing for a policy that takes one tick."""
        if self._history.n_obs_steps > 1:
            self._history.add(self._capture(tick, {}))

    def _capture(self, tick: int, images: Mapping[str, NDArray[np.uint8]]) -> MetaObs:
        t_capture_ns = time.monotonic_ns()
        with trace.span("observe", tick):
            obs = self._old_pictures.observe(images)
        obs.timestep, obs.t_capture_ns = tick, t_capture_ns
        return obs

    def accept(self, chunk: ActionChunk, delay_s: float = 0.0) -> None:
        """Give the chunk to the executor, ``delay_s`` after its observation was captured."""
        self._stages.add(chunk.stages_ns)
        self._answer_delays_s.append(delay_s)
        if self._policy_observer is not None:
            self._policy_observer.chunk_arrived(chunk)
        self.executor.accept(chunk)

    def command(self, tick: int) -> NDArray[np.float32]:
        """Return the command of ``tick``, (A,) float32."""
        with trace.span("execute", tick):
            return self.executor.command(tick)

    def step(self, command: NDArray[np.float32], age_s: float) -> bool:
        """Step the world; return whether the episode continues.

        Args:
            command: (A,).
            age_s: Of the observation that it is based on, in seconds.
        """
        for observer in self._observers:
            observer.before_step(self.world, command, self.executor.last_source, age_s)
        with trace.span("world_step"):
            result = self.world.step(command)
        self._path.append(command.copy())
        self._old_pictures.remember()
        self._ticks += 1
        self._reward = max(self._reward, result.reward)
        self._success = self._success or result.success
        for observer in self._observers:
            observer.after_step(self.world, result)
        return not (result.success or result.terminated or result.truncated)

    def result(self, *, missed_ticks: int, lateness_s: NDArray[np.float64]) -> Episode:
        """Return the record of the episode; ``lateness_s`` is (n,), one value per tick."""
        return Episode(
            seed=self._draws.seed,
            success=self._success,
            reward=float(self._reward),
            horizon=self._ticks,
            missed_ticks=missed_ticks,
            executor=self.executor.statistics(),
            action_age_s=np.asarray(self.ages_s),
            lateness_s=lateness_s,
            stages_ns=self._stages.samples_ns(),
            wall_s=time.monotonic() - self._began_s,
            answer_delay_s=np.asarray(self._answer_delays_s),
            drawn_latency_s=self._draws.latency_s(),
            lost_observations=self._draws.lost,
            command_jerk=rms_jerk(np.asarray(self._path), self.world.dt_s),
        )
