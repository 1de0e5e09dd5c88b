"""The process that owns LeRobot's robot: it alone opens the bus and the cameras, once.

One thread takes commands, reads the joints at its own rate and shows them on the board; every
camera is waited for in a thread of its own. It stays while anybody commands the robot, also when
its parent has died, and keeps what holds position as it was last told. Speeds that nobody commands
any more it brings to zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import ActionKind, rest_command
from robots.command_delivery import CommandDelivery
from robots.errors import ConfigError, ConnectFailed, RobotError, SensorLost
from robots.lerobot_adapter import IMPORT_TIMEOUT_S, chosen_cameras
from robots.lerobot_config import UNCOMMANDED_S, LeRobotConfig, action_specs
from robots.lerobot_device import FAILURES, LeRobotDevice, Observation
from robots.owner_server import OwnerServer
from robots.sensor_memory import SensorMemory
from transport.child_process import Isolation, isolate, send_event
from transport.shm.latest_value import LatestValueWriter

logger = logging.getLogger(__name__)

LEAVE_WITHIN_S = 8.0
"""After the parent's end, for whoever still commands to bring the robot to rest and to go."""
FRAME_WITHIN_MS = 200
AFTER_FAILURE_S = 0.05
SAY_AFTER_S = 5.0


class CameraReader(threading.Thread):
    """Waits for the pictures of one camera and shows them. Its end is the process' end."""

    def __init__(
        self, device: LeRobotDevice, name: str, camera: Any, writer: LatestValueWriter
    ) -> None:
        super().__init__(name=f"camera {name}", daemon=True)
        self._device, self._lerobots, self._camera = device, name, camera
        self._writer = writer
        self.why = ""
        self.shown = threading.Event()

    def run(self) -> None:
        before: Any = None
        while True:
            try:
                picture = self._camera.async_read(timeout_ms=FRAME_WITHIN_MS)
                now_ns = time.monotonic_ns()
                checked = self._device.checked(self._lerobots, picture)
            except Exception as error:
                self.why = f"{type(error).__name__}: {error}"
                if not isinstance(error, TimeoutError):
                    time.sleep(AFTER_FAILURE_S)
                continue
            if picture is not before:
                before = picture
                show(self._writer, checked, self._came_ns(now_ns))
                self.why = ""
                self.shown.set()

    def _came_ns(self, now_ns: int) -> int:
        """When the picture came, where the camera notes it; it may have lain there for a while."""
        noted = getattr(self._camera, "latest_timestamp", None)
        if isinstance(noted, float) and 0 <= now_ns - noted * 1e9 < 1e9:
            return round(noted * 1e9)
        return now_ns


def show(writer: LatestValueWriter, picture: NDArray[np.uint8], stamp_ns: int) -> None:
    shown = writer.claim()
    shown["image"][...], shown["stamp_ns"][...] = picture, stamp_ns
    shown["received_ns"][...] = time.monotonic_ns()
    writer.publish()


