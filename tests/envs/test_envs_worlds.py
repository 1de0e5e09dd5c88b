"""Every world under the one contract, and what is particular to each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from contracts.world import WorldContract
from gymnasium import spaces

from envs.aloha_world import AlohaWorld
from envs.config import EnvConfig, GymKeys
from envs.errors import EnvError, UnknownCamera
from envs.factory import load_env_config, make_world
from envs.fake_world import FakeWorld
from envs.gym_world import GymWorld
from policies.types import CameraContract, Rendering
from policies.yaml_config import InvalidConfig

ROOT = Path(__file__).resolve().parents[2]
FAST = Rendering(shadows=False, msaa=0)


class Dots(gymnasium.Env[Any, Any]):
    """A point in the plane, with a picture; the observation is a nested dictionary."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012
    observation_space = spaces.Dict(
        {
            "pixels": spaces.Dict(
                {name: spaces.Box(0, 255, (12, 16, 3), np.uint8) for name in ("eye", "hand")}
            ),
            "pos": spaces.Box(-100, 100, (2,), np.float64),
            "goal": spaces.Box(0, 1, (1,), np.float64),
        }
    )
    action_space = spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.uniform(0, 1, 2)
        return self._observation(), {}

    def step(self, action):
        self.point = self.point + 0.1 * action
        far = float(np.abs(self.point).max())
        return self._observation(), far, False, False, {"won": far > 100}

    def render(self):
        return self._observation()["pixels"]["eye"]

    def _observation(self):
        picture = np.full((12, 16, 3), int(self.point[0] * 50) % 256, np.uint8)
        return {
            "pixels": {"eye": picture, "hand": 255 - picture},
            "pos": self.point,
            "goal": np.ones(1),
        }


gymnasium.register("metronome-tests/Dots-v0", entry_point=Dots)
DOTS = EnvConfig(
    kind="gym",
    task="metronome-tests/Dots-v0",
    max_timesteps=8,
    gym=GymKeys(state=("pos", "goal"), images={"top": "pixels.eye"}, success="won"),
)


