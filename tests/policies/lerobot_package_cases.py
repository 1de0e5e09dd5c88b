"""``lerobot:`` against LeRobot's own loop; run by an interpreter that has ``lerobot``.

``test_policies_lerobot_package.py`` starts it.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot_package_checkpoints import CAMERAS, make_checkpoint

from envs.fake_world import FakeWorld
from policies.checkpoint.load import load_policy
from policies.errors import CheckpointError
from policies.types import ActionChunk, MetaObs, RolloutPolicy, SamplingPolicy
from runtime.client import PolicyClient
from runtime.control.chunk_executor import ChunkExecutor
from runtime.control.observation_history import stack_ticks
from runtime.control.strategy_selection import choose_execution, strategy_of
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.episode import run_lockstep
from runtime.eval_sim.in_process_policy import InProcessPolicy
from runtime.server import PolicyServer

KINDS = ("act", "diffusion", "vqbet")
TICKS, SEEDS = 20, (5, 6)


class RecordingWorld(FakeWorld):
    """Keeps the commands; with a barrier, several worlds step in turn."""

    def __init__(self, cameras: Any, barrier: threading.Barrier | None = None) -> None:
        super().__init__(camera_hw=cameras, max_timesteps=TICKS)
        self.commands: list[np.ndarray] = []
        self._barrier = barrier

    def step(self, action: np.ndarray) -> Any:
        self.commands.append(np.array(action))
        if self._barrier is not None:
            self._barrier.wait(60)
        return super().step(action)


class LerobotLoop:
    """LeRobot's own loop: ``select_action`` once per tick."""

    def __init__(self, folder: Path) -> None:
        config = PreTrainedConfig.from_pretrained(str(folder))
        self.policy = get_policy_class(config.type).from_pretrained(str(folder), config=config)
        self.before, self.after = make_pre_post_processors(config, str(folder))

    def commands(self, cameras: Any, seed: int) -> np.ndarray:
        world = RecordingWorld(cameras)
        world.reset(seed)
        self.policy.reset()
        torch.manual_seed(seed)
        for _ in range(TICKS):
            world.step(self._action(world.observe()))
        return np.array(world.commands)

    def _action(self, obs: MetaObs) -> np.ndarray:
        batch: dict[str, Any] = {
            f"observation.images.{name}": torch.tensor(image).permute(2, 0, 1)[None].float() / 255
            for name, image in obs.images.items()
        }
        batch["observation.state"] = torch.tensor(obs.state)[None]
        with torch.inference_mode():
            action = self.after(self.policy.select_action(self.before(batch)))
        return action[0].numpy()


def play(policy: RolloutPolicy, world: RecordingWorld, seed: int) -> np.ndarray:
    """The commands of a whole episode of eval_sim in lockstep."""
    contract = policy.contract
    execution = choose_execution(contract, None, None, None)
    run_lockstep(policy, world, ChunkExecutor(contract, strategy_of(contract, execution)), seed)
    return np.array(world.commands)


@contextlib.contextmanager
def serving(policy: Any) -> Iterator[str]:
    with PolicyServer(policy) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield f"{server.host}:{server.port}"
        finally:
            server.stop("the test is over")
            thread.join()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(kind, tmp_path_factory.mktemp("lerobot") / kind)


def load(folder: Path, **options: Any) -> Any:
    return load_policy(f"lerobot:{folder}", fps=50, threads=1, **options)


def test_whole_episodes_are_those_of_lerobots_own_loop(folder: Path) -> None:
    policy = load(folder)
    cameras = {camera.name: camera.model_hw for camera in policy.contract.cameras}
    reference = LerobotLoop(folder)
    for seed in SEEDS:
        expected = reference.commands(cameras, seed)
        got = play(InProcessPolicy(policy), RecordingWorld(cameras), seed)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the episode is not one command repeated


