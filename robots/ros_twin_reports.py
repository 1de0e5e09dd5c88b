"""Outcome and resets of a simulated robot over ROS, whichever ROS; a real robot has neither.

Both topics carry JSON in ``std_msgs/String``. A reset is the request ``{"id", "seed"}``. The robot
publishes, many times a second, the report ``{"id", "stamp_ns", "success", "reward", "steps"}`` with
the id of the last request that was handled and the stamp of the first state after it, or with
``"error"`` if it was refused.
"""

from __future__ import annotations

import json
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from robots.base import CameraSample, JointSample, Outcome
from robots.errors import RobotError
from robots.sim_twin import SimTwin

PERIOD_S = 0.01
"""Of joint states and reports; images are published when they arrive."""


def new_request(seed: int) -> tuple[str, str]:
    """The id of a new request for the episode ``seed``, and its message."""
    request = secrets.token_hex(8)
    return request, json.dumps({"id": request, "seed": seed})


class TwinReports:
    """The newest report. Written by the thread that receives, read by others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._report: Mapping[str, Any] = {}

    def receive(self, message: str) -> None:
        """Take over a report."""
        with self._changed:
            self._report = json.loads(message)
            self._changed.notify_all()

    @property
    def received(self) -> bool:
        """Whether there was a report."""
        return bool(self._report)

    def outcome(self) -> Outcome:
        """The outcome in the newest report."""
        with self._changed:
            report = self._report
        return Outcome(bool(report["success"]), float(report["reward"]), int(report["steps"]))

    def answer(self, request: str, timeout_s: float) -> int | None:
        """Wait for the answer to ``request``: the stamp of its first state, ns; None: none came.

        Raises:
            RobotError: The reset was refused; carries the reason.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._report.get("id") == request, timeout_s):
                return None
            if "error" in self._report:
                raise RobotError(f"the simulated robot refuses: {self._report['error']}")
            return int(self._report["stamp_ns"])


class TwinPublisher(ABC):
    """Publishes the twin's samples and reports, and handles resets. Used by one thread.

    Args:
        twin: Connected for sensing.
    """

    def __init__(self, twin: SimTwin) -> None:
        self._twin = twin
        self._reset_requests: list[str] = []
        self._report: dict[str, Any] = {"id": "", "stamp_ns": 0}
        self._published_stamps: dict[str, int] = {}

    def spin(self) -> None:
        """Handle resets and publish new samples and a report. Call once per ``PERIOD_S``."""
        while self._reset_requests:
            self._reset(self._reset_requests.pop(0))
        joints = self._twin.get_joints()
        if self._published_stamps.get("joints") != joints.stamp_ns:
            self._published_stamps["joints"] = joints.stamp_ns
            self._publish_joints(joints)
        for name, sample in self._twin.get_cameras().items():
            if self._published_stamps.get(name) != sample.stamp_ns:
                self._published_stamps[name] = sample.stamp_ns
                self._publish_image(name, sample)
        success, reward, steps = self._twin.outcome() or (False, 0.0, 0)
        report = {**self._report, "success": success, "reward": reward, "steps": steps}
        self._publish_report(json.dumps(report))

    def _queue_reset(self, request: str) -> None:
        self._reset_requests.append(request)

    def _reset(self, message: str) -> None:
        request = json.loads(message)
        try:
            self._twin.reset(int(request["seed"]))
        except RobotError as error:
            self._report = {**self._report, "id": request["id"], "error": str(error)}
            return
        self._clear_commands()
        self._report = {"id": request["id"], "stamp_ns": self._twin.get_joints().stamp_ns}

    @abstractmethod
    def _clear_commands(self) -> None:
        """Drop an incomplete command, at the start of an episode."""

    @abstractmethod
    def _publish_joints(self, sample: JointSample) -> None: ...

    @abstractmethod
    def _publish_image(self, name: str, sample: CameraSample) -> None: ...

    @abstractmethod
    def _publish_report(self, report: str) -> None: ...
