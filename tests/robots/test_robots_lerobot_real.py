"""LeRobot's own robots, where it is installed: its code, the vendors' SDKs, and our processes.

The bus is a pseudo-terminal with servos behind it that outlive everybody, the cameras are replaced
at ``cv2.VideoCapture``. Each kill is done once; ``METRONOME_SOAK=1`` repeats it 20 times.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import contracts.robot
import numpy as np
import pytest
from contracts.robot import until
from faults import rig
from faults.rig import Program

from robots.base import Robot, Role
from robots.errors import RobotLost
from robots.factory import make_robot

# The adapter is tested over a package shaped like LeRobot, elsewhere; here over LeRobot itself.
for package in ("lerobot", "scservo_sdk", "dynamixel_sdk"):
    pytest.importorskip(package, reason=f"needs the package {package}")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1500)]  # LeRobot is slow
RIG = Path(__file__).with_name("lerobot_rig")
PATIENCE_S = 300.0
REPEATS = range(20 if os.environ.get("METRONOME_SOAK") else 1)
LOWEST, HIGHEST = 700, 3394
ARM = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
BASE = ("base_left_wheel", "base_back_wheel", "base_right_wheel")
CAMERA = "{front: {type: opencv, index_or_path: 0, width: 128, height: 96, fps: 30}}"
LIMITS = (
    "{position_lower: [-110, -110, -110, -110, -110, 0%s], "
    "position_upper: [110, 110, 110, 110, 110, 100%s], "
    "velocity: [90, 90, 90, 90, 90, 200%s], "
    "acceleration: [1000, 1000, 1000, 1000, 1000, 2000%s]}"
)
TICKS_PER_DEGREE = 4095 / 360
JUMP = 3 * 90 / 30 * TICKS_PER_DEGREE
"""Ticks that a motor may be from its goal: three commands' way at the speed limit."""