class TestFakeWorld(WorldContract):
    @pytest.fixture
    def world(self):
        with_two = {"top": (24, 32), "wrist": (12, 16)}
        return FakeWorld(camera_hw=with_two, max_timesteps=8, language="do it")

    def test_commanding_the_target_succeeds_and_the_start_does_not(self, world) -> None:
        for seed in range(5):
            world.reset(seed)
            start = world.observe().state
            assert not world.step(start).success
            results = [world.step(world.target.astype(np.float32)) for _ in range(7)]
            assert results[-1].success
            assert results[-1].reward == 4.0

    def test_pictures_depend_on_seed_state_and_camera(self, world) -> None:
        def picture(seed: int, steps: int, camera: str) -> bytes:
            world.reset(seed)
            for _ in range(steps):
                world.step(world.target.astype(np.float32))
            small = {name: np.zeros((24, 32, 3), np.uint8) for name in world.camera_names}
            return world.observe(small).images[camera].tobytes()

        seen = {picture(s, n, c) for s in (0, 1) for n in (0, 5) for c in ("top", "wrist")}
        assert len(seen) == 8

    def test_it_needs_neither_mujoco_nor_gymnasium(self) -> None:
        code = (
            "import sys; from envs.factory import *; w = make_world(load_env_config('fake')); "
            "w.observe(); print('mujoco' in sys.modules, 'gymnasium' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["False", "False"]


class TestAlohaWorld(WorldContract):
    @pytest.fixture
    def world(self):
        made = AlohaWorld(
            task="sim_transfer_cube",
            camera_hw={"primary": (24, 32), "angle": (12, 16)},
            camera_map={"primary": "top"},
            rendering=FAST,
            max_timesteps=8,
        )
        yield made
        made.close()

    def test_mapped_cameras_show_what_the_models_show(self, world) -> None:
        world.reset(5)
        obs = world.observe()
        np.testing.assert_array_equal(
            obs.images["primary"], world.sim.render_camera("top", hw=(24, 32))
        )
        np.testing.assert_array_equal(world.frame(), obs.images["primary"])

    def test_a_frame_after_a_step_is_new(self, world) -> None:
        world.reset(5)
        world.observe()
        before = world.frame()
        for _ in range(8):
            world.step(np.full(14, 0.5, np.float32))
        assert not np.array_equal(world.frame(), before)

    def test_a_smooth_video_leaves_the_policys_pictures_as_they_are(self) -> None:
        options = {"task": "sim_transfer_cube", "camera_hw": {"top": (24, 32)}, "rendering": FAST}
        plain = AlohaWorld(**options)
        filmed = AlohaWorld(**options, video_camera="angle", video_hw=(48, 64))
        try:
            filmed.reset(1)
            first = filmed.frame()
            assert first.shape == (48, 64, 3)
            plain.reset(1)
            seen, expected = filmed.observe(), plain.observe()
            np.testing.assert_array_equal(seen.images["top"], expected.images["top"])
            then = filmed.snapshot()
            filmed.step(np.full(14, 0.5, np.float32))
            np.testing.assert_array_equal(filmed.frame(then), first)
        finally:
            plain.close()
            filmed.close()

    def test_success_is_the_reward_that_was_asked_for(self) -> None:
        world = AlohaWorld(task="sim_insertion", camera_hw={}, success_reward=0.0)
        result = world.step(world.sim.agent_pos.astype(np.float32))
        assert (result.reward, result.success, result.terminated) == (0.0, True, True)
        world.close()


class TestGymWorld(WorldContract):
    @pytest.fixture
    def world(self):
        made = make_world(DOTS)
        yield made
        made.close()

    def test_keys_are_mapped(self, world) -> None:
        world.reset(0)
        obs = world.observe()
        assert obs.state[2] == 1.0
        assert world.dt_s == 1 / 25
        assert world.camera_hw == {"top": (12, 16)}

    def test_a_contract_of_another_size_is_refused(self) -> None:
        camera = CameraContract("top", (24, 32), (24, 32))
        with pytest.raises(EnvError, match=r"images.top: got \(12, 16\) .* expected \(24, 32\)"):
            make_world(DOTS, cameras=[camera])


TWO_EYES = replace(
    DOTS, gym=replace(DOTS.gym, images={"left": "pixels.eye", "right": "pixels.hand"})
)


@pytest.mark.parametrize("config", [TWO_EYES, load_env_config("fake")], ids=["gym", "fake"])
def test_a_mapped_camera_shows_the_picture_of_the_camera_it_is_mapped_to(
    config: EnvConfig,
) -> None:
    def pictures(names: Sequence[str], camera_map: Mapping[str, str]) -> dict[str, np.ndarray]:
        cameras = [CameraContract(name, (12, 16), (12, 16)) for name in names]
        world = make_world(replace(config, camera_map=camera_map), cameras=cameras)
        world.reset(3)
        shown = {name: image.copy() for name, image in world.observe().images.items()}
        world.close()
        return shown

    own = pictures(("left", "right"), {})
    assert not np.array_equal(own["left"], own["right"])
    mapped = pictures(("primary", "right"), {"primary": "left", "right": "left"})
    np.testing.assert_array_equal(mapped["primary"], own["left"])
    np.testing.assert_array_equal(mapped["right"], own["left"])


def test_a_camera_that_a_gym_world_does_not_have_cannot_be_mapped_to() -> None:
    camera = CameraContract("primary", (12, 16), (12, 16))
    with pytest.raises(EnvError, match=r"cameras: got \['back'\], expected some of \['left', 'rig"):
        make_world(replace(TWO_EYES, camera_map={"primary": "back"}), cameras=[camera])


def test_gym_errors_name_the_key_and_the_choices() -> None:
    def build(**keys: Any) -> GymWorld:
        config = EnvConfig(kind="gym", task="metronome-tests/Dots-v0", gym=GymKeys(**keys))
        return GymWorld(config, dict.fromkeys(config.gym.images))

    with pytest.raises(EnvError, match=r"gym.state: got no keys, expected some of \['pixels', "):
        build()
    with pytest.raises(EnvError, match=r"'pos.x', expected 'x' to be in a ndarray"):
        build(state=("pos.x",))
    with pytest.raises(EnvError, match=r"'eye', expected 'eye' to be in \['pixels', 'pos'"):
        build(state=("pos",), images={"top": "eye"})
    world = build(state=("pos",), success="victory")
    with pytest.raises(EnvError, match=r"gym.success: got 'victory', expected one of \['won'\]"):
        world.step(np.zeros(2, np.float32))
    with pytest.raises(EnvError, match=r"gym:Nothing-v0: "):
        make_world(EnvConfig(kind="gym", task="Nothing-v0"))
    camera = CameraContract("top", (24, 32), (24, 32))
    config = load_env_config("gym:metronome-tests/Dots-v0", {"gym.state": "[pos]"})
    with pytest.raises(EnvError, match=r"cameras: got \['top'\].*render\(\)"):
        make_world(config, cameras=[camera])


def test_a_discrete_action_is_the_largest_ones_index() -> None:
    world = make_world(load_env_config("gym:CartPole-v1"))
    assert (world.action_dim, world.state_dim, world.camera_names) == (2, 4, ())
    world.reset(0)
    world.step(np.array([0.0, 1.0], np.float32))
    assert world.observe().state[1] > 0.1  # pushed to the right
    world.close()


def test_the_contract_decides_unless_the_user_did() -> None:
    cameras = [
        CameraContract("primary", (24, 32), (24, 32)),
        CameraContract("angle", (6, 8), (6, 8)),
    ]
    world = make_world(load_env_config("aloha"), cameras=cameras, rendering=FAST)
    assert world.camera_hw == {"primary": (24, 32), "angle": (6, 8)}
    assert (world.max_timesteps, world.task) == (400, "sim_transfer_cube")
    info = world.info()
    assert (info["shadows"], info["msaa"]) == (False, 0)
    assert info["cameras"]["primary"] == {"camera": "top", "hw": [24, 32]}
    world.close()
    overrides = {
        "task": "sim_insertion_scripted",
        "cameras": "[primary]",
        "image_hw": "[12, 16]",
        "msaa": "4",
        "max_timesteps": "5",
        "camera_map.primary": "angle",
    }
    world = make_world(load_env_config("aloha", overrides), cameras=cameras, rendering=FAST)
    assert world.camera_hw == {"primary": (12, 16)}
    assert (world.max_timesteps, world.task) == (5, "sim_insertion")
    info = world.info()
    assert (info["shadows"], info["msaa"]) == (False, 4)
    assert info["cameras"]["primary"]["camera"] == "angle"
    world.close()


def test_without_a_contract_it_looks_like_gym_aloha() -> None:
    world = make_world(load_env_config("aloha"))
    assert world.camera_hw == {"top": (480, 640)}
    assert world.sim._shadows
    assert world.sim._msaa == 4
    world.close()


def test_unknown_names_are_errors_that_list_the_choices() -> None:
    camera = CameraContract("front", (24, 32), (24, 32))
    with pytest.raises(UnknownCamera, match=r"got 'front', expected some of \[.*'top'.*primary"):
        make_world(load_env_config("aloha"), cameras=[camera])
    with pytest.raises(InvalidConfig, match=r"env configuration 'alhoa'.*'aloha', 'fake', 'gym'"):
        load_env_config("alhoa")
    with pytest.raises(InvalidConfig, match=r"task configuration 'sim_fold'.*'sim_insertion'"):
        make_world(load_env_config("aloha", {"task": "sim_fold"}))
    with pytest.raises(InvalidConfig, match=r"aloha.yaml: shadow: unknown key.*mean 'shadows'"):
        load_env_config("aloha", {"shadow": "true"})
    with pytest.raises(EnvError, match=r"dt_s: got 0.1, expected 0.02"):
        make_world(load_env_config("aloha", {"dt_s": "0.1"}))
