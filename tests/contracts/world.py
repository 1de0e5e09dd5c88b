"""What every ``World`` does. A test module subclasses ``WorldContract`` and provides ``world``."""

from __future__ import annotations

import json

import numpy as np
import pytest

from envs.errors import EnvError
from envs.world import World


class WorldContract:
    """``world``: a fixture giving a fresh world with at least one camera."""

    def actions(self, world: World, count: int) -> np.ndarray:
        generator = np.random.default_rng(0)
        return generator.uniform(-0.5, 0.5, (count, world.action_dim)).astype(np.float32)

    def test_it_is_a_world(self, world: World) -> None:
        assert isinstance(world, World)
        assert world.dt_s > 0
        assert set(world.camera_hw) == set(world.camera_names)

    def test_observations_are_as_declared(self, world: World) -> None:
        world.reset(1)
        obs = world.observe()
        assert obs.state.shape == (world.state_dim,)
        assert obs.state.dtype == np.float32
        assert tuple(obs.images) == world.camera_names
        for name, picture in obs.images.items():
            assert picture.shape == (*world.camera_hw[name], 3)
            assert picture.dtype == np.uint8
            assert picture.flags.c_contiguous
        assert obs.raw_lang == world.language
        assert obs.t_capture_ns > 0

    def test_equal_seeds_and_actions_give_equal_episodes(self, world: World) -> None:
        def play() -> list[object]:
            world.reset(7)
            record: list[object] = []
            for action in self.actions(world, 5):
                obs = world.observe()
                record += [obs.state.tolist(), *(p.tobytes() for p in obs.images.values())]
                record.append(world.step(action))
            return record

        assert play() == play()

    def test_rendering_does_not_change_what_happens(self, world: World) -> None:
        def play(*, look: bool) -> list[float]:
            world.reset(3)
            for action in self.actions(world, 5):
                if look:
                    world.observe()
                    world.frame()
                world.step(action)
            return world.observe().state.tolist()

        assert play(look=True) == play(look=False)

    def test_pictures_go_into_the_given_arrays(self, world: World) -> None:
        world.reset(2)
        expected = world.observe().images
        slots = {name: np.zeros((*hw, 3), np.uint8) for name, hw in world.camera_hw.items()}
        obs = world.observe(slots)
        for name, slot in slots.items():
            assert obs.images[name] is slot
            np.testing.assert_array_equal(slot, expected[name])

    def test_timesteps_count_from_the_reset_and_truncate(self, world: World) -> None:
        for seed in (0, 1):
            world.reset(seed)
            assert world.observe().timestep == 0
            result = world.step(self.actions(world, 1)[0])
            assert world.observe().timestep == 1
            assert not result.truncated
        world.reset(0)
        for _ in range(world.max_timesteps):
            result = world.step(self.actions(world, 1)[0])
            if result.terminated:
                pytest.skip("the episode ended by itself")
        assert result.truncated

    def test_the_highest_reward_is_of_this_episode(self, world: World) -> None:
        world.reset(0)
        rewards = []
        for action in self.actions(world, 5):
            result = world.step(action)
            rewards.append(result.reward)
            assert result.highest_reward == max(rewards)

    def test_a_frame_is_a_picture_and_stays_as_it_was(self, world: World) -> None:
        world.reset(4)
        world.observe()
        frame = world.frame()
        assert frame.ndim == 3
        assert frame.dtype == np.uint8
        kept = frame.copy()
        for action in self.actions(world, 3):
            world.step(action)
        world.frame()
        np.testing.assert_array_equal(frame, kept)

    def test_wrong_actions_are_refused(self, world: World) -> None:
        world.reset(0)
        with pytest.raises(EnvError, match=rf"expected \({world.action_dim},\)"):
            world.step(np.zeros(world.action_dim + 1, np.float32))
        with pytest.raises(EnvError, match="finite"):
            world.step(np.full(world.action_dim, np.nan, np.float32))

    def test_info_is_plain_json(self, world: World) -> None:
        assert json.loads(json.dumps(world.info()))["task"] == world.task

    def test_close_is_idempotent(self, world: World) -> None:
        world.close()
        world.close()

    def test_an_observation_snapshot_is_the_observation_of_its_moment(self, world: World) -> None:
        world.reset(3)
        for action in self.actions(world, 3):
            world.step(action)
        then, seen = world.observation_snapshot(), world.observe()
        seen_images = {name: image.copy() for name, image in seen.images.items()}
        for action in self.actions(world, 3):
            world.step(action)
        now = world.observe()
        recorded = world.observe_snapshot(then)
        np.testing.assert_array_equal(recorded.state, seen.state)
        assert recorded.objects.shape == (len(world.object_pose_names),)
        assert recorded.objects.dtype == np.float32
        assert tuple(recorded.images) == world.camera_names
        after = world.observe()
        np.testing.assert_array_equal(after.state, now.state)
        for name in now.images:
            np.testing.assert_array_equal(recorded.images[name], seen_images[name])
            np.testing.assert_array_equal(after.images[name], now.images[name])

    def test_a_snapshot_shows_its_own_moment_and_leaves_the_present_alone(self, world) -> None:
        world.reset(3)
        then, shown = world.snapshot(), world.frame()
        for _ in range(3):
            world.step(np.full(world.action_dim, 0.5, np.float32))
        now = world.observe()
        np.testing.assert_array_equal(world.frame(then), shown)
        after = world.observe()
        np.testing.assert_array_equal(after.state, now.state)
        for name in now.images:
            np.testing.assert_array_equal(after.images[name], now.images[name])
