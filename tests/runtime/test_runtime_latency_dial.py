"""The latency dial: what it draws, and what an episode under it does, tick by tick."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.fake_world import FakeWorld
from policies.types import ActionChunk, MetaObs, RolloutPolicy
from runtime.control.blending import make_strategy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.clock import ManualClock
from runtime.errors import ServerBusy
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.episode import run_lockstep, run_realtime
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.eval_sim.latency_dial import LatencyDial, LatencyDraws
from runtime.eval_sim.requests import DelayedRequests, ImmediateRequests
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.path_jerk import rms_jerk
from runtime.server.server_process import ServerProcess
from tests.runtime.command import status_of
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CHUNK, CONTRACT, ToyPolicy, observation

TOY = "python:tests.runtime.toy_policy:make"


class NotingPolicy(ToyPolicy):
    """Action i is the tick it is for; notes each observation's tick, picture and state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[MetaObs] = []

    def infer(self, obs: MetaObs) -> ActionChunk:
        self.seen.append(obs)
        ticks = np.arange(obs.timestep, obs.timestep + CHUNK, dtype=np.float32)
        actions = np.repeat(ticks[:, None], CONTRACT.action_dim, axis=1)
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)

    @property
    def ticks(self) -> list[int]:
        return [obs.timestep for obs in self.seen]


