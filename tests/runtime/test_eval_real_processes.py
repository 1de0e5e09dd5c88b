"""``Sensing``, ``Watchdog`` and ``Control``, each alone in this process, with a fake robot."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from policies.errors import DeviceLost
from policies.types import CameraContract, PolicyContract
from robots.base import (
    ActionKind,
    ActionSpec,
    CameraSample,
    JointSample,
    Robot,
    RobotContract,
    Role,
    arm_actions,
)
from robots.errors import RobotError, RobotLost
from robots.joint_limits import JointLimits
from runtime.errors import ServerLost
from runtime.eval_real.control_enums import Phase, ServerStatus, Signal
from runtime.eval_real.control_process import Control
from runtime.eval_real.event_log import EventLog
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.sensing_process import Sensing
from runtime.eval_real.shared_state import Dims, SharedState, create_segment
from runtime.eval_real.watchdog_process import Watchdog
from transport.shm.text_field import get_text

CONTRACT = PolicyContract("toy", (CameraContract("top", (4, 4), (4, 4)),), 3, 3, 20, 10)
CONFIG = RunConfig(robot="toy", contract_json=CONTRACT.to_json(), address="127.0.0.1:1")
LIMITS = JointLimits(np.full(3, -2.0), np.full(3, 2.0), np.full(3, 1.0), np.full(3, 5.0))


class ExclusiveRobot(Robot):
    """A robot to which one process at a time can be connected."""

    name = "exclusive"
    contract = RobotContract(("a", "b", "c"), arm_actions("abc", ()), {"top": (4, 4)})
    limits = LIMITS
    shareable = False

    def __init__(self) -> None:
        self.frame_stamp_ns = 0
        self.sent: list[np.ndarray] = []
        self.attempts = 0
        self.refuses: set[int] = set()

    def _connect(self, role: Role, timeout_s: float) -> None:
        pass

    def _get_joints(self) -> JointSample:
        return JointSample(np.zeros(3, np.float32), 0, time.monotonic_ns())

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        raise AssertionError("the bus is control's")

    def _get_cameras(self) -> dict[str, CameraSample]:
        picture = np.zeros((4, 4, 3), np.uint8)
        return {"top": CameraSample(picture, self.frame_stamp_ns, time.monotonic_ns())}

    def _send_action(self, action: np.ndarray) -> None:
        self.attempts += 1
        if self.attempts in self.refuses:
            raise RobotLost("held up")
        self.sent.append(action.copy())

    def _disconnect(self) -> None:
        pass


@pytest.fixture
def shared_state() -> Iterator[SharedState]:
    dims = Dims(3, 3, 20)
    fd = create_segment(dims)
    with SharedState(fd, dims) as shared_state:
        yield shared_state
    os.close(fd)


def test_pictures_are_paired_with_the_states_of_their_stamps(shared_state: SharedState) -> None:
    """Joints come through shared memory when two processes cannot both connect to the robot."""
    robot = ExclusiveRobot()
    robot.connect(Role.SENSING)
    sensing = Sensing(CONFIG, shared_state, robot, client=None, input_fd=-1)
    joints = shared_state.queue_writer("joints")
    for number in range(10):
        views = joints.claim()
        views["position"][:] = number
        views["stamp_ns"][...], views["received_ns"][...] = 1000 * number, 7_000 + number
        joints.publish()
    for stamp_ns, expected in ((3400, 3), (3600, 4), (99_999, 9), (-5, 0)):
        robot.frame_stamp_ns = stamp_ns
        obs = sensing.first_observation()
        assert (obs.state == expected).all()
        assert obs.t_capture_ns == 7_000 + expected  # our clock, of the earlier of the two


def test_a_server_that_lost_its_device_is_a_lost_server(
    shared_state: SharedState, capfd: pytest.CaptureFixture[str]
) -> None:
    """The robot rests, and one thread tries to reconnect."""
    reconnecting = threading.Event()

    class Client:
        attempts = 0

        def poll(self) -> None:
            raise DeviceLost("the policy server has lost its device")

        def reconnect(self, timeout_s: float) -> None:
            self.attempts += 1
            reconnecting.wait(10)
            raise ServerLost("no server")

    client = Client()
    sensing = Sensing(CONFIG, shared_state, ExclusiveRobot(), client, input_fd=-1)
    for _ in range(3):
        sensing._exchange()
    sensing._publish()
    report = shared_state.latest_reader("sensing")
    report.refresh()
    assert report.values["server"] == ServerStatus.LOST
    assert get_text(report.values["fault"]) == ""
    assert client.attempts == 1
    reconnecting.set()
    assert sensing._reconnecting is not None
    sensing._reconnecting.join()
    (event,) = capfd.readouterr().out.splitlines()
    assert json.loads(event) == {"event": "lost", "reason": "the policy server has lost its device"}


def test_without_joints_there_is_no_observation(shared_state: SharedState) -> None:
    robot = ExclusiveRobot()
    robot.connect(Role.SENSING)
    sensing = Sensing(
        dataclasses.replace(CONFIG, connect_timeout_s=0.05),
        shared_state,
        robot,
        client=None,
        input_fd=-1,
    )
    with pytest.raises(RobotError, match=r"no joint state from the control process within 0\.05 s"):
        sensing.first_observation()


@pytest.mark.parametrize("refuses", [set(), {1}, {2, 3}])
def test_the_watchdog_continues_where_control_stopped(
    shared_state: SharedState, monkeypatch: pytest.MonkeyPatch, refuses: set[int]
) -> None:
    """It sends control's last command, brakes on the same deadlines, latches a fault and records.

    A command that the robot refused is sent again: skipping it would be a jump.
    """
    commands, progress = (
        shared_state.latest_writer("commands"),
        shared_state.latest_writer("progress"),
    )
    speed = np.array([1.0, -0.5, 0.0])
    due_ns = time.monotonic_ns()
    views = commands.claim()
    views["row"][...], views["attempt"][...], views["tick"][...] = 41, 3, 17
    views["deadline_ns"][...] = due_ns
    views["command"][:], views["velocity"][:] = (0.5, 0.5, 0.5), speed
    views["signals"][...] = Signal.NONE
    commands.publish()
    views = progress.claim()
    views["phase"][...], views["attempt"][...] = Phase.RUN, 3
    progress.publish()

    robot = ExclusiveRobot()
    robot.refuses = refuses
    watchdog = Watchdog(CONFIG, shared_state, robot, pidfd=-1, input_fd=-1)
    watchdog._progress.refresh()
    monkeypatch.setattr(
        Watchdog, "_released", lambda self, left_ns: len(robot.sent) > 30, raising=True
    )
    watchdog.take_over()

    assert robot.role is Role.CONTROL  # it connected when the bus was free
    sent = np.stack(robot.sent).astype(np.float64)
    period_s = CONFIG.period_s
    np.testing.assert_array_equal(sent[0], (0.5, 0.5, 0.5))
    path = np.vstack([sent[0] - speed * period_s, sent])
    force = np.diff(path, n=2, axis=0) / period_s**2
    assert np.abs(force).max() <= LIMITS.acceleration.max() + 1e-2
    assert (sent[-1] == sent[-2]).all()
    assert (sent[-1] - sent[0])[0] > 0 > (sent[-1] - sent[0])[1]  # on, in the same direction

    ticks = shared_state.queue_reader("ticks")
    rows = []
    while (views := ticks.peek()) is not None:
        rows.append({name: value.copy() for name, value in views.items()})
        ticks.release()
    assert [int(row["row"]) for row in rows] == list(range(41, 41 + len(rows)))
    assert rows[0]["signals"] == Signal.NONE  # control's own
    assert all(row["signals"] == Signal.WATCHDOG for row in rows[1:])
    deadlines = np.array([int(row["deadline_ns"]) for row in rows])
    assert ((deadlines - due_ns) % round(period_s * 1e9) == 0).all()
    now = shared_state.latest_reader("progress")
    now.refresh()
    assert now.values["phase"] == Phase.FAULT
    assert get_text(now.values["fault"]) == "the control process died"


class Driving(ExclusiveRobot):
    """A robot whose last number is a velocity."""

    contract = dataclasses.replace(
        ExclusiveRobot.contract,
        actions=(*ExclusiveRobot.contract.actions[:2], ActionSpec("c", ActionKind.VELOCITY, "m/s")),
        stops_alone_after_s=0.5,
    )


def test_the_watchdog_brings_a_driving_base_to_a_stand(
    shared_state: SharedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, progress = (
        shared_state.latest_writer("commands"),
        shared_state.latest_writer("progress"),
    )
    views = commands.claim()
    views["deadline_ns"][...] = time.monotonic_ns()
    views["command"][:], views["velocity"][:] = (0.5, 0.5, 0.4), (0.0, 0.0, 0.4)
    commands.publish()
    progress.claim()["phase"][...] = Phase.RUN
    progress.publish()
    robot = Driving()
    watchdog = Watchdog(CONFIG, shared_state, robot, pidfd=-1, input_fd=-1)
    watchdog._progress.refresh()
    monkeypatch.setattr(Watchdog, "_released", lambda self, left_ns: len(robot.sent) > 12)
    watchdog.take_over()
    sent = np.stack(robot.sent).astype(np.float64)
    # 5 m/s² by 20 ms
    np.testing.assert_allclose(sent[:6, 2], [0.4, 0.3, 0.2, 0.1, 0, 0], atol=1e-6)
    assert not sent[5:, 2].any()
    assert (sent[:, :2] == 0.5).all()


def test_a_control_process_holds_what_is_measured_and_no_speed(shared_state: SharedState) -> None:
    """The state has another order than the commands, and a velocity is not held."""

    class Measured(Driving):
        contract = RobotContract(
            ("x.vel", "b", "a"),
            (ActionSpec("a"), ActionSpec("b"), ActionSpec("x.vel", ActionKind.VELOCITY, "m/s")),
            {"top": (4, 4)},
            stops_alone_after_s=0.5,
        )

        def _get_joints(self) -> JointSample:
            return JointSample(np.array([0.7, 0.2, 0.1], np.float32), 0, time.monotonic_ns())

    robot = Measured()
    robot.connect(Role.CONTROL)
    control = Control(
        CONFIG, shared_state, robot, EventLog(shared_state.queue_writer("events")), None
    )
    np.testing.assert_allclose(control._machine.command(), [0.1, 0.2, 0.0])
