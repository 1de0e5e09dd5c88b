"""A node, a process of ours or a topic fails while a ``ros2`` robot moves: it comes to rest.

Commands are judged where they arrive, by a node of its own that only listens. ``METRONOME_LONG=1``
tries every fault 20 times.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from robots.command_delivery import LONGEST_STEP_S, TOLERANCE
from tests.faults.rig import PATIENCE_S, Program, Server, max_sensing_age_s, stop_s
from tests.robots import ros2_rig
from tests.robots.ros2_rig import ARM, JOINT_STATES, LONG, PICTURES, TIMES, arm

FOR_EVER = ("--max_timesteps", "1000000", "-n", "1")
SENSOR_TIMEOUT_S = 0.4
"""Below the age of a picture at which control stops by itself, so that the topic is named."""
NOTICE_S = max_sensing_age_s() + SENSOR_TIMEOUT_S
only_long = pytest.mark.skipif(not LONG, reason="METRONOME_LONG is not set")

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(3600 if LONG else 300)]


class Rollout:
    """A robot of two nodes, a node that listens to its commands, a server and ``eval_real.py``."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, *flags: str) -> None:
        self.stack, self.folder, self.domain = stack, folder, ros2_rig.free_domain()
        robot = arm({"domain_id": str(self.domain)})
        self.limits = robot.limits
        heard = folder / "heard"
        heard.mkdir()
        self.heard = heard
        self.joints = ros2_rig.joint_peer(folder, self.domain, robot)
        self.camera = ros2_rig.camera_peer(self.domain)
        self.listener = ros2_rig.joint_peer(heard, self.domain, robot, states="/listener")
        self.server = Server("make_short")
        self.program = Program(
            "eval_real.py", "-m", self.server.address, "-c", str(ARM), "--robot.domain_id",
            str(self.domain), "--robot.sensor_timeout_s", str(SENSOR_TIMEOUT_S),
            "-o", str(folder), "--video_fps", "0", *flags, keys=True,
        )  # fmt: skip
        stack.callback(self.close)

    def close(self) -> None:
        for thing in (self.program, self.server, self.joints, self.camera, self.listener):
            thing.close()

    def start(self) -> None:
        self.program.expect("rollout 0")
        self.program.press("\n")
        self.program.expect("^run$")

    def commands(self) -> tuple[np.ndarray, np.ndarray]:
        rows = ros2_rig.read_commands(self.heard, 14)
        return rows["ns"], rows["values"]

    def into_motion(self) -> None:
        until_s = time.monotonic() + 0.5
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            time.sleep(0.005)
            arrived, values = self.commands()
            moving = len(values) > 5 and np.ptp(values[-4:], axis=0).max() > 1e-4
            if moving and arrived[-1] > time.monotonic_ns() - 10**8 and time.monotonic() > until_s:
                return
            assert time.monotonic() < deadline_s, "the arm does not move"

    def at_rest(self, name: str, at_ns: int, within_s: float, settle_s: float = 0.1) -> None:
        """Since ``at_ns`` no step was too far, the last one came in time, and none follows.

        Args:
            settle_s: How long what was sent before may be on its way to the listener.
        """
        time.sleep(settle_s)
        arrived, values = self.commands()
        since = arrived > at_ns
        steps = np.abs(np.diff(values, axis=0))
        longest = self.limits.velocity * LONGEST_STEP_S * TOLERANCE + 1e-6
        assert (steps <= longest).all(), f"{name}: a step of {steps.max()}"
        moved = np.flatnonzero(since[1:] & (steps.max(axis=1) > 0))
        rest_s = (arrived[moved[-1] + 1] - at_ns) / 1e9 if len(moved) else 0.0
        assert rest_s <= within_s, f"{name}: at rest after {rest_s:.3f} s, allowed {within_s:.3f}"
        print(f"{name}: at rest after {rest_s:.3f} s of {within_s:.3f}", flush=True)  # noqa: T201
        time.sleep(0.2)
        _, later = self.commands()
        assert (later[len(values) :] == values[-1]).all(), f"{name}: moved although latched"

    def kill(self, name: str, pid: int, within_s: float, said: str, settle_s: float = 0.1) -> None:
        self.into_motion()
        at_ns = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        self.program.expect(f"stopped: .*{said}")
        self.at_rest(name, at_ns, within_s + stop_s(self.limits), settle_s)

    def resume(self) -> None:
        """Resume, once a node that was started again has been found."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            self.program.press("r")
            if self.program.expect("^run$|^stopped: ")[0] == "run":
                return
            assert time.monotonic() < deadline_s, self.program.said[-3:]


def one_after_the_other(folder: Path) -> Generator[Rollout, None, None]:
    for attempt in range(TIMES):
        own = folder / str(attempt)
        own.mkdir()
        with contextlib.ExitStack() as stack:
            yield Rollout(stack, own, *FOR_EVER)


@pytest.fixture
def rollouts(tmp_path: Path) -> Iterator[Iterator[Rollout]]:
    """As many as a fault is tried that cannot be mended, each with processes of its own."""
    ros2_rig.interpreter()
    with contextlib.closing(one_after_the_other(tmp_path)) as found:
        yield found


@pytest.fixture
def rollout(rollouts: Iterator[Rollout]) -> Rollout:
    return next(rollouts)


def test_the_arm_stops_when_the_camera_node_or_a_process_dies(rollout: Rollout) -> None:
    rollout.start()
    for _ in range(TIMES):
        rollout.kill("camera node", rollout.camera.pid, NOTICE_S, PICTURES)
        rollout.camera.close()
        rollout.camera = ros2_rig.camera_peer(rollout.domain)
        rollout.resume()
        pid = rollout.program.child("runtime.eval_real.control_process")
        rollout.kill("control", pid, 0.15, "control process died")
        rollout.resume()
        pid = rollout.program.child("runtime.eval_real.sensing_process")
        rollout.kill("sensing", pid, NOTICE_S, "sensing process")
        rollout.resume()
        if LONG:
            pid = rollout.program.child("runtime.eval_real.watchdog_process")
            rollout.kill("watchdog", pid, NOTICE_S, "watchdog")
            rollout.resume()
        port = rollout.server.port
        rollout.kill("server", rollout.server.pid, NOTICE_S, "lost")
        rollout.server.close()
        rollout.server = Server("make_short", port)
        rollout.program.expect("server connected again")
        rollout.resume()


@pytest.mark.parametrize(
    ("topic", "mode", "said"),
    [
        (PICTURES, "mute", "nothing received for"),
        pytest.param(PICTURES, "freeze", "stamp stands still", marks=only_long),
        pytest.param(PICTURES, "ahead", "stamp jumped ahead", marks=only_long),
        pytest.param(PICTURES, "size", r"got \(height, width\)", marks=only_long),
        (JOINT_STATES, "nan", "got nan for joint r2, expected finite positions"),
        pytest.param(JOINT_STATES, "mute", "nothing received for", marks=only_long),
        pytest.param(JOINT_STATES, "freeze", "stamp stands still", marks=only_long),
        pytest.param(JOINT_STATES, "back", "stamp went back", marks=only_long),
        pytest.param(JOINT_STATES, "names", "got joints", marks=only_long),
    ],
)
def test_the_arm_stops_when_a_topic_fails(
    rollout: Rollout, topic: str, mode: str, said: str
) -> None:
    rollout.start()
    node = rollout.joints if topic == JOINT_STATES else rollout.camera
    for _ in range(TIMES):
        rollout.into_motion()
        at_ns = time.monotonic_ns()
        with node.spoilt(topic, mode):
            rollout.program.expect(f"stopped: .*{topic}.*{said}")
            rollout.at_rest(f"{topic} {mode}", at_ns, NOTICE_S + stop_s(rollout.limits))
        rollout.resume()


@only_long
def test_the_arm_stops_when_the_joint_node_dies(rollouts: Iterator[Rollout]) -> None:
    """Its reader's death can hold Fast DDS's writer up for a second; the reason is late then."""
    said = f"({JOINT_STATES}|joints: nothing new)"
    for rollout in rollouts:
        rollout.start()
        rollout.kill("joint node", rollout.joints.pid, NOTICE_S, said, settle_s=1.0)


def test_the_arm_stops_when_our_node_dies(rollouts: Iterator[Rollout]) -> None:
    """The evaluation ends: nobody can command the arm any more, which stays where it was told."""
    for rollout in rollouts:
        rollout.start()
        rollout.into_motion()
        at_ns = time.monotonic_ns()
        os.kill(rollout.program.child("robots.ros2_owner_process"), signal.SIGKILL)
        assert rollout.program.wait() == 1
        rollout.at_rest("our node", at_ns, 0.02)
        assert any("the robot's ROS 2 node has ended" in line for line in rollout.program.said)


@only_long
def test_the_arm_stops_when_eval_real_dies(rollouts: Iterator[Rollout]) -> None:
    for rollout in rollouts:
        rollout.start()
        owner = rollout.program.child("robots.ros2_owner_process")
        rollout.into_motion()
        at_ns = time.monotonic_ns()
        rollout.program.signal(signal.SIGKILL)
        rollout.program.wait()
        deadline_s = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{owner}").exists():
            assert time.monotonic() < deadline_s, "our node did not end"
            time.sleep(0.02)
        rollout.at_rest("eval_real.py", at_ns, 0.1 + stop_s(rollout.limits))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        pytest.param("JointState", "position", marks=only_long),
        ("JointTrajectory", "position"),
        pytest.param("Float64MultiArray", "position", marks=only_long),
        pytest.param("JointState", "velocity", marks=only_long),
        ("Float64MultiArray", "velocity"),
    ],
)
def test_the_robot_is_at_rest_after_a_rollout(tmp_path: Path, message: str, kind: str) -> None:
    """Positions stay at the last command; velocities are commanded to zero."""
    ros2_rig.interpreter()
    domain = ros2_rig.free_domain()
    numbers = {"position": ("-1.5", "1.5"), "velocity": ("-0.4", "0.4")}[kind]
    overrides = {
        "domain_id": str(domain), "start_pose": "null", "start_velocity": "null",
        "states": json.dumps([{"topic": JOINT_STATES, "joints": ["x", "lift"]}]),
        "commands": json.dumps([
            {"topic": "/command", "message": message, "joints": ["x"], "kinds": {"x": kind},
             "units": {"x": "rad/s" if kind == "velocity" else "rad"}},
            {"topic": "/lift", "message": "JointState", "joints": ["lift"]},
        ]),
        "limits.position_lower": f"[{numbers[0]}, -3]",
        "limits.position_upper": f"[{numbers[1]}, 3]",
        "limits.velocity": "[0.5, 0.5]", "limits.acceleration": "[2, 2]",
        "stops_alone_after_s": "0.5", "sensor_timeout_s": "5",
    }  # fmt: skip
    robot = arm(overrides)
    flags = [word for key, value in overrides.items() for word in (f"--robot.{key}", value)]
    policy = f"python:tests.faults.ros2_policy:make_{kind}"
    with ros2_rig.peers(tmp_path, domain, robot) as (joints, _):
        with Program(
            "eval_real.py", "-m", policy, "-c", str(ARM), *flags, "--task", "fake", "--yes",
            "-o", str(tmp_path), "--video_fps", "0", "--max_timesteps", "60",
            "--max_sensing_age_s", "5",
        ) as program:  # fmt: skip
            assert program.wait() == 0, program.said
        count = len(ros2_rig.read_commands(tmp_path, 2))
        joints.set_mode("/nothing", "sound")
        time.sleep(0.3)
        rows = ros2_rig.read_commands(tmp_path, 2)
    assert len(rows) == count > 60
    moved = rows["values"][:, 0]
    assert np.ptp(moved) > 0.1
    if kind == "velocity":
        assert moved[-1] == 0
    else:
        assert np.ptp(moved[-3:]) == 0
