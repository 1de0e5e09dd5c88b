"""Tests for every ``Robot``. A test module subclasses ``RobotBehaviour`` and provides ``robot``."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import numpy as np
import pytest

from robots.base import CameraSample, Outcome, Robot, Role
from robots.errors import NotConnected, RobotError, UnsafeCommand

PATIENCE_S = 20.0


def until(condition: Callable[[], bool]) -> None:
    """Poll until ``condition`` is true; how long that takes is not tested."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not true within {PATIENCE_S:g} s"
        time.sleep(0.002)


class RobotBehaviour:
    """Tests of the contract. The fixture ``robot`` returns a robot that is not connected."""

    MOVES = 0.05
    """Distance that joint 0 is commanded to move; ``NEAR`` is the tolerance."""
    NEAR = 0.02

    def test_limits_and_start_pose_fit_the_contract(self, robot: Robot) -> None:
        contract, limits = robot.contract, robot.limits
        assert robot.name
        assert len(limits) == contract.action_dim <= contract.state_dim
        assert len(set(contract.joint_names)) == contract.state_dim
        assert len(set(contract.action_names)) == contract.action_dim
        assert set(contract.depth_cameras) <= set(contract.cameras)
        assert 0 < contract.control_hz[0] < contract.control_hz[1]
        if robot.start_pose is not None:
            assert robot.start_pose.shape == (contract.action_dim,)
            assert robot.start_pose.dtype == np.float32
            assert limits.violations(robot.start_pose) == ()
        if robot.start_velocity is not None:
            assert robot.start_velocity.shape == (contract.action_dim,)
            assert (robot.start_velocity > 0).all()

    def test_every_method_raises_without_a_connection(self, robot: Robot) -> None:
        action = np.zeros(robot.contract.action_dim, np.float32)
        uses: list[Callable[[], object]] = [
            robot.get_joints,
            robot.get_cameras,
            robot.get_observation,
            lambda: robot.get_joints_at(0),
            lambda: robot.send_action(action),
            robot.outcome,
            lambda: robot.reset(0),
        ]
        for use in uses:
            with pytest.raises(NotConnected, match=r"not connected, expected to be connected as"):
                use()

    def test_a_robot_that_is_not_connected_can_be_pickled(self, robot: Robot) -> None:
        copy = pickle.loads(pickle.dumps(robot))
        assert copy.contract == robot.contract
        with copy:
            copy.connect()
            assert copy.get_joints().position.shape == (robot.contract.state_dim,)

    def test_observations_are_as_declared(self, robot: Robot) -> None:
        with robot:
            robot.connect()
            before_ns = time.monotonic_ns() - round(PATIENCE_S * 1e9)
            joints = robot.get_joints()
            assert joints.position.shape == (robot.contract.state_dim,)
            assert joints.position.dtype == np.float32
            assert np.isfinite(joints.position).all()
            assert before_ns < joints.received_ns <= time.monotonic_ns()
            cameras = robot.get_cameras()
            assert set(cameras) == set(robot.contract.cameras)
            for name, sample in cameras.items():
                _is_a_picture(sample, robot.contract.cameras[name])
                assert (sample.depth is not None) == (name in robot.contract.depth_cameras)
            obs = robot.get_observation()
            assert obs.state.shape == (robot.contract.state_dim,)
            assert set(obs.images) == set(robot.contract.cameras)
            assert set(obs.depth) == set(robot.contract.depth_cameras)
            assert before_ns < obs.t_capture_ns <= time.monotonic_ns()

    def test_samples_keep_arriving_and_stamps_increase(self, robot: Robot) -> None:
        with robot:
            robot.connect()
            first, shown = robot.get_joints(), robot.get_cameras()
            kept = {name: sample.image.copy() for name, sample in shown.items()}
            until(lambda: robot.get_joints().stamp_ns > first.stamp_ns)
            for name, sample in shown.items():
                until(lambda n=name, s=sample: robot.get_cameras()[n].stamp_ns > s.stamp_ns)
                # A returned image is not overwritten later.
                np.testing.assert_array_equal(sample.image, kept[name])

    def test_joints_are_those_nearest_to_the_requested_stamp(self, robot: Robot) -> None:
        with robot:
            robot.connect()
            first = robot.get_joints()
            # Two arms have stamps of their own: the state of both is not exactly of one.
            until(lambda: robot.get_joints().stamp_ns > first.stamp_ns + 50_000_000)
            newest, then = robot.get_joints(), robot.get_joints_at(first.stamp_ns)
            assert abs(then.stamp_ns - first.stamp_ns) < newest.stamp_ns - first.stamp_ns

    def test_each_role_allows_only_its_methods(self, robot: Robot) -> None:
        hold = np.zeros(robot.contract.action_dim, np.float32)
        with robot:
            robot.connect(Role.CONTROL)
            assert robot.get_joints().position.shape == (robot.contract.state_dim,)
            with pytest.raises(NotConnected, match=r"get_cameras: connected as control, expected"):
                robot.get_cameras()
        with robot:
            robot.connect(Role.SENSING)
            assert set(robot.get_cameras()) == set(robot.contract.cameras)
            with pytest.raises(NotConnected, match=r"send_action: connected as sensing, expected"):
                robot.send_action(hold)
            assert robot.reads_joints == robot.shareable
            if not robot.shareable:
                with pytest.raises(NotConnected, match="get_joints: connected as sensing"):
                    robot.get_joints()

    def test_connecting_twice_is_refused_and_reconnecting_works(self, robot: Robot) -> None:
        robot.disconnect()
        robot.connect()
        with pytest.raises(RobotError, match=r"connected already, as both"):
            robot.connect()
        robot.disconnect()
        robot.disconnect()
        assert robot.role is None
        with robot:
            robot.connect()
            robot.get_joints()

    def test_invalid_commands_are_refused(self, robot: Robot) -> None:
        dim = robot.contract.action_dim
        with robot:
            robot.connect()
            with pytest.raises(UnsafeCommand, match=rf"got shape \({dim + 1},\), expected \({dim}"):
                robot.send_action(np.zeros(dim + 1, np.float32))
            for bad in (np.nan, np.inf):
                action = np.zeros(dim, np.float32)
                action[-1] = bad
                name = robot.contract.action_names[dim - 1]
                with pytest.raises(UnsafeCommand, match=rf"{bad} for joint {dim - 1} \({name}\)"):
                    robot.send_action(action)

    def move(self, robot: Robot) -> Callable[[], bool]:
        """Command joint 0 to a target until it arrives; returns a check that it is still there."""
        target = robot.contract.rest_command(robot.get_joints().position)
        target[0] += self.MOVES
        measured = robot.contract.joint_names.index(robot.contract.action_names[0])

        def is_there() -> bool:
            return bool(abs(robot.get_joints().position[measured] - target[0]) < self.NEAR)

        def arrived() -> bool:
            robot.send_action(target)
            return is_there()

        assert self.MOVES > 2 * self.NEAR
        until(arrived)
        return is_there

    def test_a_commanded_joint_reaches_its_target(self, robot: Robot) -> None:
        with robot:
            robot.connect()
            robot.reset(0)
            self.move(robot)

    def test_position_is_held_after_disconnect(self, robot: Robot) -> None:
        """As after a rollout that ended normally: nothing drops or keeps moving."""
        with robot:
            robot.connect()
            robot.reset(0)
            is_there = self.move(robot)
            robot.disconnect()
            robot.connect()
            first_ns = robot.get_joints().stamp_ns

            def held_for_100_ms() -> bool:
                assert is_there()
                return robot.get_joints().stamp_ns > first_ns + 100_000_000

            until(held_for_100_ms)

    def test_reset_clears_the_outcome_and_restores_the_start_pose(self, robot: Robot) -> None:
        with robot:
            robot.connect()
            can_reset = robot.reset(0)
            outcome = robot.outcome()
            assert outcome is None or (can_reset and outcome[:2] == (False, 0.0))
            assert outcome is None or isinstance(outcome, Outcome)
            if can_reset and robot.start_pose is not None:
                position = robot.contract.rest_command(robot.get_joints().position)
                np.testing.assert_allclose(position, robot.start_pose, atol=0.05)


def _is_a_picture(sample: CameraSample, hw: tuple[int, int]) -> None:
    assert sample.image.shape == (*hw, 3)
    assert sample.image.dtype == np.uint8
    assert sample.image.flags.c_contiguous
    assert sample.image.max() > sample.image.min()
    assert sample.received_ns <= time.monotonic_ns()
    if sample.depth is not None:
        assert sample.depth.ndim == 2
        assert sample.depth.dtype in (np.uint16, np.float32)