class Owner:
    """Serves connections, keeps the board up to date, and passes commands on.

    Args:
        config: Our keys.
        device: Connected.

    Raises:
        SensorLost, ContractViolated: The first observation is not whole.
    """

    def __init__(self, config: LeRobotConfig, device: LeRobotDevice) -> None:
        said = device.description
        self._config, self._device = config, device
        self._cameras = chosen_cameras(config, said, "")
        shape: dict[str, Any] = {
            "qpos": 0,
            "joints": len(said.states),
            "cameras": {ours: said.pictures[theirs] for ours, theirs in self._cameras.items()},
        }
        memory_fd = SensorMemory.create(**shape)
        self._sensor_memory = SensorMemory(memory_fd, writable=True, **shape)
        self._joints = self._sensor_memory.joint_writer()
        self._pictures = {ours: self._sensor_memory.camera_writer(ours) for ours in self._cameras}
        specs = action_specs(config, said, "")
        kinds = [spec.kind for spec in specs]
        self._speeds = np.array([kind is ActionKind.VELOCITY for kind in kinds])
        self._steps = np.array([kind is ActionKind.DELTA for kind in kinds])
        self._newest: NDArray[np.float32] | None = None
        self._told_ns = self._left_ns = 0
        self._why: dict[str, str] = {}
        self.parent_gone = threading.Event()
        self.told_to_end = threading.Event()
        self._readers = {
            ours: CameraReader(device, theirs, device.cameras[theirs], self._pictures[ours])
            for ours, theirs in self._cameras.items()
            if theirs in device.cameras
        }
        first = device.first_look()
        seen = first.position if first.position is not None else np.zeros(len(said.states))
        self._last = rest_command(said.states, specs, seen.astype(np.float32))
        self._limits = config.limits.of(said.actions, "")
        self._delivery = CommandDelivery(self._limits, specs, self._last)
        self._show(first)
        for reader in self._readers.values():
            reader.start()
        for ours, reader in self._readers.items():
            if not reader.shown.wait(config.connect_timeout_s / 2):
                raise SensorLost(f"{ours}: no picture ({reader.why})")
        self._server = OwnerServer(
            self._sensor_memory,
            memory_fd,
            action_dim=len(kinds),
            hello={"qpos": 0},
            command=self._take,
            call=self._answer,
        )
        self.address = self._server.address

    def run(self) -> None:
        """Until told to end, or the parent is gone and nobody commands any more."""
        period_ns = round(1e9 / self._config.read_hz)
        due_ns = time.monotonic_ns()
        while not self._over():
            wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9
            for ready in select.select(self._server.sockets, [], [], wait_s)[0]:
                if isinstance(ready, socket.socket):
                    self._server.serve(ready)
            if self._newest is not None:
                self._follow(self._newest)  # commands that came meanwhile are of the past
            if self._drives_on():
                self._slow_down()
            if (now_ns := time.monotonic_ns()) >= due_ns:
                self._read()
                due_ns = max(due_ns + period_ns, now_ns)

    def rest(self) -> None:
        """Bring what moves by itself to rest."""
        while self._last[self._speeds].any():
            self._slow_down()
            time.sleep(1 / self._config.read_hz)

    def _over(self) -> bool:
        if self.told_to_end.is_set():
            return True
        commanding = any(role != "sensing" for role in self._server.roles)
        return self.parent_gone.is_set() and not commanding

    def _take(self, action: NDArray[np.float32], sent_ns: int, source: int) -> None:
        del source
        self._delivery.note(sent_ns)
        self._newest, self._told_ns = action.copy(), time.monotonic_ns()

    def _follow(self, wanted: NDArray[np.float32]) -> None:
        """Send ``wanted``, or as far towards it as one command may go."""
        try:
            action = self._delivery.follow(wanted, time.monotonic_ns())
        except RobotError as error:
            self._refuse(str(error))
            self._newest = None
        else:
            self._send(action)
            if np.array_equal(action, wanted):
                self._newest = None

    def _refuse(self, why: str) -> None:
        self._why["commands"] = why
        if not self._sensor_memory.refused_since_ns.load():
            self._sensor_memory.refused_since_ns.store(time.monotonic_ns())

    def _send(self, action: NDArray[np.float32]) -> None:
        self._last, self._left_ns = action, time.monotonic_ns()
        try:
            self._device.send(action)
        except FAILURES as error:
            self._refuse(f"{type(error).__name__}: {error}")
        else:
            if not self._delivery.refused:
                self._sensor_memory.refused_since_ns.store(0)

    def _drives_on(self) -> bool:
        """Whether something moves that nobody commands, or whose commands are not followed."""
        uncommanded_ns = time.monotonic_ns() - self._told_ns
        left_alone = uncommanded_ns > UNCOMMANDED_S * 1e9 or self._delivery.refused
        return bool(self._last[self._speeds].any() and left_alone)

    def _slow_down(self) -> None:
        """The last command with its speeds nearer to zero, by what the limits allow."""
        action = self._last.copy()
        now_ns = time.monotonic_ns()
        since_s = min((now_ns - self._left_ns) / 1e9, 1 / self._config.read_hz)
        change = (self._limits.acceleration * since_s).astype(np.float32)
        speed = np.maximum(np.abs(action) - change, 0) * np.sign(action)
        action[self._speeds] = speed[self._speeds]
        action[self._steps] = 0
        self._send(action)
        self._delivery.reset(action, now_ns)
        self._newest = None

    def _read(self) -> None:
        try:
            self._show(self._device.look())
        except RobotError as error:
            self._why["joints"] = str(error)

    def _show(self, seen: Observation) -> None:
        if seen.position is not None:
            state = self._joints.claim()
            state["position"][...], state["stamp_ns"][...] = seen.position, seen.stamp_ns
            state["received_ns"][...] = time.monotonic_ns()
            self._joints.publish()
            self._why.pop("joints", None)
        for ours, theirs in self._cameras.items():
            if theirs in seen.pictures:
                show(self._pictures[ours], seen.pictures[theirs], seen.stamp_ns)

    def _answer(self, call: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        if call != "why":
            return {"error": f"unknown call {call!r}"}
        what = str(asked.get("what"))
        reader = self._readers.get(what)
        return {"why": self._why.get(what, "") if reader is None else reader.why}


def _watch_parent(owner: Owner, input_fd: int) -> None:
    """See the parent's end, also where LeRobot holds the other thread up."""
    while os.read(input_fd, 4096):
        pass
    owner.parent_gone.set()
    time.sleep(LEAVE_WITHIN_S)
    os._exit(0)


def _imported(config: LeRobotConfig, isolation: Isolation) -> LeRobotDevice:
    """LeRobot's robot, not connected; a person who waits for it is told what for."""
    waiting = threading.Timer(SAY_AFTER_S, os.write, (2, b"importing LeRobot ...\n"))
    waiting.daemon = True
    waiting.start()
    try:
        with isolation.deadline(IMPORT_TIMEOUT_S, "importing LeRobot"):
            return LeRobotDevice(config)
    finally:
        waiting.cancel()


def _own(config: LeRobotConfig, isolation: Isolation) -> None:
    device = _imported(config, isolation)
    what = f"LeRobot's connect() of {config.type}"
    todo = f"check its power and cables, and run {config.calibrate_command} first if it asks"
    with isolation.deadline(config.connect_timeout_s, what, todo):
        device.connect()
        owner = Owner(config, device)
    signal.signal(signal.SIGTERM, lambda *_: owner.told_to_end.set())
    threading.Thread(
        target=_watch_parent, args=(owner, isolation.input_fd), name="parent", daemon=True
    ).start()
    send_event("ready", address=owner.address)
    try:
        owner.run()
    finally:
        owner.rest()
    device.end()


def _work(config: LeRobotConfig, isolation: Isolation, *, only_describe: bool) -> None:
    try:
        if only_describe:
            description = _imported(config, isolation).description
            send_event("ready", description=dataclasses.asdict(description))
        else:
            _own(config, isolation)
    except RobotError as error:
        send_event("failed", error=" ".join(str(error).split()), kind=type(error).__name__)
    except FAILURES as error:
        logger.debug("LeRobot failed", exc_info=True)
        kind = ConfigError if only_describe else ConnectFailed
        message = isolation.explain(error)
        if isinstance(error, EOFError):
            message += f"; run {config.calibrate_command} first"
        send_event("failed", error=message, kind=kind.__name__)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    isolation = isolate()
    config = LeRobotConfig.from_json(options.config)
    try:
        _work(config, isolation, only_describe=options.describe)
        sys.stdout.flush()
    finally:
        # Whatever LeRobot's objects do when they are destroyed, among it dropping the arm, is not
        # done.
        os._exit(0)


if __name__ == "__main__":
    main()