class Servos:
    """A bus with motors, in a process of its own, and what was written to it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._log = folder / "bus.log"
        self._log.touch()
        self.process = subprocess.Popen(
            [sys.executable, str(RIG / "servo_bus.py"), kind, str(self._log)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.port = self.process.stdout.readline().strip()

    def writes(self, name: str, since: int = 0) -> np.ndarray:
        """(N, 4): time, motor, value, where the motor was."""
        lines = [json.loads(line) for line in self._whole_lines()[since:]]
        rows = [[when, motor, value, at] for when, what, motor, value, at in lines if what == name]
        return np.array(rows).reshape(-1, 4)

    @property
    def count(self) -> int:
        return len(self._whole_lines())

    def _whole_lines(self) -> list[str]:
        return self._log.read_text().rpartition("\n")[0].splitlines()

    def is_swinging(self, since: int) -> bool:
        goals = self.writes("goal", since)
        first = goals[goals[:, 1] == 1, 2]
        # Whoever holds an arm commands the same on and on.
        return len(first) > 20 and bool(np.ptp(first[-10:]) > 20)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def servos(tmp_path: Path) -> Iterator[Callable[[str], Servos]]:
    made: list[Servos] = []

    def make(kind: str) -> Servos:
        made.append(Servos(kind, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    path = os.pathsep.join([str(rig.ROOT), str(RIG)])
    monkeypatch.setitem(rig.ENVIRONMENT, "PYTHONPATH", path)
    # LeRobot takes seconds to import, minutes on a machine under load.
    monkeypatch.setattr(rig, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(contracts.robot, "PATIENCE_S", PATIENCE_S)


def calibration(folder: Path, motors: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    table = {
        name: {
            "id": index + 1,
            "drive_mode": 0,
            "homing_offset": 0,
            "range_min": LOWEST,
            "range_max": HIGHEST,
        }
        for index, name in enumerate(motors)
    }
    (folder / "rig.json").write_text(json.dumps(table))


def arm_config(kind: str, port: str, folder: Path) -> Path:
    calibration(folder / "calibration", ARM)
    path = folder / "arm.yaml"
    path.write_text(
        f"type: lerobot:{kind}\nname: arm\nargs:\n"
        f"  robot: {{port: {port}, id: rig, use_degrees: true, "
        f"calibration_dir: {folder / 'calibration'}, cameras: {CAMERA}}}\n"
        f"  limits: {LIMITS % (('',) * 4)}\n"
    )
    return path


def evaluate(config: Path, policy: str, folder: Path, *flags: str, keys: bool = False) -> Program:
    return Program(
        "eval_real.py", "-m", f"python:rig_policy:{policy}", "-c", str(config), "--task", "fake",
        "-o", str(folder / "out"), "--video_fps", "0", *([] if keys else ["--yes"]), *flags,
        keys=keys,
    )  # fmt: skip


ARMS = [("so101_follower", "feetech"), ("koch_follower", "dynamixel")]


@pytest.mark.parametrize(("kind", "bus"), ARMS)
def test_a_rollout_is_played_and_the_arm_holds_itself_afterwards(
    servos, tmp_path: Path, kind: str, bus: str
) -> None:
    motors = servos(bus)
    config = arm_config(kind, motors.port, tmp_path)
    with evaluate(config, "swing", tmp_path, "--max_timesteps", "60") as program:
        assert program.wait() == 0, program.said
    torque = motors.writes("torque")
    last_off = max(index for index, row in enumerate(torque) if not row[2])
    # Only LeRobot's own configure() had it off, before the first command.
    assert sorted(torque[last_off + 1 :, 1]) == [1, 2, 3, 4, 5, 6]
    goals = motors.writes("goal")
    commanded = goals[goals[:, 0] > torque[-1, 0]]
    assert len(commanded) > 6 * 60
    assert np.abs(commanded[:, 2] - commanded[:, 3]).max() < JUMP
    # Each motor was aimed at where it was before its torque came on.
    before = goals[goals[:, 0] < torque[last_off, 0]]
    np.testing.assert_array_equal(before[:, 2], before[:, 3])
    assert len(before) == 6


@pytest.mark.parametrize(("kind", "bus"), ARMS)
def test_killed_in_mid_motion_the_torque_is_never_off(
    servos, tmp_path: Path, kind: str, bus: str
) -> None:
    """The control process, resumed every time, and then the owner; the raised arm is used again."""
    motors = servos(bus)
    config = arm_config(kind, motors.port, tmp_path)
    with evaluate(config, "swing", tmp_path, "--max_timesteps", "9000", keys=True) as program:
        program.expect("rollout 0", PATIENCE_S)
        begun = motors.count
        program.press("\n")
        for _ in REPEATS:
            since = motors.count
            until(lambda s=since: motors.is_swinging(s))
            os.kill(program.child("runtime.eval_real.control_process"), signal.SIGKILL)
            program.expect("stopped: ", PATIENCE_S)
            program.press("r")
        since = motors.count
        until(lambda s=since: motors.is_swinging(s))
        os.kill(program.child("robots.lerobot_owner_process"), signal.SIGKILL)
        program.expect("neither the control process nor its watchdog reach", PATIENCE_S)
        assert program.wait() == 1
    _never_off(motors, begun)
    begun = motors.count
    with evaluate(config, "swing", tmp_path, "--max_timesteps", "30") as program:
        assert program.wait() == 0, program.said
    _never_off(motors, begun)


@pytest.mark.parametrize(("kind", "bus"), ARMS)
def test_the_owner_killed_in_mid_motion_its_successor_lets_nothing_drop(
    servos, tmp_path: Path, monkeypatch, kind: str, bus: str
) -> None:
    monkeypatch.syspath_prepend(RIG)
    motors = servos(bus)
    robot = make_robot(str(arm_config(kind, motors.port, tmp_path)))
    begun = 0
    for attempt in (0, *(number + 1 for number in REPEATS)):
        with robot.companion(), robot:
            robot.connect(Role.CONTROL)
            begun = begun or motors.count
            move(robot, 0.4 if attempt % 2 else -0.4)
            os.kill(robot.owner_pid, signal.SIGKILL)
            until(lambda: is_lost(robot))
    assert len(motors.writes("torque", begun)) == 0
    goals = motors.writes("goal", begun)
    assert len(goals) > 500
    assert np.abs(goals[:, 2] - goals[:, 3]).max() < JUMP


def move(robot: Robot, step: float) -> None:
    """Joint 0, by ``step`` from one joint state to the next."""
    target = robot.get_joints().position.copy()
    for _ in range(100):
        target[0] += step
        robot.send_action(target)
        stamp_ns = robot.get_joints().stamp_ns
        until(lambda then_ns=stamp_ns: robot.get_joints().stamp_ns > then_ns)


def is_lost(robot: Robot) -> bool:
    try:
        robot.get_joints()
    except RobotLost:
        return True
    return False


def _never_off(motors: Servos, since: int) -> None:
    assert len(motors.writes("torque", since)) == 0
    goals = motors.writes("goal", since)
    assert len(goals) > 100
    assert np.abs(goals[:, 2] - goals[:, 3]).max() < JUMP


def test_an_arm_that_is_not_calibrated_is_not_touched(servos, tmp_path: Path) -> None:
    motors = servos("feetech")
    config = arm_config("so101_follower", motors.port, tmp_path)
    (tmp_path / "calibration" / "rig.json").unlink()
    with evaluate(config, "swing", tmp_path) as program:
        program.expect(
            r"error: arm: so101_follower is not calibrated, .*lerobot-calibrate --robot.type=so101",
            PATIENCE_S,
        )
        assert program.wait() == 2
    assert motors.count == 0


# LeKiwi


def lekiwi_config(kind: str, folder: Path, robot: str, more: str = "") -> Path:
    speeds = (", -0.3, -0.3, -90", ", 0.3, 0.3, 90", ", 1, 1, 300", ", 1, 1, 300")
    path = folder / "kiwi.yaml"
    path.write_text(
        f"type: lerobot:{kind}\nname: kiwi\nargs:\n  robot: {{cameras: {CAMERA}, {robot}}}\n"
        f"  limits: {LIMITS % speeds}\n{more}"
    )
    return path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def kiwi(servos, tmp_path: Path) -> Iterator[tuple[Servos, Path]]:
    """LeRobot's own host of a LeKiwi, and a configuration of its client."""
    motors = servos("feetech")
    calibration(tmp_path / "calibration", (*(f"arm_{name}" for name in ARM), *BASE))
    commands, observations = free_port(), free_port()
    command = [
        *("nice", "-n", "-10"),  # it is a computer of its own
        sys.executable, "-m", "lerobot.robots.lekiwi.lekiwi_host", f"--robot.port={motors.port}",
        "--robot.id=rig", f"--robot.calibration_dir={tmp_path / 'calibration'}",
        f"--robot.cameras={CAMERA}", "--host.connection_time_s=3600",
        f"--host.port_zmq_cmd={commands}", f"--host.port_zmq_observations={observations}",
    ]  # fmt: skip
    # It says 30 times a second that it hears nothing: a pipe that nobody reads would stop it.
    with (tmp_path / "host.log").open("w") as log:
        host = subprocess.Popen(
            command, env=rig.ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        until(lambda: len(motors.writes("torque")) >= 18)
        yield (
            motors,
            lekiwi_config(
                "lekiwi_client",
                tmp_path,
                f"remote_ip: 127.0.0.1, port_zmq_cmd: {commands}, "
                f"port_zmq_observations: {observations}, polling_timeout_ms: 5",
            ),
        )
    finally:
        host.kill()
        host.wait()


def speeds_of(motors: Servos, since: int = 0) -> np.ndarray:
    """As ``writes``; of the values without the bit that is the direction."""
    speeds = motors.writes("speed", since)
    speeds[:, 2] %= 0x8000
    return speeds


def test_a_base_is_driven_through_its_host_and_stands_afterwards(kiwi, tmp_path: Path) -> None:
    motors, config = kiwi
    with evaluate(config, "drive", tmp_path, "--max_timesteps", "60") as program:
        assert program.wait() == 0, program.said
    speeds = speeds_of(motors)
    assert (speeds[:, 2] > 0).any()
    assert (speeds[-3:, 2] == 0).all()


def test_a_base_stands_when_all_of_our_processes_are_killed(kiwi, tmp_path: Path) -> None:
    motors, config = kiwi
    said = ("--robot.description", make_robot(str(config)).config.description)
    for _ in REPEATS:
        since = motors.count
        with evaluate(config, "drive", tmp_path, "--max_timesteps", "3000", *said) as program:
            until(lambda s=since: (speeds_of(motors, s)[:, 2] > 100).any())
            family = [
                program.child(name) for name in ("robots.lerobot_owner_process",
                "runtime.eval_real.control_process", "runtime.eval_real.watchdog_process",
                             "runtime.eval_real.sensing_process")
            ]  # fmt: skip
            for pid in (program.pid, *family):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not speeds_of(motors)[-3:, 2].any())


def test_a_base_on_its_own_bus_is_refused(servos, tmp_path: Path) -> None:
    """Nothing there stops it when commands stay away."""
    motors = servos("feetech")
    calibration(tmp_path / "calibration", (*(f"arm_{name}" for name in ARM), *BASE))
    config = lekiwi_config(
        "lekiwi",
        tmp_path,
        f"port: {motors.port}, id: rig, calibration_dir: {tmp_path / 'calibration'}",
    )
    with evaluate(config, "drive", tmp_path) as program:
        program.expect(
            r"error: kiwi is commanded by velocity .* expected stops_alone_after_s", PATIENCE_S
        )
        assert program.wait() == 2
    assert len(motors.writes("speed")) == 0 or not motors.writes("speed")[:, 2].any()
