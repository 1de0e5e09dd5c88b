"""A ROS 2 node that publishes a simulated robot on the topics of a ``ros2`` configuration.

Started by ``robots.ros2_robot`` under a Python that has ``rclpy``. In addition to the robot's
topics it has an outcome and resets (``robots.ros_twin_reports``).
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from robots.base import CameraSample, JointSample, Role
from robots.errors import ContractViolated, RobotError, SensorLost
from robots.ros2_config import CommandTopic, Ros2Config, SimulatedRobot
from robots.ros2_messages import decode_command
from robots.ros2_node import MESSAGES, Ros2Node, set_stamp
from robots.ros_twin_reports import PERIOD_S, TwinPublisher
from robots.sim_twin import SimTwin
from robots.twin_config import TwinConfig
from transport.child_process import die_with_parent, send_event, stop_with_stdin

logger = logging.getLogger(__name__)


class TwinRos2Node(TwinPublisher):
    """Publishes the twin's samples and follows the command topics. Used by one thread.

    Args:
        ros: The process's node.
        config: The robot's configuration.
        topics: Of the outcome and resets.
        sensing, control: The twin, connected in these roles.
    """

    def __init__(
        self,
        ros: Ros2Node,
        config: Ros2Config,
        topics: SimulatedRobot,
        sensing: SimTwin,
        control: SimTwin,
    ) -> None:
        super().__init__(sensing)
        self._config, self._control = config, control
        self._joints = [ros.publisher(state.topic, "JointState") for state in config.states]
        self._images = {
            name: ros.publisher(camera.topic, "Image") for name, camera in config.cameras.items()
        }
        self._outcome = ros.publisher(topics.outcome, "String")
        self._clear_commands()
        first = 0
        for command in config.commands:
            receive = self._receiver(command, first)
            ros.subscribe(command.topic, command.message, receive, command.qos)
            first += len(command.joints)
        ros.subscribe(topics.reset, "String", lambda message: self._queue_reset(message.data))

    def _receiver(self, command: CommandTopic, first: int) -> Callable[[Any], None]:
        """The callback of a command topic, whose values begin at the index ``first``."""

        def receive(message: Any) -> None:
            try:
                values = decode_command(command, message)
                self._action[first : first + len(values)] = values
                self._control.send_action(self._action)
            except ContractViolated as error:
                logger.warning("%s: %s; it is ignored", command.topic, error)

        return receive

    def _clear_commands(self) -> None:
        joints = self._control.get_joints().position
        self._action = self._control.contract.rest_command(joints)

    def _publish_joints(self, sample: JointSample) -> None:
        first = 0
        for state, publisher in zip(self._config.states, self._joints, strict=True):
            message = MESSAGES["JointState"]()
            set_stamp(message, sample.stamp_ns)
            message.name = list(state.joints)
            message.position = sample.position[first : first + len(state.joints)].tolist()
            publisher.publish(message)
            first += len(state.joints)

    def _publish_image(self, name: str, sample: CameraSample) -> None:
        message = MESSAGES["Image"]()
        set_stamp(message, sample.stamp_ns)
        message.height, message.width = sample.image.shape[:2]
        message.encoding, message.step = "rgb8", 3 * message.width
        message.data.frombytes(sample.image.tobytes())
        self._images[name].publish(message)

    def _publish_report(self, report: str) -> None:
        self._outcome.publish(MESSAGES["String"](data=report))


def _run(config: Ros2Config, topics: SimulatedRobot, twin: TwinConfig) -> None:
    """Publish until this process is ended."""
    with SimTwin(twin) as sensing, SimTwin(twin) as control:
        sensing.connect(Role.SENSING)
        control.connect(Role.CONTROL)
        ros = Ros2Node("metronome_twin", config.discovery, config.domain_id)
        try:
            _spin(ros, TwinRos2Node(ros, config, topics, sensing, control))
        finally:
            ros.close()


def _spin(ros: Ros2Node, node: TwinRos2Node) -> None:
    send_event("ready")
    due_s = time.monotonic()
    while True:
        while (left_s := due_s - time.monotonic()) > 0:
            ros.executor.spin_once(timeout_sec=left_s)
        try:
            node.spin()
        except SensorLost as error:
            # The topics' subscribers notice a delayed simulator by themselves.
            logger.warning("%s", error)
        due_s = max(due_s + PERIOD_S, time.monotonic())


def main(arguments: list[str] | None = None) -> None:
    """Run the node until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--twin", required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    stop_with_stdin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = Ros2Config.from_json(options.config)
    if config.twin is None:
        sys.exit("twin_ros2_node: got a configuration without the key 'twin', expected one")
    try:
        _run(config, config.twin, TwinConfig.from_json(options.twin))
    except RobotError as error:
        send_event("failed", error=str(error), kind=type(error).__name__)
        sys.exit(f"twin_ros2_node: {error}")


if __name__ == "__main__":
    main()