class Sources:
    """The tick behind each command, and the command's first number."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.commands: list[float] = []

    def before_step(self, _world: object, command: np.ndarray, source: int, _age: float) -> None:
        self.seen.append(source)
        self.commands.append(float(command[0]))

    def after_step(self, *_: object) -> None:
        pass


def play(
    dial: LatencyDial, *, manager: str = "sequential", stride: int = CHUNK, ticks: int = 40
) -> tuple[Episode, NotingPolicy, Sources]:
    policy, sources = NotingPolicy(), Sources()
    world = FakeWorld(camera_hw={"top": (24, 32)}, max_timesteps=ticks)
    strategy = make_strategy(manager, chunk_size=CHUNK, n_action_steps=CHUNK, stride=stride)
    executor = ChunkExecutor(CONTRACT, strategy)
    episode = run_lockstep(InProcessPolicy(policy), world, executor, 3, [sources], dial=dial)
    return episode, policy, sources


def test_draws_depend_on_the_seed_alone_and_fill_the_range() -> None:
    dial = LatencyDial(latency_ms=100, latency_jitter_ms=30, drop=0.25)

    def drawn(seed: int) -> list[int | None]:
        draws = LatencyDraws(dial, seed)
        return [draws.draw_ns() for _ in range(4000)]

    assert drawn(1) == drawn(1) != drawn(2)
    known = np.array([ns for ns in drawn(1) if ns is not None]) / 1e6
    assert known.min() == pytest.approx(70, abs=0.5)
    assert known.max() == pytest.approx(130, abs=0.5)
    assert known.mean() == pytest.approx(100, abs=1)
    assert 1 - len(known) / 4000 == pytest.approx(0.25, abs=0.03)


def test_an_answer_is_played_from_the_tick_at_which_it_is_there() -> None:
    # 50 ms are two and a half ticks: the answer to the observation of tick k comes at tick k + 3.
    episode, policy, sources = play(
        LatencyDial(latency_ms=50), manager="latest", stride=5, ticks=16
    )
    assert policy.ticks == [0, 4, 8, 12]  # each chunk is asked for before the last one ends
    assert sources.seen == [0] * 7 + [4] * 4 + [8] * 4 + [12]
    assert sources.commands == list(range(16))
    assert episode.answer_delay_s.tolist() == pytest.approx([0.05, 0.06, 0.06, 0.06])
    assert episode.drawn_latency_s.tolist() == pytest.approx([0.05] * 4)
    # The world stood still for the first answer, so its age began with the wait.
    assert episode.action_age_s[:7] == pytest.approx(0.05 + 0.02 * np.arange(7))
    assert episode.executor.starved_ticks == episode.missed_ticks == 0


def test_chunks_are_asked_for_early_enough() -> None:
    episode, policy, _ = play(LatencyDial(latency_ms=40))
    # Twice 40 ms and a tick ahead of tick 10: the observation of tick 5.
    assert policy.ticks[:2] == [0, 5]
    assert episode.executor.starved_ticks == 0


def test_a_latency_longer_than_a_chunk_starves_the_world() -> None:
    episode, policy, sources = play(LatencyDial(latency_ms=300), ticks=31)
    assert policy.ticks[:2] == [0, 1]  # asked at once, and again when the answer is there
    assert episode.executor.starved_ticks > 0
    # Chunk 0 covers ticks 0 to 9; that of tick 1 comes at tick 16, when it is over.
    assert sources.commands[9:16] == [9.0] * 7
    assert episode.executor.discarded_actions >= CHUNK


def test_at_most_two_requests_are_in_flight() -> None:
    _, policy, _ = play(LatencyDial(latency_ms=100), manager="latest", stride=1, ticks=20)
    # One that waits is replaced by a newer one, and sent when an answer comes.
    assert policy.ticks == [0, 1, 2, 6, 7, 11, 12, 16, 17]


def test_lost_observations_are_asked_again() -> None:
    dial = LatencyDial(latency_ms=20, drop=0.5)
    episode, policy, _ = play(dial, ticks=200)
    assert episode.lost_observations > 3
    assert len(policy.ticks) == episode.drawn_latency_s.size
    assert episode.drawn_latency_s.size - episode.executor.chunks <= 1  # the last may still come
    assert policy.ticks[-1] > 150


def test_pictures_are_older_than_joints() -> None:
    _, now, _ = play(LatencyDial(), stride=1, ticks=12)
    for dial in (LatencyDial(camera_latency_ms=45), LatencyDial(20, camera_latency_ms=45)):
        _, late, _ = play(dial, manager="latest", stride=1, ticks=12)
        states = {obs.timestep: obs.state for obs in now.seen}
        pictures = {obs.timestep: obs.images["top"] for obs in now.seen}
        for obs in late.seen[:3]:  # the commands, and so the paths, are equal
            assert np.array_equal(obs.state, states[obs.timestep])
            assert np.array_equal(obs.images["top"], pictures[max(0, obs.timestep - 3)])


def test_answers_keep_their_order() -> None:
    draws, clock = LatencyDraws(LatencyDial(50, 50), 0), ManualClock()
    requests = DelayedRequests(ImmediateRequests(NotingPolicy()), draws, clock)
    for tick in (0, 1):
        requests.submit(observation(timestep=tick))
    first_s, second_s = draws.latency_s()
    assert first_s > second_s  # what this seed draws
    assert requests.poll() is None
    clock.advance_ns(round(second_s * 1e9))
    assert requests.poll() is None
    clock.advance_ns(round((first_s - second_s) * 1e9))
    arrived = [requests.poll(), requests.poll(), requests.poll()]
    assert [chunk and chunk.obs_timestep for chunk in arrived] == [0, 1, None]


class SlowlyRead:
    """Requests whose answers took 30 ms as seen, of which 25 ms until they were read."""

    def __init__(self) -> None:
        self._policy = NotingPolicy()

    def infer(self, obs: MetaObs) -> ActionChunk:
        chunk = self._policy.infer(obs)
        return dataclasses.replace(chunk, stages_ns={"infer": 5_000_000, "reply": 25_000_000})

    def submit(self, obs: MetaObs) -> None:
        self._chunk: ActionChunk | None = self.infer(obs)

    def poll(self) -> ActionChunk | None:
        chunk, self._chunk = self._chunk, None
        return chunk


def test_the_time_that_an_answer_waited_to_be_read_is_not_counted_twice() -> None:
    clock, tick_ns = ManualClock(), 20_000_000
    requests = DelayedRequests(SlowlyRead(), LatencyDraws(LatencyDial(100), 0), clock, tick_ns)
    requests.submit(observation(timestep=0))
    clock.advance_ns(30_000_000)
    assert requests.poll() is None  # it arrived after 10 ms, at the latest; 20 ms it waited
    clock.advance_ns(79_000_000)
    assert requests.poll() is None
    clock.advance_ns(1_000_000)
    assert requests.poll() is not None


def test_the_jerk_of_a_known_path() -> None:
    ticks = np.arange(50)[:, None] * 0.02
    assert rms_jerk(2 * ticks**3, 0.02) == pytest.approx(12)
    assert rms_jerk(ticks[:3], 0.02) is None


def test_more_jitter_than_latency_is_refused() -> None:
    with pytest.raises(ValueError, match="--latency_jitter_ms: got 30, expected at most --latency"):
        LatencyDial(latency_ms=20, latency_jitter_ms=30)


def without_times(episode: Episode) -> dict[str, Any]:
    """The fields that the machine's clock does not measure."""
    fields = {name: getattr(episode, name) for name in Episode.__slots__}
    del fields["wall_s"], fields["stages_ns"]
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
    }


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_the_same_dial_is_the_same_episode_served(transport: str) -> None:
    dial = LatencyDial(50, 30, drop=0.2, camera_latency_ms=30)

    def run(policy: RolloutPolicy) -> list[dict[str, Any]]:
        world = FakeWorld(camera_hw={"top": (24, 32)}, max_timesteps=60)
        strategy = make_strategy("temporal_ensemble", chunk_size=CHUNK, n_action_steps=CHUNK)
        executor = ChunkExecutor(CONTRACT, strategy)
        episodes = [run_lockstep(policy, world, executor, seed, dial=dial) for seed in (1, 2)]
        return [without_times(episode) for episode in episodes]

    local = run(InProcessPolicy(ToyPolicy()))
    assert local[0]["lost_observations"] > 0
    assert local[0]["drawn_latency_s"] != local[1]["drawn_latency_s"]
    with serving(ToyPolicy()) as server, connect(server, transport, deterministic=True) as client:
        assert run(client) == local


