"""LeRobot's robots, over a package that is shaped like LeRobot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from contracts.robot import RobotBehaviour, until

from robots.errors import ConfigError, ConnectFailed, ContractViolated, RobotLost, SensorLost
from robots.factory import make_robot
from robots.lerobot_robot import LeRobotRobot

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


@pytest.fixture
def make(monkeypatch, tmp_path: Path) -> Make:
    monkeypatch.syspath_prepend(FAKE)
    path = tmp_path / "arm.yaml"
    path.write_text(FILE)
    return lambda **overrides: make_robot(str(path), overrides)


class TestLeRobot(RobotBehaviour):
    @pytest.fixture
    def robot(self, make: Make):
        made = make()
        with made.companion(), made:
            yield made

    def test_states_have_the_order_of_what_lerobot_observes(self, robot: LeRobotRobot) -> None:
        contract = robot.contract
        assert contract.joint_names == (
            "temperature", "shoulder.pos", "elbow.pos", "gripper.pos")  # fmt: skip
        assert contract.action_names == ("shoulder.pos", "elbow.pos", "gripper.pos")
        assert [spec.kind for spec in contract.actions] == ["position", "position", "gripper"]
        assert contract.cameras == {"top": (24, 32), "wrist": (8, 8)}
        robot.connect()
        robot.send_action(np.array([1.0, 2.0, 3.0], np.float32))
        until(lambda: robot.get_joints().position.tolist() == [30.0, 1.0, 2.0, 3.0])

    def test_a_commanded_joint_reaches_its_target(self, robot: LeRobotRobot) -> None:
        """As in the contract; its first state is no joint that is commanded."""
        with robot:
            robot.connect()
            target = np.array([self.MOVES, 0.0, 0.0], np.float32)
            robot.send_action(target)
            until(lambda: bool(abs(robot.get_joints().position[1] - self.MOVES) < self.NEAR))


def test_cameras_keep_their_names_unless_mapped(make: Make) -> None:
    assert make(cameras="null").contract.cameras == {"front": (24, 32), "side": (8, 8)}
    assert make(cameras="{}").contract.cameras == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"robot": "{}"}, r"lerobot:arm_v2_follower: robot: TypeError: .*port"),
        ({"robot.speed": "3"}, r"lerobot:arm_v2_follower: robot: TypeError: .*speed"),
        ({"robot.fault": "features"}, r"action feature 'speed': its name does not show what"),
        ({"robot.fault": "kind"}, r"feature 'temperature': got <class 'str'>, expected float or"),
        ({"cameras": "{top: ceiling}"}, r"cameras: got \['ceiling'\], expected some of \['front'"),
        ({"limits.velocity": "[1]"}, r"velocity: got 1 numbers, expected 3, one for each of \['sh"),
        ({"start_pose": "[1]"}, r"start_pose: got 1 numbers, expected 3, one for each of"),
        (
            {"start_pose": "[0, 91, 0]"},
            r"start_pose: got 91.0 for elbow.pos \[range\], expected -90",
        ),
        ({"max_hz": "1"}, r"max_hz: got 1.0, expected a finite number above 1"),
        ({"read_hz": "0"}, r"read_hz: got 0.0, expected a positive number"),
        ({"stops_alone_after_s": "-1"}, r"stops_alone_after_s: got -1.0, expected a positive"),
        ({"actions": "{x: {kind: delta, unit: m}}"}, r"actions: got \['x'\], expected some of"),
        (
            {"actions": "{elbow.pos: {kind: torque, unit: Nm}}"},
            r"actions.elbow.pos: kind: got 'torque', expected one of \['position', 'gripper'",
        ),
        (
            {"actions": "{elbow.pos: {kind: effort, unit: Nm}}"},
            r"action feature 'elbow.pos' is an effort, expected positions or velocities",
        ),
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
        lost: list[RobotLost] = []

        def refused() -> bool:
            try:
                robot.send_action(np.zeros(3, np.float32))
            except RobotLost as error:
                lost.append(error)
            return bool(lost)

        until(refused)
        assert str(lost[0]) == (
            "little_arm: commands do not reach it (ConnectionError: no answer from motor 1)"
        )


def test_a_robot_that_lerobot_does_not_have(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(FILE.replace("arm_v2_follower", "butler"))
    with pytest.raises(
        ConfigError, match=r"lerobot:butler: no such robot, expected one of \['arm_v2_f"
    ):
        make_robot(str(path))


def test_without_lerobot_it_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "lerobot.py").write_text("raise ImportError('half installed')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "arm.yaml"
    path.write_text(FILE)
    with pytest.raises(
        ConfigError, match=r"the package lerobot cannot be imported .*: pip install lerobot, with"
    ):
        make_robot(str(path))


# What LeRobot's code does in the process that owns it


def test_a_prompt_of_lerobot_is_an_error_that_says_what_to_run(make: Make) -> None:
    with pytest.raises(
        ConnectFailed,
        match=r"little_arm: it asked 'Press ENTER to use the calibration file:', and nobody can .*"
        r"lerobot-calibrate --robot.type=arm_v2_follower --robot.port=/dev/arm first",
    ):
        make(**{"robot.fault": "asks"}).connect()


def test_a_connect_that_never_returns_times_out(make: Make) -> None:
    with pytest.raises(
        ConnectFailed,
        match=r"connect\(\) of arm_v2_follower took longer than 0.3 s; it printed last: 'Switch th",
    ):
        make(**{"robot.fault": "hangs", "connect_timeout_s": "0.3"}).connect()


def test_output_of_lerobot_disturbs_no_connection(make: Make) -> None:
    with make(**{"robot.fault": "prints"}) as robot:
        robot.connect()
        first = robot.get_joints()
        until(lambda: robot.get_joints().stamp_ns > first.stamp_ns)


# A bus whose motors hold themselves

ARM = """
type: lerobot:holding_arm
args:
  robot: {{motors: {motors}, cameras: {{side: 0.01}}}}
  limits: {{position_lower: [-90, 0], position_upper: [90, 100], velocity: [60, 60],
    acceleration: [300, 300]}}
