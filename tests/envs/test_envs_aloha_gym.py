"""The registered environments keep gymnasium's rules and gym-aloha's keys."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.aloha_gym import AlohaEnv
from envs.errors import EnvError, UnknownCamera

IDS = ("metronome/AlohaTransferCube-v0", "metronome/AlohaInsertion-v0")
SMALL = {"height": 48, "width": 64, "shadows": False, "msaa": 0}


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker_is_content(name: str) -> None:
    env = gymnasium.make(name, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_observations_have_gym_alohas_keys(name: str) -> None:
    env = gymnasium.make(name, cameras=["top", "left_wrist"], **SMALL)
    observation, info = env.reset(seed=1)
    assert list(observation) == ["pixels", "agent_pos"]
    assert {k: (v.shape, v.dtype) for k, v in observation["pixels"].items()} == {
        "top": ((48, 64, 3), np.uint8),
        "left_wrist": ((48, 64, 3), np.uint8),
    }
    assert observation["agent_pos"].shape == (14,)
    assert info == {"is_success": False}
    assert not np.array_equal(observation["pixels"]["top"], observation["pixels"]["left_wrist"])
    _, reward, terminated, truncated, info = env.step(observation["agent_pos"].astype(np.float32))
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"is_success": False})
    env.close()


def test_lazy_pixels_render_only_when_asked() -> None:
    env = AlohaEnv(lazy_pixels=True, **SMALL)
    observation, _ = env.reset(seed=1)
    assert list(observation) == list(env.observation_space.spaces) == ["agent_pos"]
    assert env.sim._renderer is None
    slot = np.zeros((48, 64, 3), np.uint8)
    assert env.render_camera("angle", out=slot) is slot
    assert slot.any()
    env.close()
    env.close()


def test_unseeded_resets_follow_from_the_last_seed() -> None:
    def places(seed: int) -> list[float]:
        env = AlohaEnv(lazy_pixels=True)
        env.reset(seed=seed)
        found = []
        for _ in range(3):
            found.append(float(env.sim.object_qpos[0]))
            env.reset()
        env.close()
        return found

    assert places(1) == places(1)
    assert len(set(places(1))) == 3


def test_the_episode_is_truncated_after_max_episode_steps() -> None:
    env = gymnasium.make(IDS[0], max_episode_steps=3, lazy_pixels=True)
    env.reset(seed=0)
    action = env.unwrapped.sim.agent_pos.astype(np.float32)
    assert [env.step(action)[3] for _ in range(3)] == [False, False, True]
    env.close()


def test_errors_list_the_choices() -> None:
    with pytest.raises(UnknownCamera, match=r"got 'topp', expected some of \[.*'top'.*'right_wri"):
        AlohaEnv(cameras=["topp"])
    with pytest.raises(EnvError, match="cameras: got 'top', expected a list"):
        AlohaEnv(cameras="top")
    with pytest.raises(EnvError, match="render_mode: got 'human', expected 'rgb_array' or None"):
        AlohaEnv(render_mode="human")
