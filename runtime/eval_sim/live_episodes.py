"""Shows the episodes of one simulated world in a live view."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from envs.world import StepResult, World
from policies.execution import Execution
from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.control.strategy_selection import strategy_of
from runtime.datasets.features import names_or_numbers
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.evaluation.episode_result import Episode
from runtime.live_view.layout import LiveViewLayout
from runtime.live_view.live_view import LiveView
from runtime.live_view.live_view_writer import stages_of


class LiveEpisodes:
    """Sends what happens to a live view; observes the ticks and the policy.

    In lockstep the times are simulated, one episode after another, and every tick is rendered. In
    real time they are the clock's. Rendering would delay the loop, so pictures and states are
    those that the policy gets; those of every tick follow when the episode is over.

    Args:
        view: Where it is shown.
        world: The world.
        realtime: Whether the loop runs by the wall clock.
    """

    def __init__(self, view: LiveView, world: World, *, realtime: bool) -> None:
        self._view, self._world, self._realtime = view, world, realtime
        self._attempt = self._ticks = self._ticks_before = 0
        self._begins_ns: int | None = None
        self._arrived: list[tuple[int, ActionChunk]] = []
        self._snapshots: list[tuple[int, object]] = []

    def begin(self, seed: int) -> None:
        """Announce an episode, before it begins."""
        self._attempt += 1
        self._ticks_before += self._ticks
        self._ticks, self._begins_ns = 0, None
        self._arrived.clear()
        self._snapshots.clear()
        self._say(f"episode with seed {seed}")

    def end(self, episode: Episode) -> None:
        """Announce the outcome, and show what was not rendered during the episode."""
        outcome = "success" if episode.success else "failure"
        self._say(f"seed {episode.seed}: {outcome}, reward {episode.reward:g}")
        for time_ns, snapshot in self._snapshots:
            self._show(time_ns, snapshot)

    def before_step(
        self, world: World, command: NDArray[np.float32], source: int, age_s: float
    ) -> None:
        """Show the command, and the chunks that came for it."""
        now_ns = self._now_ns()
        if self._begins_ns is None:
            self._begins_ns = now_ns
        due_ns = self._due_ns(self._ticks)
        self._show_chunks()
        self._view.writer.tick(
            now_ns,
            command,
            attempt=self._attempt,
            source=source,
            lateness_s=(now_ns - due_ns) / 1e9,
            age_s=age_s,
        )
        snapshot = world.observation_snapshot()
        if self._realtime:
            self._snapshots.append((now_ns, snapshot))
            self._view.poll()
        else:
            self._show(now_ns, snapshot)
        self._ticks += 1

    def after_step(self, world: World, result: StepResult) -> None:
        """Do nothing: a tick is shown before its step."""

    def observed(self, obs: MetaObs) -> None:
        """Show what the policy gets; in lockstep every tick is shown anyway."""
        if not self._realtime:
            return
        stacked = obs.state.ndim > 1
        writer = self._view.writer
        writer.state(obs.t_capture_ns, obs.state[-1] if stacked else obs.state)
        for name, image in obs.images.items():
            writer.picture(name, obs.t_capture_ns, image[-1] if stacked else image)

    def chunk_arrived(self, chunk: ActionChunk) -> None:
        """Show the chunk with the next command, when the time of its first action is known."""
        self._arrived.append((self._now_ns(), chunk))

    def _show_chunks(self) -> None:
        for arrived_ns, chunk in self._arrived:
            first_ns = self._due_ns(chunk.obs_timestep + chunk.first_action_offset)
            stages_ns = stages_of(chunk.stages_ns)
            self._view.writer.chunk(arrived_ns, first_ns, chunk.actions, stages_ns)
        self._arrived.clear()

    def _show(self, time_ns: int, snapshot: object) -> None:
        observation = self._world.observe_snapshot(snapshot)
        self._view.writer.state(time_ns, observation.state)
        for name, image in observation.images.items():
            self._view.writer.picture(name, time_ns, image)
        self._view.wait()

    def _say(self, line: str) -> None:
        self._view.writer.text(self._now_ns(), line)

    def _now_ns(self) -> int:
        if self._realtime:
            return time.monotonic_ns()
        return round((self._ticks_before + self._ticks) * self._world.dt_s * 1e9)

    def _due_ns(self, tick: int) -> int:
        return (self._begins_ns or 0) + round(tick * self._world.dt_s * 1e9)


def start_live_episodes(
    config: EvalSimConfig,
    world: World,
    contract: PolicyContract,
    execution: Execution,
    tell: Callable[[str], None],
) -> LiveView:
    """Start the live view of an evaluation with ``--rerun``.

    Args:
        config: The evaluation's.
        world: The world.
        contract: The policy's, at the rate used.
        execution: How chunks are executed.
        tell: Called with one line of text for every problem.
    """
    asked = {camera.name: (camera.source_hw, camera.model_hw) for camera in contract.cameras}
    layout = LiveViewLayout(
        title=f"{config.env.task}, {Path(config.model_name_or_path).name}",
        state_names=names_or_numbers(contract.state_names, "state", world.state_dim),
        action_names=names_or_numbers(contract.action_names, "action", world.action_dim),
        cameras={
            name: max(hw, *asked[name], key=lambda size: size[0] * size[1])
            for name, hw in world.camera_hw.items()
        },
        chunk_size=contract.chunk_size,
        step_s=strategy_of(contract, execution).step_s or contract.dt_s,
        origin_ns=time.monotonic_ns() if config.realtime else 0,
        keeps_all=config.live_view.file is not None,
    )
    return LiveView(str(config.live_view.rerun), layout, tell)