"""


class Motors:
    """Simulated motors, whose registers are in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def set(self, *, torque: tuple[int, int] = (0, 0), at: int = 30, goal: int = 0) -> None:
        state = {
            name: {"Torque_Enable": on, "Present_Position": at, "Goal_Position": goal}
            for name, on in zip(("lift", "gripper"), torque, strict=True)
        }
        self._path.write_text(json.dumps({**state, "did": []}))

    def register(self, name: str, motor: str = "lift") -> int:
        return json.loads(self._path.read_text())[motor][name]

    @property
    def did(self) -> list:
        return json.loads(self._path.read_text())["did"]


@pytest.fixture
def motors(tmp_path: Path) -> Motors:
    made = Motors(tmp_path / "motors.json")
    made.set()
    return made


@pytest.fixture
def arm(monkeypatch, tmp_path: Path, motors: Motors) -> Make:
    monkeypatch.syspath_prepend(FAKE)
    path = tmp_path / "holding.yaml"
    path.write_text(ARM.format(motors=tmp_path / "motors.json"))
    return lambda **overrides: make_robot(str(path), overrides)


def test_units_are_those_of_the_motors(arm: Make) -> None:
    specs = arm().contract.actions
    assert [(s.kind, s.unit) for s in specs] == [("position", "deg"), ("gripper", "range")]


def test_an_arm_without_torque_gets_torque_at_its_present_position(
    arm: Make, motors: Motors
) -> None:
    with arm() as robot:
        robot.connect()
        first = motors.did.index(["Torque_Enable", "lift", 1])
        assert motors.did[:first].count(["Goal_Position", "lift", 30]) == 1
        assert robot.get_joints().position.tolist() == [30, 30]
    assert motors.register("Torque_Enable") == 1  # at the end, too


