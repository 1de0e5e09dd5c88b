"""The adapter, over a package that is shaped like LeRobot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from contracts.robot import RobotBehaviour

from robots.errors import ConfigError, ConnectFailed, ContractViolated, RobotLost, SensorLost
from robots.factory import make_robot
from robots.lerobot_adapter import LeRobotRobot

FAKE = Path(__file__).with_name("fake_lerobot")
FILE = """
type: lerobot:arm_v2_follower
name: little_arm
args:
  robot: {port: /dev/arm}
  limits:
    position_lower: [-90, -90, 0]
    position_upper: [90, 90, 100]
    velocity: [60, 60, 200]
    acceleration: [300, 300, 1000]
  start_pose: [0, 0, 0]
  cameras: {top: front, wrist: side}
"""
Make = Callable[..., LeRobotRobot]


def imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("lerobot", "draccus")]


@pytest.fixture
def make(monkeypatch, tmp_path: Path):
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(FAKE)
    path = tmp_path / "arm.yaml"
    path.write_text(FILE)
    yield lambda **overrides: make_robot(str(path), overrides)
    for name in imported():
        del sys.modules[name]


class TestLeRobot(RobotBehaviour):
    @pytest.fixture
    def robot(self, make: Make):
        with make() as made:
            yield made

    def test_commands_come_first_then_what_is_only_seen(self, robot: LeRobotRobot) -> None:
        contract = robot.contract
        assert contract.joint_names == (
            "shoulder.pos", "elbow.pos", "gripper.pos", "temperature")  # fmt: skip
        assert [spec.kind for spec in contract.actions] == ["position", "position", "gripper"]
        assert contract.cameras == {"top": (24, 32), "wrist": (8, 8)}
        assert not robot.shareable
        robot.connect()
        robot.send_action(np.array([1.0, 2.0, 3.0], np.float32))
        np.testing.assert_array_equal(robot.get_joints().position, [1.0, 2.0, 3.0, 30.0])


def test_cameras_keep_their_names_unless_mapped(make: Make) -> None:
    assert make(cameras="null").contract.cameras == {"front": (24, 32), "side": (8, 8)}
    assert make(cameras="{}").contract.cameras == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"robot": "{}"}, r"lerobot:arm_v2_follower: robot: TypeError: .*port"),
        ({"robot.speed": "3"}, r"lerobot:arm_v2_follower: robot: TypeError: .*speed"),
        ({"robot.fault": "features"}, r"position_lower: got 3 numbers, expected 1, one for each"),
        ({"robot.fault": "kind"}, r"feature 'temperature': got <class 'str'>, expected float or"),
        ({"cameras": "{top: ceiling}"}, r"cameras: got \['ceiling'\], expected some of \['front'"),
        ({"limits.velocity": "[1]"}, r"velocity: got 1 numbers, expected 3, one for each of \['sh"),
        ({"start_pose": "[1]"}, r"start_pose: got 1 numbers, expected 3, one for each of"),
        ({"start_pose": "[0, 91, 0]"}, r"start_pose: got 91.0 for elbow.pos, expected -90.0 to 90"),
        ({"max_hz": "1"}, r"max_hz: got 1.0, expected more than 1"),
    ],
)
def test_what_cannot_be_is_refused(make: Make, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**overrides)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("bus", SensorLost, r"little_arm: ConnectionError: no answer from motor 3"),
        ("missing", ContractViolated, r"got .*, expected \['elbow.pos'\] too"),
        ("nan", ContractViolated, r"little_arm: got .*nan.*, expected finite numbers"),
        ("size", ContractViolated, r"front: got uint8 \(12, 32, 3\), expected uint8 \(24, 32, 3\)"),
    ],
)
def test_a_bad_sensor_is_named_before_anything_moves(
    make: Make, fault: str, kind: type, message: str
) -> None:
    with make(**{"robot.fault": fault}) as robot, pytest.raises(kind, match=message):
        robot.connect()


def test_a_port_that_is_not_there(make: Make) -> None:
    with pytest.raises(ConnectFailed, match=r"little_arm: ConnectionError: no such port"):
        make(**{"robot.port": "/dev/nothing"}).connect()


def test_a_command_that_does_not_leave(make: Make) -> None:
    with make(**{"robot.fault": "write"}) as robot:
        robot.connect()
        with pytest.raises(RobotLost, match=r"little_arm: ConnectionError: no answer from motor 1"):
            robot.send_action(np.zeros(3, np.float32))


def test_a_robot_that_lerobot_does_not_have(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(FILE.replace("arm_v2_follower", "butler"))
    with pytest.raises(
        ConfigError, match=r"lerobot:butler: no such robot, expected one of \['arm_v2_follower'\]"
    ):
        make_robot(str(path))


def test_without_lerobot_it_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lerobot.robots", None)
    path = tmp_path / "arm.yaml"
    path.write_text(FILE)
    with pytest.raises(
        ConfigError, match=r"the package lerobot cannot be imported .*: pip install lerobot, with"
    ):
        make_robot(str(path))
