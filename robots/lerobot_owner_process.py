"""The owner process of a LeRobot robot: it alone opens the bus and the cameras, once.

One thread receives commands, reads the joints at its own rate and publishes them in shared memory;
every camera has a thread that waits for its images. The process runs while any client commands the
robot, even after its parent has died. Positions keep their last command. Velocities without a
command are brought to zero.
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
from robots.lerobot_config import UNCOMMANDED_S, LeRobotConfig, action_specs
from robots.lerobot_device import FAILURES, LeRobotDevice, Observation
from robots.lerobot_robot import IMPORT_TIMEOUT_S, chosen_cameras
from robots.owner_server import OwnerServer
from robots.sensor_memory import SensorMemory
from transport.child_process import Isolation, isolate, send_event
from transport.shm.latest_value import LatestValueWriter

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 8.0
"""After the parent's end: for clients to bring the robot to rest and to disconnect."""
IMAGE_TIMEOUT_MS = 200
RETRY_AFTER_S = 0.05
IMPORT_NOTICE_AFTER_S = 5.0


class CameraReader(threading.Thread):
    """Waits for the images of one camera and publishes them, until the process ends.

    Args:
        device: Checks the images.
        name: LeRobot's name of the camera.
        camera: LeRobot's camera object.
        writer: Of the camera in ``SensorMemory``.

    Attributes:
        failure: Why there is no new image; empty if there is one.
        started: Set after the first image.
    """

    def __init__(
        self, device: LeRobotDevice, name: str, camera: Any, writer: LatestValueWriter
    ) -> None:
        super().__init__(name=f"camera {name}", daemon=True)
        self._device, self._lerobot_name, self._camera = device, name, camera
        self._writer = writer
        self.failure = ""
        self.started = threading.Event()

    def run(self) -> None:
        """Read and publish without end; called by the thread."""
        previous: Any = None
        while True:
            try:
                image = self._camera.async_read(timeout_ms=IMAGE_TIMEOUT_MS)
                now_ns = time.monotonic_ns()
                checked = self._device.checked(self._lerobot_name, image)
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, TimeoutError):
                    time.sleep(RETRY_AFTER_S)
                continue
            if image is not previous:
                previous = image
                publish_image(self._writer, checked, self._captured_ns(now_ns))
                self.failure = ""
                self.started.set()

    def _captured_ns(self, now_ns: int) -> int:
        """When the camera received the image, if it records that; else ``now_ns``, which is later
        if the image was waiting to be read."""
        captured_s = getattr(self._camera, "latest_timestamp", None)
        if isinstance(captured_s, float) and 0 <= now_ns - captured_s * 1e9 < 1e9:
            return round(captured_s * 1e9)
        return now_ns


def publish_image(writer: LatestValueWriter, image: NDArray[np.uint8], stamp_ns: int) -> None:
    """Publish ``image``, (H, W, 3) uint8, as the newest one of ``writer``'s camera."""
    slot = writer.claim()
    slot["image"][...], slot["stamp_ns"][...] = image, stamp_ns
    slot["received_ns"][...] = time.monotonic_ns()
    writer.publish()


