"""A ROS 1 node that is Agilex's robot to everyone who asks, and moves a simulated one.

    python -m robots.twin_ros_node --robot_config agilex_aloha_twin --twin_config sim_twin

Needs a ROS master. Publishes joints and pictures on the topics of the first configuration, in the
twin's units, with the simulation's own clock as stamps; obeys its command topics. Beyond what the
real robot has: an outcome, and resets (``robots.ros_twin_channel``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from robots import ros_node
from robots.agilex_aloha import AgilexAloha
from robots.agilex_config import ACTION_DIM, JOINTS_PER_ARM, SIDES, TwinTopics
from robots.base import CameraSample, Role
from robots.errors import ConfigError, RobotError, SensorLost
from robots.factory import make_robot
from robots.sim_twin import SimTwin

logger = logging.getLogger(__name__)

SIM_CAMERAS = {"front": "top", "left": "left_wrist", "right": "right_wrist"}
"""Where the twin's cameras are that stand for the robot's."""
RAW = argparse.RawDescriptionHelpFormatter
PERIOD_S = 0.01
"""Of joint states and reports; pictures as they come."""


class Commands:
    """Two arms' messages put together: two halves with one stamp are one command.

    A half whose other never comes is obeyed when the next command begins.
    """

    def __init__(self, twin: SimTwin) -> None:
        self._twin = twin
        self._lock = threading.Lock()
        self._action = twin.get_joints().position[:ACTION_DIM].copy()
        self._stamps = dict.fromkeys(SIDES, -1)

    def receive(self, side: str, message: Any) -> None:
        if len(message.position) != JOINTS_PER_ARM or not np.isfinite(message.position).all():
            logger.warning("%s arm: a command of %s is ignored", side, list(message.position))
            return
        first = SIDES.index(side) * JOINTS_PER_ARM
        stamp_ns = message.header.stamp.to_nsec()
        with self._lock:
            half_is_waiting = len(set(self._stamps.values())) > 1
            if half_is_waiting and stamp_ns not in self._stamps.values():
                self._send()
            self._action[first : first + JOINTS_PER_ARM] = message.position
            self._stamps[side] = stamp_ns
            if len(set(self._stamps.values())) == 1:
                self._send()

    def forget(self) -> None:
        """A new episode: what was commanded before is nothing to be completed."""
        with self._lock:
            self._action[:] = self._twin.get_joints().position[:ACTION_DIM]
            self._stamps = dict.fromkeys(SIDES, -1)

    def _send(self) -> None:
        try:
            self._twin.send_action(self._action)
        except RobotError as error:  # the main thread sees it too, and ends
            logger.error("a command did not reach the simulator: %s", error)


class TwinNode:
    """The node, publishing whatever the twin shows. Belongs to the main thread."""

    def __init__(
        self, rospy: Any, robot: AgilexAloha, topics: TwinTopics, sensing: SimTwin, control: SimTwin
    ) -> None:
        self._config, self._twin = robot.config, sensing
        self._time = rospy.Time
        self._sensors: Any = ros_node.import_ros("sensor_msgs.msg")
        self._string = ros_node.import_ros("std_msgs.msg").String
        self._commands = Commands(control)
        self._asked: list[str] = []
        self._report: dict[str, Any] = {"id": "", "stamp_ns": 0}
        self._shown: dict[str, int] = {}
        operator = robot.config.ros_operator
        options: dict[str, Any] = {"queue_size": 1, "tcp_nodelay": True}
        self._joints = {
            side: rospy.Publisher(
                getattr(operator, f"puppet_arm_{side}_topic"), self._sensors.JointState, **options
            )
            for side in SIDES
        }
        self._pictures = {
            name: rospy.Publisher(
                getattr(operator, f"img_{given.camera}_topic"), self._sensors.Image, **options
            )
            for name, given in robot.config.cameras.items()
        }
        self._outcome = rospy.Publisher(topics.outcome, self._string, **options)
        for side in SIDES:
            rospy.Subscriber(
                getattr(operator, f"puppet_arm_{side}_cmd_topic"),
                self._sensors.JointState,
                lambda message, side=side: self._commands.receive(side, message),
                queue_size=8,
                tcp_nodelay=True,
            )
        rospy.Subscriber(topics.reset, self._string, lambda message: self._ask(message.data))

    def _ask(self, request: str) -> None:
        self._asked.append(request)

    def spin(self) -> None:
        """One round: what was asked for, and what is new."""
        while self._asked:
            self._reset(self._asked.pop(0))
        self._publish_joints()
        for name, sample in self._twin.get_cameras().items():
            if self._shown.get(name) != sample.stamp_ns:
                self._shown[name] = sample.stamp_ns
                self._publish_picture(name, sample)
        success, reward, steps = self._twin.outcome() or (False, 0.0, 0)
        report = {**self._report, "success": success, "reward": reward, "steps": steps}
        self._outcome.publish(self._string(json.dumps(report)))

    def _reset(self, request: str) -> None:
        asked = json.loads(request)
        try:
            self._twin.reset(int(asked["seed"]))
        except RobotError as error:
            self._report = {**self._report, "id": asked["id"], "error": str(error)}
            return
        self._commands.forget()
        self._report = {"id": asked["id"], "stamp_ns": self._twin.get_joints().stamp_ns}

    def _publish_joints(self) -> None:
        sample = self._twin.get_joints()
        if self._shown.get("joints") == sample.stamp_ns:
            return
        self._shown["joints"] = sample.stamp_ns
        for index, side in enumerate(SIDES):
            message = self._sensors.JointState()
            message.header.stamp = self._stamp(sample.stamp_ns)
            message.name = list(self._config.joint_names)
            first = index * JOINTS_PER_ARM
            message.position = sample.position[first : first + JOINTS_PER_ARM].tolist()
            self._joints[side].publish(message)

    def _publish_picture(self, name: str, sample: CameraSample) -> None:
        message = self._sensors.Image()
        message.header.stamp = self._stamp(sample.stamp_ns)
        message.height, message.width = sample.image.shape[:2]
        message.encoding, message.step = "rgb8", 3 * message.width
        message.data = sample.image.tobytes()
        self._pictures[name].publish(message)

    def _stamp(self, stamp_ns: int) -> Any:
        seconds, nanoseconds = divmod(stamp_ns, 10**9)
        return self._time(seconds, nanoseconds)


@contextlib.contextmanager
def twin_node(robot_config: str, twin_config: str) -> Iterator[TwinNode]:
    """The simulator and the node beside it.

    Raises:
        RobotError: A configuration, the simulator or the master is not what it should be.
    """
    robot = make_robot(robot_config)
    if not isinstance(robot, AgilexAloha) or robot.config.twin is None:
        raise ConfigError(f"{robot_config}: expected an agilex_aloha robot with the key 'twin'")
    cameras = {
        name: {"camera": SIM_CAMERAS[given.camera], "hw": list(given.hw)}
        for name, given in robot.config.cameras.items()
    }
    sensing = make_robot(twin_config, {"cameras": json.dumps(cameras)})
    if not isinstance(sensing, SimTwin):
        raise ConfigError(f"{twin_config}: expected a sim_twin robot")
    with sensing.companion(), SimTwin(sensing.config) as control, sensing:
        rospy = ros_node.start_node("twin", timeout_s=5.0)
        sensing.connect(Role.SENSING)
        control.connect(Role.CONTROL)
        yield TwinNode(rospy, robot, robot.config.twin, sensing, control)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("-c", "--robot_config", default="agilex_aloha_twin")
    parser.add_argument("-t", "--twin_config", default="sim_twin")
    parser.add_argument("--stop_with_stdin", action="store_true", help="end when stdin does")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    watched = [sys.stdin] if options.stop_with_stdin else []
    try:
        with twin_node(options.robot_config, options.twin_config) as node:
            logger.info(
                "the simulated robot is on ROS; its configuration: %s", options.robot_config
            )
            due_s = time.monotonic()
            while not select.select(watched, [], [], max(0.0, due_s - time.monotonic()))[0]:
                try:
                    node.spin()
                except SensorLost as error:
                    # A robot that is held up says nothing for a while; who listens notices.
                    logger.warning("%s", error)
                due_s = max(due_s + PERIOD_S, time.monotonic())
    except RobotError as error:
        sys.exit(f"twin_ros_node: {error}")


if __name__ == "__main__":
    main()