def test_an_arm_with_torque_on_is_not_configured(arm: Make, motors: Motors) -> None:
    motors.set(torque=(1, 1), goal=30)
    with arm() as robot:
        robot.connect()
        assert robot.get_cameras().keys() == {"side"}
    assert motors.did == []


def test_one_motor_without_torque_gets_it_at_its_present_position(
    arm: Make, motors: Motors
) -> None:
    motors.set(torque=(1, 0), at=30, goal=70)
    with arm() as robot:
        robot.connect()
    assert motors.did == [["Goal_Position", "gripper", 30], ["Torque_Enable", "gripper", 1]]


def test_the_torque_goes_off_at_the_end_if_configured(arm: Make, motors: Motors) -> None:
    with arm(**{"robot.disable_torque_on_disconnect": "true"}) as robot:
        robot.connect()
        assert motors.register("Torque_Enable") == 1
    assert motors.register("Torque_Enable") == 0


def test_an_uncalibrated_arm_is_not_touched(arm: Make, motors: Motors) -> None:
    with pytest.raises(
        ConnectFailed,
        match=r"holding_arm is not calibrated, .* run lerobot-calibrate --robot.type=holding_arm "
        r"--robot.id=two first",
    ):
        arm(**{"robot.calibrated": "false", "robot.id": "two"}).connect()
    assert motors.did == []


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_torque_stays_on_when_the_owner_is_killed(
    arm: Make, motors: Motors, sign: signal.Signals
) -> None:
    with arm() as robot:
        robot.connect()
        before = len(motors.did)
        os.kill(robot.owner_pid, sign)
        if sign is signal.SIGINT:  # a terminal's Ctrl-C is for the parent
            first = robot.get_joints()
            until(lambda: robot.get_joints().stamp_ns > first.stamp_ns)
        else:
            until(lambda: _is_lost(robot))
    assert [did for did in motors.did[before:] if did[0] == "Torque_Enable"] == []


def test_connecting_and_disconnecting_does_nothing_to_the_device(arm: Make, motors: Motors) -> None:
    robot = arm()
    with robot.companion() as found:
        for role in ("control", "sensing", "control"):
            other = arm(**found)
            other.connect(role)
            other.disconnect()
        did = len(motors.did)
        with arm(**found) as again:
            again.connect()
            again.send_action(np.array([10, 20], np.float32))
            until(lambda: again.get_joints().position.tolist() == [10, 20])
        assert {register for register, *_ in motors.did[did:]} == {"Goal_Position"}


def test_a_slow_camera_does_not_delay_the_joints(arm: Make) -> None:
    """Its third picture never comes: the joints go on, and it is named."""
    robot = arm(**{"robot.cameras": "{side: 1e9}"})
    with robot.companion(), robot:
        robot.connect("control")
        first = robot.get_joints()
        until(lambda: robot.get_joints().stamp_ns > first.stamp_ns + 1_000_000_000)
        robot.disconnect()
        with pytest.raises(SensorLost, match=r"\['side'\] within 3 s \(TimeoutError: no frame\)"):
            robot.connect(timeout_s=3)