class LeRobotOwner:
    """Serves connections, publishes sensor samples and forwards commands to the device.

    Args:
        config: The configuration.
        device: Connected.

    Attributes:
        address: Where it listens.
        parent_ended: Set by another thread: stop once no client commands the robot.
        stop_requested: Set by a signal handler: stop now.

    Raises:
        SensorLost, ContractViolated: The first observation is incomplete or invalid.
    """

    def __init__(self, config: LeRobotConfig, device: LeRobotDevice) -> None:
        description = device.description
        self._config, self._device = config, device
        self._cameras = chosen_cameras(config, description, "")
        shape: dict[str, Any] = {
            "qpos": 0,
            "joints": len(description.states),
            "cameras": {
                name: description.pictures[lerobot_name]
                for name, lerobot_name in self._cameras.items()
            },
        }
        memory_fd = SensorMemory.create(**shape)
        self._sensor_memory = SensorMemory(memory_fd, writable=True, **shape)
        self._joints = self._sensor_memory.joint_writer()
        self._image_writers = {
            name: self._sensor_memory.camera_writer(name) for name in self._cameras
        }
        specs = action_specs(config, description, "")
        kinds = [spec.kind for spec in specs]
        self._velocity_mask = np.array([kind is ActionKind.VELOCITY for kind in kinds])
        self._delta_mask = np.array([kind is ActionKind.DELTA for kind in kinds])
        self._pending: NDArray[np.float32] | None = None
        self._commanded_ns = self._sent_ns = 0
        self._failures: dict[str, str] = {}
        self.parent_ended = threading.Event()
        self.stop_requested = threading.Event()
        self._readers = {
            name: CameraReader(
                device, lerobot_name, device.cameras[lerobot_name], self._image_writers[name]
            )
            for name, lerobot_name in self._cameras.items()
            if lerobot_name in device.cameras
        }
        first = device.read_first()
        state = first.position if first.position is not None else np.zeros(len(description.states))
        self._last_sent = rest_command(description.states, specs, state.astype(np.float32))
        self._limits = config.limits.of(description.actions, "")
        self._delivery = CommandDelivery(self._limits, specs, self._last_sent)
        self._publish(first)
        for reader in self._readers.values():
            reader.start()
        for name, reader in self._readers.items():
            if not reader.started.wait(config.connect_timeout_s / 2):
                raise SensorLost(
                    f"{name}: got no picture within {config.connect_timeout_s / 2:g} s "
                    f"({reader.failure}): is the camera connected?"
                )
        self._server = OwnerServer(
            self._sensor_memory,
            memory_fd,
            action_dim=len(kinds),
            hello={"qpos": 0},
            command=self._receive_command,
            call=self._handle_call,
        )
        self.address = self._server.address

    def run(self) -> None:
        """Serve until a stop is requested, or the parent has ended and no client commands."""
        period_ns = round(1e9 / self._config.read_hz)
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
                self._read_device()
                due_ns = max(due_ns + period_ns, now_ns)

    def stop_motion(self) -> None:
        """Bring all velocities to zero within the limits."""
        while self._last_sent[self._velocity_mask].any():
            self._brake()
            time.sleep(1 / self._config.read_hz)

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
        try:
            self._device.send(action)
        except FAILURES as error:
            self._refuse(f"{type(error).__name__}: {error}")
        else:
            if not self._delivery.refused:
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
        since_s = min((now_ns - self._sent_ns) / 1e9, 1 / self._config.read_hz)
        change = (self._limits.acceleration * since_s).astype(np.float32)
        speed = np.maximum(np.abs(action) - change, 0) * np.sign(action)
        action[self._velocity_mask] = speed[self._velocity_mask]
        action[self._delta_mask] = 0
        self._send(action)
        self._delivery.reset(action, now_ns)
        self._pending = None

    def _read_device(self) -> None:
        try:
            self._publish(self._device.read())
        except RobotError as error:
            self._failures["joints"] = str(error)

    def _publish(self, observation: Observation) -> None:
        if observation.position is not None:
            state = self._joints.claim()
            state["position"][...] = observation.position
            state["stamp_ns"][...] = observation.stamp_ns
            state["received_ns"][...] = time.monotonic_ns()
            self._joints.publish()
            self._failures.pop("joints", None)
        for name, lerobot_name in self._cameras.items():
            if lerobot_name in observation.images:
                image = observation.images[lerobot_name]
                publish_image(self._image_writers[name], image, observation.stamp_ns)

    def _handle_call(self, call: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if call != "failure_reason":
            return {"error": f"unknown call {call!r}"}
        source = str(arguments.get("source"))
        reader = self._readers.get(source)
        return {"reason": self._failures.get(source, "") if reader is None else reader.failure}


def _watch_parent(owner: LeRobotOwner, input_fd: int) -> None:
    """Notice the parent's end, even while LeRobot blocks the main thread."""
    while os.read(input_fd, 4096):
        pass
    owner.parent_ended.set()
    time.sleep(EXIT_TIMEOUT_S)
    os._exit(0)


def _import_device(config: LeRobotConfig, isolation: Isolation) -> LeRobotDevice:
    """LeRobot's robot, not connected. Prints a notice if the import takes long."""
    notice = threading.Timer(IMPORT_NOTICE_AFTER_S, os.write, (2, b"importing LeRobot ...\n"))
    notice.daemon = True
    notice.start()
    try:
        with isolation.deadline(IMPORT_TIMEOUT_S, "importing LeRobot"):
            return LeRobotDevice(config)
    finally:
        notice.cancel()


def _run_owner(config: LeRobotConfig, isolation: Isolation) -> None:
    """Connect the device, report ``ready`` and serve; at the end stop all motion."""
    device = _import_device(config, isolation)
    what = f"LeRobot's connect() of {config.type}"
    todo = f"check its power and cables, and run {config.calibrate_command} first if it asks"
    with isolation.deadline(config.connect_timeout_s, what, todo):
        device.connect()
        owner = LeRobotOwner(config, device)
    signal.signal(signal.SIGTERM, lambda *_: owner.stop_requested.set())
    threading.Thread(
        target=_watch_parent, args=(owner, isolation.input_fd), name="parent", daemon=True
    ).start()
    send_event("ready", address=owner.address)
    try:
        owner.run()
    finally:
        owner.stop_motion()
    device.end()


def _describe_or_run(config: LeRobotConfig, isolation: Isolation, *, only_describe: bool) -> None:
    try:
        if only_describe:
            description = _import_device(config, isolation).description
            send_event("ready", description=dataclasses.asdict(description))
        else:
            _run_owner(config, isolation)
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
    """Run the process; started by ``robots.lerobot_robot``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    isolation = isolate()
    config = LeRobotConfig.from_json(options.config)
    try:
        _describe_or_run(config, isolation, only_describe=options.describe)
        sys.stdout.flush()
    finally:
        # Skips the destructors of LeRobot's objects, which may switch the torque off.
        os._exit(0)


if __name__ == "__main__":
    main()
