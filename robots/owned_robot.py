"""Base class of robots whose owner process is started here and forwards commands to a device."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.attached_robot import AttachedRobot
from robots.base import Role
from robots.errors import RobotError, RobotLost, SensorLost, StampFault
from transport.child_process import ChildProcess

FAILURE_REASON_TIMEOUT_S, LOOP_FAILURE_REASON_TIMEOUT_S = 0.2, 0.02
"""The second where the control loop waits, which has to brake meanwhile."""
CLOSE_TIMEOUT_S = 10.0
"""For the owner to notice that no client commands the robot any more, and to stop its motion."""


class OwnedRobot(AttachedRobot):
    """One process's connection to the owner process, which ``companion`` starts and ends.

    ``connect`` outside ``companion`` starts an owner process that ends with the connection.
    """

    _own_process: ChildProcess | None = None

    @abstractmethod
    def _start_owner(self) -> ChildProcess:
        """Start the owner process and wait until it is ready; its ``ready`` has an ``address``."""

    @abstractmethod
    def _set_address(self, address: str | None) -> None:
        """Change ``address``."""

    @property
    def _overrides(self) -> Mapping[str, str]:
        """Overrides of the configuration for other processes, beside the address."""
        return {}

    @contextlib.contextmanager
    def companion(self) -> Iterator[Mapping[str, str]]:
        """Run the owner process until the context is left or this process ends.

        Raises:
            ConnectFailed: The device cannot be reached; carries the reason.
            SensorLost, ContractViolated: The first samples are incomplete, or do not fit the
                contract.
        """
        if self.address is not None:
            yield self._overrides  # another program has started one
            return
        child = self._start_owner()
        try:
            self._set_address(child.ready["address"])
            yield {**self._overrides, "address": child.ready["address"]}
        finally:
            self._set_address(None)
            child.close(CLOSE_TIMEOUT_S)

    def _connect(self, role: Role, timeout_s: float) -> None:
        if self.address is None:
            self._own_process = self._start_owner()
            self._set_address(self._own_process.ready["address"])
        super()._connect(role, timeout_s)

    def _send_action(self, action: NDArray[np.float32]) -> None:
        connection, sensor_memory = self._connected()
        connection.send_action(action)
        if sensor_memory.refused_since_ns.load():
            reason = _in_brackets(self._failure("commands"))
            raise RobotLost(f"{self.name}: commands do not reach it{reason}")

    def _sensor_error(self, name: str, message: str) -> RobotError:
        failure = self._failure(name)
        if "kind" not in failure:
            return SensorLost(f"{message}{_in_brackets(failure)}")
        # Invalid samples are a lost sensor, too: a fault that can be resumed when they have ended.
        kind = StampFault if failure["kind"] == StampFault.__name__ else SensorLost
        return kind(f"{self.name}: {failure['reason']}")

    def _failure(self, name: str) -> Mapping[str, Any]:
        """The owner's reply to ``failure_reason``; empty if it does not answer in time."""
        in_loop = self._role is Role.CONTROL
        timeout_s = LOOP_FAILURE_REASON_TIMEOUT_S if in_loop else FAILURE_REASON_TIMEOUT_S
        with contextlib.suppress(RobotError):
            return self._connected()[0].call("failure_reason", timeout_s=timeout_s, source=name)
        return {}

    def _disconnect(self) -> None:
        super()._disconnect()
        if self._own_process is not None:
            self._own_process.close(CLOSE_TIMEOUT_S)
            self._own_process = None
            self._set_address(None)


def _in_brackets(failure: Mapping[str, Any]) -> str:
    reason = failure.get("reason")
    return f" ({reason})" if reason else ""