def test_two_interleaved_sessions_have_each_the_episode_of_its_own_seed(folder: Path) -> None:
    policy = load(folder)
    cameras = {camera.name: camera.model_hw for camera in policy.contract.cameras}
    reference = LerobotLoop(folder)
    expected = {seed: reference.commands(cameras, seed) for seed in SEEDS}
    barrier = threading.Barrier(len(SEEDS))
    played: dict[int, np.ndarray] = {}

    def run(address: str, seed: int) -> None:
        with PolicyClient(address, timeout_s=60) as client:
            played[seed] = play(client, RecordingWorld(cameras, barrier), seed)

    with serving(policy) as address:
        threads = [threading.Thread(target=run, args=(address, seed)) for seed in SEEDS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in SEEDS:
        np.testing.assert_allclose(played[seed], expected[seed], rtol=0, atol=1e-5)


def observation(policy: Any, shade: int = 100) -> MetaObs:
    contract = policy.contract
    images = {c.name: np.full((*c.model_hw, 3), shade, np.uint8) for c in contract.cameras}
    one = MetaObs(images=images, state=np.zeros(contract.state_dim, np.float32), timestep=3)
    return stack_ticks([one] * contract.n_obs_steps)


def same(one: ActionChunk, other: ActionChunk) -> bool:
    return one.actions.tobytes() == other.actions.tobytes()


def test_noise_is_a_sessions_own(kind: str, folder: Path) -> None:
    policy = load(folder)
    if kind == "act":
        assert policy.fork() is policy and not isinstance(policy, SamplingPolicy)
        return
    assert isinstance(policy, SamplingPolicy)
    obs, one, other = observation(policy), policy.fork(), policy.fork()
    one.seed(7)
    first, second = one.infer(obs), one.infer(obs)
    assert not same(first, second)
    one.seed(7)
    before = torch.get_rng_state()
    again = one.infer(obs)
    assert not same(other.infer(obs), first)
    torch.rand(10)
    assert same(again, first) and same(one.infer(obs), second)
    torch.set_rng_state(before)
    one.infer(obs)
    assert torch.equal(torch.get_rng_state(), before)  # the process's own stream is left alone


def test_the_commands_run_it(folder: Path, tmp_path: Path) -> None:
    for flags in ([], ["--realtime"]):
        status = eval_sim.main([
            "-m", f"lerobot:{folder}", "-e", "fake", "--fps", "50", "-n", "1", "--videos", "0",
            "--env.max_timesteps", "10", "-o", str(tmp_path), *flags,
        ])  # fmt: skip
        assert status == 0
        (result,) = (tmp_path / "fake").glob("*.json")
        assert json.loads(result.read_text())["episodes"][0]["horizon"] == 10


def test_chunks_are_cut_and_a_rate_is_taken(folder: Path) -> None:
    policy = load(folder, chunk_size=3)
    assert policy.contract.chunk_size == 3 and policy.contract.n_action_steps == 3
    assert policy.infer(observation(policy)).actions.shape == (3, 14)
    assert policy.contract.dt_s == 0.02 and not policy.contract.assumes_rate


def test_our_own_engine_computes_the_same_for_act(full_width: None, tmp_path: Path) -> None:
    folder = make_checkpoint("act", tmp_path / "act")
    theirs, ours = load(folder), load_policy(str(folder), engine="torch", precision="fp32", fps=50)
    assert (ours.contract.camera_names, tuple(CAMERAS)) == (theirs.contract.camera_names,) * 2
    assert ours.contract.execution == theirs.contract.execution
    for shade in (0, 100, 255):
        obs = observation(theirs, shade)
        expected = theirs.infer(obs).actions
        np.testing.assert_allclose(ours.infer(obs).actions, expected, rtol=0, atol=1e-4)


def test_weights_that_do_not_fit_are_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint("act", tmp_path / "act")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dim_model": 64', '"dim_model": 32'))
    with pytest.raises(CheckpointError, match="LeRobot cannot load it"):
        load(folder)