def test_the_owner_outlives_its_parent_until_no_client_commands(arm: Make, motors: Motors) -> None:
    robot = arm()
    code = (
        "import sys, json\n"
        "from robots.factory import make_robot\n"
        "path, found = sys.argv[1], json.loads(sys.argv[2])\n"
        "with make_robot(path, found).companion() as found:\n"
        "    print(json.dumps(dict(found)), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    path = robot._source.removesuffix(": args")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, path, json.dumps({"description": robot.config.description})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with parent:
        found = json.loads(parent.stdout.readline())
        with arm(**found) as control:
            control.connect("control")
            parent.kill()
            parent.wait()
            control.send_action(np.array([10, 20], np.float32))
            until(lambda: control.get_joints().position.tolist() == [10, 20])
            pid = control.owner_pid
        until(lambda: not _runs(pid))
    assert motors.register("Torque_Enable") == 1


# One that drives

ROVER = """
type: lerobot:rover
args:
  robot: {{log: {log}}}
  limits: {{position_lower: [-90, -0.3], position_upper: [90, 0.3], velocity: [60, 0.3],
    acceleration: [300, 2.0]}}
  sensor_timeout_s: 0.5
"""


@pytest.fixture
def rover(monkeypatch, tmp_path: Path) -> Make:
    monkeypatch.syspath_prepend(FAKE)
    path = tmp_path / "rover.yaml"
    path.write_text(ROVER.format(log=tmp_path / "log"))
    return lambda **overrides: make_robot(str(path), overrides)


def _commands(tmp_path: Path) -> np.ndarray:
    return np.array([json.loads(line) for line in (tmp_path / "log").read_text().splitlines()])


def test_velocities_have_no_watchdog_unless_configured(rover: Make) -> None:
    contract = rover().contract
    assert [(s.kind, s.unit) for s in contract.actions] == [
        ("position", "range"),
        ("velocity", "m/s"),
    ]
    assert contract.stops_alone_after_s is None
    assert contract.rest_command(np.array([5, 0.5], np.float32)).tolist() == [5, 0]
    assert rover(stops_alone_after_s="0.5").contract.stops_alone_after_s == 0.5


@pytest.mark.parametrize(
    ("name", "kind", "unit"),
    [
        ("theta.vel", "velocity", "deg/s"),
        ("wheel.vel", "velocity", "range/s"),
        ("delta_x", "delta", "range"),
        ("mobile_base.vx", "velocity", "m/s"),
    ],
)
def test_kind_and_unit_follow_from_a_features_name(
    rover: Make, name: str, kind: str, unit: str
) -> None:
    spec = rover(**{"robot.feature": name}).contract.actions[1]
    assert (spec.name, spec.kind, spec.unit) == (name, kind, unit)


def test_an_unknown_feature_can_be_configured(rover: Make) -> None:
    with pytest.raises(ConfigError, match=r"action feature 'wrist': its name does not show what .*"
                       r"'actions: \{wrist: \{kind: position, unit: deg\}\}'"):  # fmt: skip
        rover(**{"robot.feature": "wrist"})
    said = {"robot.feature": "wrist", "actions": "{wrist: {kind: velocity, unit: turns/s}}"}
    assert rover(**said).contract.actions[1].unit == "turns/s"
    with pytest.raises(ConfigError, match=r"'arm.torque' is an effort, expected positions or vel"):
        rover(**{"robot.feature": "arm.torque"})


def test_uncommanded_velocities_end_within_their_limits(rover: Make, tmp_path: Path) -> None:
    with rover() as robot:
        robot.connect()
        robot.send_action(np.array([7, 0.2], np.float32))
        until(lambda: (tmp_path / "log").exists() and _commands(tmp_path)[-1, 2] == 0)
    commands = _commands(tmp_path)
    slowing = commands[np.argmax(commands[:, 2]) :]
    assert slowing[0, 2] == pytest.approx(0.2)
    assert slowing[-1, 1] == 7
    steps = np.diff(slowing[:, 2])
    assert (steps <= 0).all()
    assert (steps >= -2.0 / 100 - 1e-6).all()  # its acceleration, read_hz times a second


def test_velocities_are_zero_at_the_end(rover: Make, tmp_path: Path) -> None:
    with rover() as robot:
        robot.connect()
        robot.send_action(np.array([7, 0.2], np.float32))
    assert _commands(tmp_path)[-1, 2] == 0


def test_an_unchanged_observation_is_not_taken_for_new(rover: Make, tmp_path: Path) -> None:
    with rover() as robot:
        robot.connect()
        (tmp_path / "log.silent").touch()
        lost: list[SensorLost] = []

        def silent() -> bool:
            try:
                robot.get_joints()
            except SensorLost as error:
                lost.append(error)
            return bool(lost)

        until(silent)
        assert "joints: nothing new for" in str(lost[0])


def _is_lost(robot: LeRobotRobot) -> bool:
    try:
        robot.get_joints()
    except RobotLost:
        return True
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
