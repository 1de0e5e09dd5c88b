"""What a simulated robot tells over ROS that a real one cannot: its outcome, and being reset.

Both ends speak JSON in ``std_msgs/String``: a request ``{"id", "seed"}``, and many times a second a
report ``{"id", "stamp_ns", "success", "reward", "steps"}`` with the id of the last request done and
the stamp of the first state after it, or ``"error"`` where it was refused.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from robots.agilex_config import TwinTopics
from robots.base import Outcome
from robots.errors import RobotError, RobotLost, SensorLost
from robots.ros_node import import_ros, publisher
from robots.sample_stream import SampleStream

RESET_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.002


class TwinChannel:
    """The client's end."""

    def __init__(self, rospy: Any, topics: TwinTopics) -> None:
        self._string = import_ros("std_msgs.msg").String
        self._topics = topics
        self._news = threading.Condition()
        self._report: Mapping[str, Any] = {}
        self._requests = publisher(rospy, topics.reset, self._string, queue_size=4)
        self._reports = rospy.Subscriber(
            topics.outcome, self._string, self._receive, queue_size=1, tcp_nodelay=True
        )

    def wait(self, deadline_s: float, timeout_s: float) -> None:
        """Until both topics are connected. Raises ``SensorLost`` at the deadline."""
        while not self._report or not self._requests.get_num_connections():
            if time.monotonic() >= deadline_s:
                raise SensorLost(
                    f"no simulated robot on {self._topics.outcome} and {self._topics.reset} within "
                    f"{timeout_s:g} s: is robots.twin_ros_node running?"
                )
            time.sleep(LOOK_AGAIN_S)

    def outcome(self) -> Outcome:
        with self._news:
            report = self._report
        return Outcome(bool(report["success"]), float(report["reward"]), int(report["steps"]))

    def reset(self, seed: int) -> int:
        """Begin the episode ``seed``; the stamp of its first state.

        Raises:
            RobotLost: No answer.
            RobotError: It was refused.
        """
        request = secrets.token_hex(8)
        self._requests.publish(self._string(json.dumps({"id": request, "seed": seed})))
        with self._news:
            if not self._news.wait_for(
                lambda: self._report.get("id") == request, timeout=RESET_TIMEOUT_S
            ):
                raise RobotLost(
                    f"no answer to a reset on {self._topics.reset} within {RESET_TIMEOUT_S:g} s"
                )
            if "error" in self._report:
                raise RobotError(f"the simulated robot refuses: {self._report['error']}")
            return int(self._report["stamp_ns"])

    def wait_for_stamp(self, stream: SampleStream[Any], stamp_ns: int) -> None:
        """Until ``stream`` shows something from ``stamp_ns`` on. Raises ``SensorLost``."""
        deadline_s = time.monotonic() + RESET_TIMEOUT_S
        while stream.newest().stamp_ns < stamp_ns:
            if time.monotonic() >= deadline_s:
                raise SensorLost(f"{stream.name}: nothing new since the reset")
            time.sleep(LOOK_AGAIN_S)

    def close(self) -> None:
        self._reports.unregister()

    def _receive(self, message: Any) -> None:
        with self._news:
            self._report = json.loads(message.data)
            self._news.notify_all()
