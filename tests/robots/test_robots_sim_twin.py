"""The simulated robot: one contract with the others, and what it does beyond."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from contracts.robot import RobotBehaviour, until

from envs.aloha_physics import AlohaSim
from robots.base import Role
from robots.errors import ConfigError, ConnectFailed, RobotError, RobotLost, SensorLost
from robots.factory import make_robot
from robots.sensor_memory import Sample
from robots.sim_twin import START_POSE, SimTwin

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"cameras": "{top: {camera: top, hw: [24, 32]}, side: {camera: angle, hw: [12, 16]}}"}


@pytest.fixture(scope="module")
def twin():
    """A twin whose simulator runs, shared by the tests of this module; each resets it."""
    robot = make_robot("sim_twin", SMALL)
    with robot.companion():
        yield robot


@pytest.fixture
def robot(twin):
    twin.disconnect()
    yield twin
    twin.disconnect()


class TestSimTwin(RobotBehaviour):
    @pytest.fixture
    def robot(self, robot):
        return robot


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def first_of_episode(robot: SimTwin) -> Sample:
    """The first state of the running episode, which began a moment ago."""
    joints, period_ns = robot._connected()[1].joints, round(1e9 / robot.config.control_hz)
    first = joints.newest()
    while (before := joints.nearest(first.stamp_ns - period_ns)).stamp_ns < first.stamp_ns:
        if before.arrays["episode"] != first.arrays["episode"]:
            return first
        first = before
    raise AssertionError("the episode's first state is not there any more")


def test_an_episode_begins_as_in_simulation_and_is_shown(robot: SimTwin) -> None:
    sim = AlohaSim("sim_transfer_cube", max_hw=(24, 32), shadows=False, msaa=0)
    robot.connect()
    for seed in (3, 2**32 - 1):
        assert robot.reset(seed)
        sim.reset(seed)
        first = first_of_episode(robot)
        assert first.arrays["step"] == 0
        np.testing.assert_array_equal(first.arrays["qpos"], sim.data.qpos)
        # The cube falls 3 cm and rests: from then on the pictures are the simulation's too.
        until(lambda: robot.outcome().steps > 50)
        stamp_ns = robot._connected()[1].joints.newest().stamp_ns
        until(lambda s=stamp_ns: robot.get_cameras()["top"].stamp_ns >= s)
        picture = robot.get_cameras()["top"]
        belonging = robot._connected()[1].joints.nearest(picture.stamp_ns)
        assert belonging.stamp_ns == picture.stamp_ns
        expected = sim.render_camera("top", hw=(24, 32), qpos=belonging.arrays["qpos"])
        np.testing.assert_array_equal(picture.image, expected)
        np.testing.assert_array_equal(
            robot.get_joints_at(picture.stamp_ns).position, belonging.arrays["position"]
        )
    sim.close()


def test_two_connections_share_the_simulator(robot: SimTwin, tmp_path: Path) -> None:
    """Sensing and control connect by the address alone, as their own processes do."""
    control = make_robot("sim_twin", {**SMALL, "address": robot.config.address})
    with robot as sensing, control:
        sensing.connect(Role.SENSING)
        control.connect(Role.CONTROL)
        control.reset(1)
        # Who looks at pictures sees the new episode in them by now, whoever reset it.
        began_ns = sensing.get_joints().stamp_ns - 10**9
        assert sensing.get_cameras()["top"].stamp_ns > began_ns
        sensing.clear_record()
        target = np.array(START_POSE, np.float32)
        target[7] = 0.1
        control.send_action(target)
        until(lambda: abs(sensing.get_joints().position[7] - 0.1) < 0.02)
        control.save_record(tmp_path / "record.npz")
        with np.load(tmp_path / "record.npz") as record:
            np.testing.assert_array_equal(record["command_action"], [target])
            assert record["command_arrived_ns"][0] > record["command_sent_ns"][0]
            # A stale command goes on: every later step has it for its target.
            after = record["step_began_ns"] > record["command_arrived_ns"][0]
            assert (record["step_target"][after] == target).all()
            assert (record["step_target"][~after] != target).any(axis=1).all()
            # Deadlines are absolute.
            period_ns = round(1e9 / control.config.control_hz)
            np.testing.assert_array_equal(np.diff(record["step_due_ns"]) % period_ns, 0)
            assert (record["step_began_ns"] >= record["step_due_ns"]).all()
            assert np.abs(record["step_velocity"][:, 7]).max() > 0.1


def test_the_scripted_expert_succeeds_in_real_time(robot: SimTwin) -> None:
    """Open loop, so a command late by a fraction of a tick is all that may differ."""
    from envs.scripted_expert import plan_episode

    sim = AlohaSim("sim_transfer_cube")
    sim.reset(11)
    plan = plan_episode(sim)
    sim.close()
    with robot:
        robot.connect()
        robot.reset(11)
        began_s = time.monotonic()
        while not robot.outcome().success:
            tick = int((time.monotonic() - began_s) / 0.02)
            assert tick < 800, robot.outcome()
            robot.send_action(plan[min(tick, 399)])
            time.sleep(0.002)
        outcome = robot.outcome()
        assert outcome.reward == 4.0
        assert 200 < outcome.steps < 450
        until(lambda: robot.get_joints().received_ns > 0)
        assert robot.outcome().steps == outcome.steps  # of the success, not of now


def test_invalid_calls_are_refused_with_a_reason(robot: SimTwin, tmp_path: Path) -> None:
    with robot:
        robot.connect()
        with pytest.raises(RobotError, match=r"the simulator refuses: seed: got -1, expected 0 to"):
            robot.reset(-1)
        with pytest.raises(RobotError, match=r"refuses: .*No such file"):
            robot.save_record(tmp_path / "nowhere" / "record.npz")
        robot.get_joints()  # and goes on


def test_a_client_of_other_cameras_is_refused(robot: SimTwin) -> None:
    bigger = {"cameras": "{top: {camera: top, hw: [240, 320]}}", "address": robot.config.address}
    with pytest.raises(ConnectFailed, match=r"the simulator has other joints or cameras \(segment"):
        make_robot("sim_twin", bigger).connect()


def test_nothing_is_rendered_without_camera_clients(robot: SimTwin) -> None:
    robot.connect(Role.CONTROL)
    robot.reset(0)
    frames = robot._connected()[1].cameras["top"]
    until(lambda: robot._connected()[1].camera_clients.load() == 0)
    steps, drawn = robot.outcome().steps, frames.count
    until(lambda: robot.outcome().steps > steps + 20)
    assert frames.count <= drawn + 1  # one may have been under way


def test_cameras_may_be_called_as_the_twins_own_fields() -> None:
    names = ("joints", "image", "a/b", "used")
    cameras = {name: {"camera": "top", "hw": [12, 16]} for name in names}
    robot = make_robot("sim_twin", {"cameras": json.dumps(cameras)})
    with robot.companion(), robot:
        robot.connect(Role.BOTH, 30)
        assert {n: s.image.shape for n, s in robot.get_cameras().items()} == dict.fromkeys(
            names, (12, 16, 3)
        )
        assert robot.get_joints().position.shape == (14,)


def test_connecting_without_a_simulator_fails() -> None:
    with pytest.raises(
        ConnectFailed, match=r"expected connect\(\) to be within companion\(\), or its"
    ):
        make_robot("sim_twin").connect()
    with pytest.raises(ConnectFailed, match=r"simulator does not answer at 'nowhere' within 1 s"):
        make_robot("sim_twin", {"address": "nowhere"}).connect(timeout_s=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task": "sim_fold"}, r"robots.twin_owner_process: task: got 'sim_fold', expected one of"),
        ({"cameras": "{top: {camera: ceiling, hw: [8, 8]}}"}, r"camera: got 'ceiling', expected"),
    ],
)
def test_a_simulator_that_cannot_start_says_why(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConnectFailed, match=message), make_robot("sim_twin", overrides).companion():
        pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"control_hz": "60"}, r"control_hz: got 60, expected a divisor of 500"),
        ({"camera_hz": "0"}, r"camera_hz: got 0.0, expected 0.01 to 10000"),
        (
            {"cameras": "{top: {camera: top, hw: [0, 8]}}"},
            r"cameras.top.hw\[0\]: got 0, expected 1 to 8192",
        ),
        ({"limits.velocity": "[1, 1]"}, r"limits.velocity: got 2 numbers, expected 7"),
        ({"limits.position_lower": "[9, 0, 0, 0, 0, 0, 0]"}, r"joint 0 \(left_waist\): got pos"),
        ({"start_velocity": "[1]"}, r"start_velocity: got \(1.0,\), expected 7 positive"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_robot("sim_twin", overrides)


def says_lost(use: Callable[[], object]) -> bool:
    try:
        use()
    except RobotLost as error:
        assert re.search(r"simulator has ended|does not answer", str(error))
        return True
    return False


def test_a_stopped_simulator_is_a_lost_sensor_and_a_dead_one_a_lost_robot() -> None:
    robot = make_robot("sim_twin", {**SMALL, "sensor_timeout_s": "0.2"})
    with robot.companion(), robot:
        robot.connect()
        pid = robot.owner_pid

        def lost() -> bool:
            try:
                robot.get_joints()
            except SensorLost as error:
                assert re.search(r"joints: nothing new for [0-9.]+ s", str(error))
                return True
            return False

        os.kill(pid, signal.SIGSTOP)
        until(lost)
        os.kill(pid, signal.SIGCONT)
        until(lambda: not lost())
        camera = children(pid)[0]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid) and not alive(camera))
        for use in (
            robot.get_joints,
            robot.get_cameras,
            robot.outcome,
            lambda: robot.reset(0),
            lambda: robot.send_action(np.zeros(14, np.float32)),
        ):
            # The news is a socket that hangs up; it may come a moment after the death.
            until(lambda use=use: says_lost(use))


def test_the_simulator_ends_with_its_render_process() -> None:
    robot = make_robot("sim_twin", SMALL)
    with robot.companion(), robot:
        robot.connect()
        pid = robot.owner_pid
        os.kill(children(pid)[0], signal.SIGKILL)
        until(lambda: not alive(pid))
        with pytest.raises(RobotLost):
            robot.get_cameras()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_simulator_ends_with_its_parent(stopped: bool) -> None:
    code = (
        "import os, sys; from robots.factory import make_robot\n"
        f"r = make_robot('sim_twin', {SMALL!r})\n"
        "with r.companion():\n"
        "    r.connect(); print(r.owner_pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        family = [pid, *children(pid)]
        assert len(family) == 2
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        until(lambda: not any(alive(member) for member in family))
