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
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import rest_command
from robots.device_owner import DeviceOwner
from robots.errors import ConfigError, ConnectFailed, RobotError, SensorLost
from robots.lerobot_config import LeRobotConfig, action_specs
from robots.lerobot_device import FAILURES, LeRobotDevice, Observation
from robots.lerobot_robot import IMPORT_TIMEOUT_S, chosen_cameras
from robots.sensor_memory import SensorMemory
from transport.child_process import Isolation, isolate, send_event
from transport.shm.latest_value import LatestValueWriter

logger = logging.getLogger(__name__)

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


class LeRobotOwner(DeviceOwner):
    """Serves connections, publishes sensor samples and forwards commands to the device.

    Args:
        config: The configuration.
        device: Connected.

    Raises:
        SensorLost, ContractViolated: The first observation is incomplete or invalid.
    """

    def __init__(self, config: LeRobotConfig, device: LeRobotDevice) -> None:
        description = device.description
        self._device = device
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
        sensor_memory = SensorMemory(memory_fd, writable=True, **shape)
        self._joints = sensor_memory.joint_writer()
        self._image_writers = {name: sensor_memory.camera_writer(name) for name in self._cameras}
        specs = action_specs(config, description, "")
        self._readers = {
            name: CameraReader(
                device, lerobot_name, device.cameras[lerobot_name], self._image_writers[name]
            )
            for name, lerobot_name in self._cameras.items()
            if lerobot_name in device.cameras
        }
        first = device.read_first()
        state = first.position if first.position is not None else np.zeros(len(description.states))
        super().__init__(
            sensor_memory,
            memory_fd,
            actions=specs,
            limits=config.limits.of(description.actions, ""),
            last_sent=rest_command(description.states, specs, state.astype(np.float32)),
            period_s=1 / config.read_hz,
        )
        self._publish(first)
        for reader in self._readers.values():
            reader.start()
        for name, reader in self._readers.items():
            if not reader.started.wait(config.connect_timeout_s / 2):
                raise SensorLost(
                    f"{name}: got no picture within {config.connect_timeout_s / 2:g} s "
                    f"({reader.failure}): is the camera connected?"
                )

    def _write(self, action: NDArray[np.float32]) -> str:
        try:
            self._device.send(action)
        except FAILURES as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _tick(self) -> None:
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
    owner.watch_parent(isolation.input_fd)
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
