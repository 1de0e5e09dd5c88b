"""A ROS 2 node in this process, which runs under a Python that has ``rclpy``.

Only the owner process and the simulated robot's node import this module.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rclpy
import sensor_msgs.msg
import std_msgs.msg
import trajectory_msgs.msg
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from robots.errors import ContractViolated, SensorLost
from robots.ros2_config import Discovery

POLL_PERIOD_S = 0.02
CLOSE_TIMEOUT_S = 2.0
MESSAGES: Mapping[str, Any] = {
    "Image": sensor_msgs.msg.Image,
    "CompressedImage": sensor_msgs.msg.CompressedImage,
    "JointState": sensor_msgs.msg.JointState,
    "JointTrajectory": trajectory_msgs.msg.JointTrajectory,
    "Float64MultiArray": std_msgs.msg.Float64MultiArray,
    "String": std_msgs.msg.String,
}
"""A message's name to its class."""
RELIABILITY = {
    "reliable": QoSReliabilityPolicy.RELIABLE,
    "best_effort": QoSReliabilityPolicy.BEST_EFFORT,
}


def full_type(message: str) -> str:
    """The type's name with its package, e.g. ``sensor_msgs/msg/Image``."""
    kind = MESSAGES[message]
    return f"{kind.__module__.partition('.')[0]}/msg/{message}"


def stamp_ns(message: Any) -> int:
    """A message's ``header.stamp`` in nanoseconds."""
    stamp = message.header.stamp
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def set_stamp(message: Any, stamp_ns: int) -> None:
    """Set a message's ``header.stamp``."""
    stamp = message.header.stamp
    stamp.sec, stamp.nanosec = divmod(stamp_ns, 10**9)


class Ros2Node:
    """This process's node, until the process ends.

    Args:
        name: The node's; the process id is added to it.
        discovery: Where other nodes are looked for.
        domain_id: None: ``ROS_DOMAIN_ID``.

    Attributes:
        node: The ``rclpy`` node.
        executor: Calls the callbacks while its user, or ``spin_in_thread``, spins it.
        where: Where other nodes are looked for, for errors.
    """

    def __init__(self, name: str, discovery: Discovery, domain_id: int | None) -> None:
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = discovery.upper()
        # The program has its own signal handlers.
        rclpy.init(domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        self.node: Any = rclpy.create_node(
            f"{name}_{os.getpid()}", enable_rosout=False, start_parameter_services=False
        )
        self.executor: Any = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self._spinner: threading.Thread | None = None
        domain = self.node.context.get_domain_id()
        self.where = (
            f"ROS domain {domain} on {'this host' if discovery == 'localhost' else 'the subnet'}"
        )

    def spin_in_thread(self) -> None:
        """Have a thread call the callbacks until ``close``."""
        self._spinner = threading.Thread(target=self.executor.spin, name="rclpy", daemon=True)
        self._spinner.start()

    def subscribe(
        self, topic: str, message: str, callback: Callable[[Any], None], qos: str = "reliable"
    ) -> None:
        """Have ``callback`` called with each message."""
        profile = QoSProfile(depth=1, reliability=RELIABILITY[qos])
        self.node.create_subscription(MESSAGES[message], topic, callback, profile)

    def publisher(self, topic: str, message: str, qos: str = "reliable") -> Any:
        """A publisher of ``topic``."""
        profile = QoSProfile(depth=1, reliability=RELIABILITY[qos])
        return self.node.create_publisher(MESSAGES[message], topic, profile)

    def published_types(self, topics: Sequence[str], deadline_s: float) -> dict[str, str]:
        """Wait for a publisher of each of ``topics``; returns the types that they publish.

        Args:
            topics: Their names.
            deadline_s: By ``time.monotonic``.

        Raises:
            SensorLost: Some have none; names them, the topics that there are, and where was looked.
            ContractViolated: A topic has several types.
        """
        while missing := [topic for topic in topics if not self.node.count_publishers(topic)]:
            if time.monotonic() >= deadline_s:
                raise SensorLost(
                    f"got no publisher of {missing} in {self.where}, expected one of each; there "
                    f"are {self._others()}. Are the nodes running? Nodes on other hosts are found "
                    "with --ros_discovery subnet only"
                )
            time.sleep(POLL_PERIOD_S)
        return {topic: self._type(topic) for topic in topics}

    def check_reliability(self, topic: str, qos: str) -> None:
        """Raises ``ContractViolated`` if a publisher cannot serve a subscription of ``qos``."""
        publishers = self.node.get_publishers_info_by_topic(topic)
        offered = {info.qos_profile.reliability for info in publishers}
        if qos == "reliable" and RELIABILITY["best_effort"] in offered:
            raise ContractViolated(
                f"{topic}: qos: got a publisher that is best_effort, expected reliable; set the "
                "topic's key `qos: best_effort`"
            )

    def taken_type(self, topic: str) -> str | None:
        """The type that the subscribers of ``topic`` take; None without a subscriber.

        Raises:
            ContractViolated: They take several types.
        """
        return self._type(topic) if self.node.count_subscribers(topic) else None

    def close(self) -> None:
        """End the node: other nodes learn it at once, and its shared memory is removed.

        The process ends ``CLOSE_TIMEOUT_S`` later if that hangs.
        """
        late = threading.Timer(CLOSE_TIMEOUT_S, os._exit, (0,))
        late.daemon = True
        late.start()
        self.executor.shutdown(timeout_sec=CLOSE_TIMEOUT_S)
        if self._spinner is not None:
            # The node lives on while the executor still waits for its messages.
            self._spinner.join()
        self.node.destroy_node()
        rclpy.shutdown()
        late.cancel()

    def _type(self, topic: str) -> str:
        types = dict(self.node.get_topic_names_and_types())[self.node.resolve_topic_name(topic)]
        if len(types) != 1:
            raise ContractViolated(f"{topic}: got messages of the types {types}, expected one type")
        return str(types[0])

    def _others(self) -> list[str]:
        names = [name for name, _ in self.node.get_topic_names_and_types()]
        return [name for name in names if self.node.count_publishers(name)] or ["no topics"]
