"""Base class of a robot's owner process: serves connections, forwards commands, stops alone.

Commands are followed within the velocity limits (``CommandDelivery``). Positions keep their last
command. Velocities without a command are brought to zero. The process runs while any client
commands the robot, even after its parent has died.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import ActionKind, ActionSpec
from robots.command_delivery import UNCOMMANDED_S, CommandDelivery
from robots.errors import RobotError
from robots.joint_limits import JointLimits
from robots.owner_server import OwnerServer
from robots.sensor_memory import SensorMemory

EXIT_TIMEOUT_S = 8.0
"""After the parent's end: for clients to bring the robot to rest and to disconnect."""


class DeviceOwner(ABC):
    """Serves connections and forwards commands to the device. Used by one thread.

    Args:
        sensor_memory: Where the subclass publishes sensor samples.
        memory_fd: Its file descriptor.
        actions: The A numbers of a command.
        limits: Their limits.
        last_sent: (A,) float32, the command at which the device is at rest now.
        period_s: From one ``_tick`` to the next.

    Attributes:
        address: Where it listens.
        parent_ended: Set by another thread: stop once no client commands the robot.
        stop_requested: Set by a signal handler: stop now.
    """

    def __init__(
        self,
        sensor_memory: SensorMemory,
        memory_fd: int,
        *,
        actions: Sequence[ActionSpec],
        limits: JointLimits,
        last_sent: NDArray[np.float32],
        period_s: float,
    ) -> None:
        self._sensor_memory, self._limits, self._period_s = sensor_memory, limits, period_s
        kinds = [spec.kind for spec in actions]
        self._velocity_mask = np.array([kind is ActionKind.VELOCITY for kind in kinds])
        self._delta_mask = np.array([kind is ActionKind.DELTA for kind in kinds])
        self._pending: NDArray[np.float32] | None = None
        self._commanded_ns = self._sent_ns = 0
        self._failures: dict[str, str] = {}
        self.parent_ended = threading.Event()
        self.stop_requested = threading.Event()
        self._last_sent = last_sent
        self._delivery = CommandDelivery(limits, actions, last_sent)
        self._server = OwnerServer(
            sensor_memory,
            memory_fd,
            action_dim=len(kinds),
            hello={"qpos": 0},
            command=self._receive_command,
            call=self._handle_call,
        )
        self.address = self._server.address

    def run(self) -> None:
        """Serve until a stop is requested, or the parent has ended and no client commands."""
        period_ns = round(1e9 * self._period_s)
        due_ns = time.monotonic_ns()
        while not self._must_stop():
            wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9
            for ready in select.select(self._server.sockets, [], [], wait_s)[0]:
                if isinstance(ready, socket.socket):
                    self._server.serve(ready)
            if self._pending is not None:
                self._follow(self._pending)  # only the newest of the commands that have arrived
            if self._moves_uncommanded():
                self._brake()
            if (now_ns := time.monotonic_ns()) >= due_ns:
                self._tick()
                due_ns = max(due_ns + period_ns, now_ns)

    def stop_motion(self) -> None:
        """Bring all velocities to zero within the limits."""
        while self._last_sent[self._velocity_mask].any():
            self._brake()
            time.sleep(self._period_s)

    def watch_parent(self, input_fd: int) -> None:
        """Notice the parent's end, even while the main thread is blocked. Returns at once.

        Args:
            input_fd: Ends when the parent ends.
        """

        def watch() -> None:
            while os.read(input_fd, 4096):
                pass
            self.parent_ended.set()
            time.sleep(EXIT_TIMEOUT_S)
            os._exit(0)

        threading.Thread(target=watch, name="parent", daemon=True).start()

    @abstractmethod
    def _write(self, action: NDArray[np.float32]) -> str:
        """Send ``action``, (A,), to the device; returns why that failed, empty if it did not."""

    @abstractmethod
    def _tick(self) -> None:
        """Called once per period."""

    @abstractmethod
    def _handle_call(self, call: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer a client's call; ``{"error": …}`` refuses it."""

    def _restart_at(self, command: NDArray[np.float32]) -> None:
        """Take ``command``, (A,), for the last one: the device was moved without commands."""
        self._last_sent, self._pending = command, None
        self._delivery.reset(command, time.monotonic_ns())

    def _must_stop(self) -> bool:
        if self.stop_requested.is_set():
            return True
        commanding = any(role != "sensing" for role in self._server.roles)
        return self.parent_ended.is_set() and not commanding

    def _receive_command(self, action: NDArray[np.float32], sent_ns: int, source: int) -> None:
        del source
        self._delivery.record_arrival(sent_ns)
        self._pending, self._commanded_ns = action.copy(), time.monotonic_ns()

    def _follow(self, wanted: NDArray[np.float32]) -> None:
        """Send ``wanted``, or the step towards it that the limits allow."""
        try:
            action = self._delivery.follow(wanted, time.monotonic_ns())
        except RobotError as error:
            self._refuse(str(error))
            self._pending = None
        else:
            self._send(action)
            if np.array_equal(action, wanted):
                self._pending = None

    def _refuse(self, reason: str) -> None:
        """Report to all clients that commands do not reach the device."""
        self._failures["commands"] = reason
        if not self._sensor_memory.refused_since_ns.load():
            self._sensor_memory.refused_since_ns.store(time.monotonic_ns())

    def _send(self, action: NDArray[np.float32]) -> None:
        self._last_sent, self._sent_ns = action, time.monotonic_ns()
        if failure := self._write(action):
            self._refuse(failure)
        elif not self._delivery.refused:
            self._sensor_memory.refused_since_ns.store(0)

    def _moves_uncommanded(self) -> bool:
        """Whether a velocity is not zero, and has no command or its commands are refused."""
        since_ns = time.monotonic_ns() - self._commanded_ns
        uncommanded = since_ns > UNCOMMANDED_S * 1e9 or self._delivery.refused
        return bool(self._last_sent[self._velocity_mask].any() and uncommanded)

    def _brake(self) -> None:
        """Send the last command with its velocities reduced as far as the limits allow."""
        action = self._last_sent.copy()
        now_ns = time.monotonic_ns()
        since_s = min((now_ns - self._sent_ns) / 1e9, self._period_s)
        change = (self._limits.acceleration * since_s).astype(np.float32)
        speed = np.maximum(np.abs(action) - change, 0) * np.sign(action)
        action[self._velocity_mask] = speed[self._velocity_mask]
        action[self._delta_mask] = 0
        self._send(action)
        self._delivery.reset(action, now_ns)
        self._pending = None