def test_in_real_time_the_dial_adds_to_what_is() -> None:
    world = FakeWorld(camera_hw={"top": (24, 32)}, max_timesteps=40)
    strategy = make_strategy("sequential", chunk_size=CHUNK, n_action_steps=CHUNK)
    executor = ChunkExecutor(CONTRACT, strategy)
    with serving(ToyPolicy()) as server, connect(server) as client:
        episode = run_realtime(client, world, executor, 3, dial=LatencyDial(60))
    assert episode.executor.chunks == episode.answer_delay_s.size > 2
    assert episode.drawn_latency_s.tolist() == pytest.approx([0.06] * len(episode.drawn_latency_s))
    assert episode.answer_delay_s.min() >= 0.06
    assert episode.action_age_s.min() >= 0.06


class BusyPolicy(InProcessPolicy):
    """Answers while it is asked, but every other time it is busy: in ``where``."""

    def __init__(self, where: str) -> None:
        super().__init__(NotingPolicy())
        self._where, self._answers = where, list[ActionChunk]()
        self.calls = 0

    def loan_images(self) -> dict[str, np.ndarray]:
        self._be_busy("loan_images")
        return {}

    def submit(self, obs: MetaObs) -> None:
        self._be_busy("submit")
        self._answers.append(self.infer(obs))

    def poll(self) -> ActionChunk | None:
        return self._answers.pop(0) if self._answers else None

    def _be_busy(self, where: str) -> None:
        if where == self._where:
            self.calls += 1
            if self.calls % 2 == 0:
                raise ServerBusy("all slots are taken")


@pytest.mark.parametrize(
    ("where", "latency_ms"), [("submit", 0.0), ("submit", 30.0), ("loan_images", 0.0)]
)
def test_a_busy_server_is_asked_again_at_the_next_tick(where: str, latency_ms: float) -> None:
    policy = BusyPolicy(where)
    world = FakeWorld(camera_hw={"top": (24, 32)}, max_timesteps=60)
    strategy = make_strategy("temporal_ensemble", chunk_size=CHUNK, n_action_steps=CHUNK, stride=4)
    executor = ChunkExecutor(CONTRACT, strategy)
    episode = run_realtime(policy, world, executor, 3, dial=LatencyDial(latency_ms))
    assert episode.horizon == 60
    assert policy.calls > 5
    assert episode.executor.chunks > 5
    assert episode.executor.starved_ticks == 0


def evaluate(folder: Path, *flags: str) -> dict[str, Any]:
    argv = [
        "-e",
        "fake",
        "--env.max_timesteps",
        "60",
        "-n",
        "3",
        "-o",
        str(folder),
        "--videos",
        "0",
    ]
    dial = ["--latency_ms", "50", "--latency_jitter_ms", "30", "--drop", "0.2"]
    assert status_of(eval_sim.main, [*argv, *dial, *flags]) == 0
    found: dict[str, Any] = json.loads((folder / "fake" / "fake.json").read_text())
    for entry in found["episodes"]:
        del entry["wall_s"]
    timing = {k: v for k, v in found["timing"].items() if k not in ("stages", "request")}
    return {"episodes": found["episodes"], "timing": timing, "success": found["success_rate"]}


def test_the_result_file_says_what_was_drawn(tmp_path: Path) -> None:
    result = evaluate(tmp_path, "-m", TOY)
    first = result["episodes"][0]
    assert 0.02 <= first["drawn_latency"]["p50"] <= 0.08
    assert result["timing"]["lost_observations"] > 0
    counts = [entry["drawn_latency"]["count"] for entry in result["episodes"]]
    assert result["timing"]["drawn_latency"]["count"] == sum(counts)
    with np.load(tmp_path / "fake" / "fake_samples.npz") as samples:
        assert samples["drawn_latency_s"].size == sum(counts)


@pytest.mark.long
def test_the_same_dial_is_the_same_evaluation_wherever_it_runs(tmp_path: Path) -> None:
    local = evaluate(tmp_path / "local", "-m", TOY)
    assert evaluate(tmp_path / "many", "-m", TOY, "--num_envs", "2") == local
    with ServerProcess(["-m", TOY]) as server:
        for transport in ("shm", "zmq"):
            for count in ("1", "2"):
                flags = ["-m", server.address, "--transport", transport, "--num_envs", count]
                assert evaluate(tmp_path / transport / count, *flags) == local
