"""The ROS 1 driver's end of ``robots.ros_twin_reports``."""

from __future__ import annotations

import time
from typing import Any

from robots.agilex_config import TwinTopics
from robots.base import Outcome
from robots.errors import RobotLost, SensorLost
from robots.ros_node import import_ros, publisher
from robots.ros_twin_reports import TwinReports, new_request
from robots.sample_buffer import SampleBuffer

RESET_TIMEOUT_S = 10.0
POLL_PERIOD_S = 0.002


class TwinChannel:
    """The client's end of both topics.

    Args:
        rospy: The module, with a running node.
        topics: Their names.
    """

    def __init__(self, rospy: Any, topics: TwinTopics) -> None:
        self._string = import_ros("std_msgs.msg").String
        self._topics = topics
        self._newest = TwinReports()
        self._requests = publisher(rospy, topics.reset, self._string, queue_size=4)
        self._reports = rospy.Subscriber(
            topics.outcome,
            self._string,
            lambda message: self._newest.receive(message.data),
            queue_size=1,
            tcp_nodelay=True,
        )

    def wait(self, deadline_s: float, timeout_s: float) -> None:
        """Wait until both topics are connected. Raises ``SensorLost`` at ``deadline_s``."""
        while not self._newest.received or not self._requests.get_num_connections():
            if time.monotonic() >= deadline_s:
                raise SensorLost(
                    f"got no simulated robot on {self._topics.outcome} and {self._topics.reset} "
                    f"within {timeout_s:g} s, expected one: is `python -m robots.twin_ros_node` "
                    "running?"
                )
            time.sleep(POLL_PERIOD_S)

    def outcome(self) -> Outcome:
        """The outcome in the newest report."""
        return self._newest.outcome()

    def reset(self, seed: int) -> int:
        """Begin the episode ``seed`` and wait for it; returns the stamp of its first state, ns.

        Raises:
            RobotLost: No answer within ``RESET_TIMEOUT_S``.
            RobotError: The reset was refused; carries the reason.
        """
        request, message = new_request(seed)
        self._requests.publish(self._string(message))
        stamp_ns = self._newest.answer(request, RESET_TIMEOUT_S)
        if stamp_ns is None:
            raise RobotLost(
                f"no answer to a reset on {self._topics.reset} within {RESET_TIMEOUT_S:g} s: "
                "is robots.twin_ros_node still running?"
            )
        return stamp_ns

    def wait_for_stamp(self, stream: SampleBuffer[Any], stamp_ns: int) -> None:
        """Wait for a sample of ``stream`` stamped ``stamp_ns`` or later. Raises ``SensorLost``."""
        deadline_s = time.monotonic() + RESET_TIMEOUT_S
        while stream.newest().stamp_ns < stamp_ns:
            if time.monotonic() >= deadline_s:
                raise SensorLost(
                    f"{stream.name}: nothing new since the reset, expected a sample within "
                    f"{RESET_TIMEOUT_S:g} s"
                )
            time.sleep(POLL_PERIOD_S)

    def close(self) -> None:
        """Unsubscribe."""
        self._reports.unregister()
