"""A ROS 1 node with the topics of Agilex's robot, which moves a simulated robot.

    python -m robots.twin_ros_node --robot_config agilex_aloha_twin --twin_config sim_twin

Needs a ROS master. Publishes joint states and images on the topics of the first configuration, in
the twin's units, stamped by the simulation's own clock; follows its command topics. In addition to
the real robot's topics it has an outcome and resets (``robots.ros_twin_reports``).
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
from robots.base import CameraSample, JointSample, Role
from robots.errors import ConfigError, RobotError, SensorLost
from robots.factory import make_robot
from robots.ros_twin_reports import PERIOD_S, TwinPublisher
from robots.sim_twin import SimTwin

logger = logging.getLogger(__name__)

SIM_CAMERAS = {"front": "top", "left": "left_wrist", "right": "right_wrist"}
"""The robot's camera to the twin's camera that replaces it."""
RAW = argparse.RawDescriptionHelpFormatter


class CommandAssembler:
    """Joins the messages for both arms: two with the same stamp are one command.

    If the message for the other arm never arrives, the first is sent when the next command begins.

    Args:
        twin: Connected for control.
    """

    def __init__(self, twin: SimTwin) -> None:
        self._twin = twin
        self._lock = threading.Lock()
        self._action = twin.get_joints().position[:ACTION_DIM].copy()
        self._stamps = dict.fromkeys(SIDES, -1)

    def receive(self, side: str, message: Any) -> None:
        """Add the message for the arm ``side``; send the command if it is complete."""
        if len(message.position) != JOINTS_PER_ARM or not np.isfinite(message.position).all():
            logger.warning(
                "%s arm: got the command %s, expected %d finite numbers; it is ignored",
                side, list(message.position), JOINTS_PER_ARM,
            )  # fmt: skip
            return
        first = SIDES.index(side) * JOINTS_PER_ARM
        stamp_ns = message.header.stamp.to_nsec()
        with self._lock:
            incomplete = len(set(self._stamps.values())) > 1
            if incomplete and stamp_ns not in self._stamps.values():
                self._send()
            self._action[first : first + JOINTS_PER_ARM] = message.position
            self._stamps[side] = stamp_ns
            if len(set(self._stamps.values())) == 1:
                self._send()

    def clear(self) -> None:
        """Drop an incomplete command, at the start of an episode."""
        with self._lock:
            self._action[:] = self._twin.get_joints().position[:ACTION_DIM]
            self._stamps = dict.fromkeys(SIDES, -1)

    def _send(self) -> None:
        try:
            self._twin.send_action(self._action)
        except RobotError as error:  # the main thread sees it too, and ends
            logger.error("a command could not be sent to the simulator: %s", error)


class TwinNode(TwinPublisher):
    """Publishes the twin's samples on the robot's topics. Used by the main thread.

    Args:
        rospy: The module, with a running node.
        robot: Its configuration has the topics.
        topics: Of the outcome and resets.
        sensing, control: The twin, connected in these roles.
    """

    def __init__(
        self, rospy: Any, robot: AgilexAloha, topics: TwinTopics, sensing: SimTwin, control: SimTwin
    ) -> None:
        super().__init__(sensing)
        self._config = robot.config
        self._time = rospy.Time
        self._sensors: Any = ros_node.import_ros("sensor_msgs.msg")
        self._string = ros_node.import_ros("std_msgs.msg").String
        self._commands = CommandAssembler(control)
        operator = robot.config.ros_operator
        options: dict[str, Any] = {"queue_size": 1, "tcp_nodelay": True}
        self._joints = {
            side: rospy.Publisher(
                getattr(operator, f"puppet_arm_{side}_topic"), self._sensors.JointState, **options
            )
            for side in SIDES
        }
        self._image_publishers = {
            name: rospy.Publisher(
                getattr(operator, f"img_{camera.camera}_topic"), self._sensors.Image, **options
            )
            for name, camera in robot.config.cameras.items()
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
        rospy.Subscriber(
            topics.reset, self._string, lambda message: self._queue_reset(message.data)
        )

    def _clear_commands(self) -> None:
        self._commands.clear()

    def _publish_report(self, report: str) -> None:
        self._outcome.publish(self._string(report))

    def _publish_joints(self, sample: JointSample) -> None:
        for index, side in enumerate(SIDES):
            message = self._sensors.JointState()
            message.header.stamp = self._stamp(sample.stamp_ns)
            message.name = list(self._config.joint_names)
            first = index * JOINTS_PER_ARM
            message.position = sample.position[first : first + JOINTS_PER_ARM].tolist()
            self._joints[side].publish(message)

    def _publish_image(self, name: str, sample: CameraSample) -> None:
        message = self._sensors.Image()
        message.header.stamp = self._stamp(sample.stamp_ns)
        message.height, message.width = sample.image.shape[:2]
        message.encoding, message.step = "rgb8", 3 * message.width
        message.data = sample.image.tobytes()
        self._image_publishers[name].publish(message)

    def _stamp(self, stamp_ns: int) -> Any:
        seconds, nanoseconds = divmod(stamp_ns, 10**9)
        return self._time(seconds, nanoseconds)


@contextlib.contextmanager
def twin_node(robot_config: str, twin_config: str) -> Iterator[TwinNode]:
    """Run the simulator and its ROS node.

    Args:
        robot_config: Of an ``agilex_aloha`` robot with the key ``twin``.
        twin_config: Of a ``sim_twin`` robot.

    Raises:
        RobotError: A configuration is invalid, the simulator did not start, or no master answers.
    """
    robot = make_robot(robot_config)
    if not isinstance(robot, AgilexAloha) or robot.config.twin is None:
        raise ConfigError(
            f"{robot_config}: got {type(robot).__name__}, expected an agilex_aloha robot with the "
            "key 'twin', e.g. agilex_aloha_twin"
        )
    cameras = {
        name: {"camera": SIM_CAMERAS[camera.camera], "hw": list(camera.hw)}
        for name, camera in robot.config.cameras.items()
    }
    sensing = make_robot(twin_config, {"cameras": json.dumps(cameras)})
    if not isinstance(sensing, SimTwin):
        raise ConfigError(f"{twin_config}: got {type(sensing).__name__}, expected a sim_twin robot")
    with sensing.companion(), SimTwin(sensing.config) as control, sensing:
        rospy = ros_node.start_node("twin", timeout_s=5.0)
        sensing.connect(Role.SENSING)
        control.connect(Role.CONTROL)
        yield TwinNode(rospy, robot, robot.config.twin, sensing, control)


def main(arguments: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM; see the module for the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("-c", "--robot_config", default="agilex_aloha_twin")
    parser.add_argument("-t", "--twin_config", default="sim_twin")
    parser.add_argument("--stop_with_stdin", action="store_true", help="end when stdin does")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    inputs = [sys.stdin] if options.stop_with_stdin else []
    try:
        with twin_node(options.robot_config, options.twin_config) as node:
            logger.info(
                "the simulated robot publishes on ROS; configuration: %s", options.robot_config
            )
            due_s = time.monotonic()
            while not select.select(inputs, [], [], max(0.0, due_s - time.monotonic()))[0]:
                try:
                    node.spin()
                except SensorLost as error:
                    # The topics' subscribers notice a delayed simulator by themselves.
                    logger.warning("%s", error)
                due_s = max(due_s + PERIOD_S, time.monotonic())
    except RobotError as error:
        sys.exit(f"twin_ros_node: {error}")


if __name__ == "__main__":
    main()
