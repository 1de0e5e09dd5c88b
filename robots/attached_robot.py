"""Base class of robots whose devices one process owns, to which every user of the robot attaches.

Joint states and images are read from shared memory; commands go through a socket. So any number of
processes may use the robot at once, and starting or ending one of them does nothing to its devices.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import CameraSample, JointSample, Outcome, Robot, Role
from robots.errors import ConnectFailed, NotConnected, RobotError, SensorLost
from robots.owner_connection import OwnerConnection
from robots.sensor_memory import JOINTS, Sample, SampleReader, SensorMemory
from transport.errors import ProtocolError

CALL_TIMEOUT_S = 10.0
POLL_PERIOD_S = 0.002


class AttachedRobot(Robot):
    """One process's connection to the owner process. ``companion`` runs the owner process.

    Attributes:
        owner_name: The owner process's name in errors.
    """

    owner_name = "the owner process"
    _connection: OwnerConnection | None = None
    _sensor_memory: SensorMemory | None = None

    @property
    @abstractmethod
    def address(self) -> str | None:
        """Address of a running owner process; None: none is known."""

    @property
    def owner_pid(self) -> int:
        """The owner process's id."""
        return int(self._connected()[0].hello["pid"])

    def _connect(self, role: Role, timeout_s: float) -> None:
        if self.address is None:
            raise ConnectFailed(
                f"{self.name}: no {self.owner_name.removeprefix('the ')} to connect to; expected "
                "connect() to be within companion(), or its address in the configuration (address)"
            )
        self._newest_images: dict[str, tuple[int, CameraSample]] = {}
        self._connection = OwnerConnection(
            self.address, role=role, timeout_s=timeout_s, peer=self.owner_name
        )
        try:
            self._sensor_memory = SensorMemory(
                self._connection.memory_fd,
                qpos=self._connection.hello["qpos"],
                joints=self.contract.state_dim,
                cameras=self.contract.cameras,
                writable=False,
            )
        except ProtocolError as error:
            raise ConnectFailed(
                f"{self.name}: {self.owner_name} has other joints or cameras ({error}); start it "
                "with the same configuration"
            ) from error
        sensors = [(JOINTS, self._sensor_memory.joints)]
        if role is not Role.CONTROL:
            sensors += self._sensor_memory.cameras.items()
        since_ns = time.monotonic_ns()
        self._wait_for(sensors, lambda sample: sample.received_ns >= since_ns, timeout_s)

    def _get_joints(self) -> JointSample:
        return _joint_sample(self._fresh_sample(JOINTS, self._connected()[1].joints))

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        joints = self._connected()[1].joints
        newest = self._fresh_sample(JOINTS, joints)
        return _joint_sample(joints.nearest(stamp_ns) or newest)

    def _get_cameras(self) -> dict[str, CameraSample]:
        for name, reader in self._connected()[1].cameras.items():
            if name not in self._newest_images or self._newest_images[name][0] != reader.count:
                sample = self._fresh_sample(name, reader)
                self._newest_images[name] = sample.sequence, _camera_sample(sample)
            else:
                self._check_age(name, self._newest_images[name][1].received_ns)
        return {name: sample for name, (_, sample) in self._newest_images.items()}

    def _send_action(self, action: NDArray[np.float32]) -> None:
        self._connected()[0].send_action(action)

    def _disconnect(self) -> None:
        if self._sensor_memory is not None:
            self._sensor_memory.close()
            self._sensor_memory = None
        self._newest_images = {}
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> tuple[OwnerConnection, SensorMemory]:
        if self._connection is None or self._sensor_memory is None:
            raise NotConnected(f"{self.name}: not connected")
        return self._connection, self._sensor_memory

    def _call(self, call: str, **arguments: Any) -> Mapping[str, Any]:
        return self._connected()[0].call(call, timeout_s=CALL_TIMEOUT_S, **arguments)

    def _published_outcome(self) -> Outcome:
        """The outcome that the owner process publishes beside the joints."""
        connection, sensor_memory = self._connected()
        connection.check_alive()
        state: Any = sensor_memory.joints.newest()
        success, reward, step = (state.arrays[name] for name in ("success", "reward", "step"))
        return Outcome(bool(success), float(reward), int(step))

    def _sensor_error(self, name: str, message: str) -> RobotError:
        """The error of the sensor ``name``, which has a fault or sends nothing: ``message``."""
        del name
        return SensorLost(message)

    def _fresh_sample(self, name: str, reader: SampleReader) -> Sample:
        """The newest sample. Raises ``SensorLost`` if it is too old."""
        sample = reader.newest()
        if sample is None:
            self._connected()[0].check_alive()
            raise self._sensor_error(
                name, f"{self.name}: {name}: nothing received yet, expected a sample"
            )
        self._check_age(name, sample.received_ns)
        return sample

    def _check_age(self, name: str, received_ns: int) -> None:
        connection, sensor_memory = self._connected()
        connection.check_alive()
        now_ns = time.monotonic_ns()
        age_s = (now_ns - received_ns) / 1e9
        if age_s > self.sensor_timeout_s or sensor_memory.fault_until_ns[name].load() > now_ns:
            raise self._sensor_error(
                name,
                f"{self.name}: {name}: nothing new for {age_s:.2f} s, expected a sample within "
                f"{self.sensor_timeout_s:g} s",
            )

    def _wait_for(
        self,
        sensors: Sequence[tuple[str, SampleReader]],
        arrived: Callable[[Sample], bool],
        timeout_s: float,
    ) -> None:
        """Wait until ``arrived`` is true of the newest sample of each of ``sensors``."""
        deadline_s = time.monotonic() + timeout_s
        missing = list(sensors)
        while missing:
            self._connected()[0].check_alive()
            for entry in list(missing):
                newest = entry[1].newest()
                if newest is not None and arrived(newest):
                    missing.remove(entry)
            if missing and time.monotonic() >= deadline_s:
                names = [name for name, _ in missing]
                raise self._sensor_error(
                    names[0], f"{self.name}: got nothing from {names} within {timeout_s:g} s"
                )
            if missing:
                time.sleep(POLL_PERIOD_S)


def _joint_sample(sample: Sample) -> JointSample:
    return JointSample(sample.arrays["position"], sample.stamp_ns, sample.received_ns)


def _camera_sample(sample: Sample) -> CameraSample:
    return CameraSample(sample.arrays["image"], sample.stamp_ns, sample.received_ns)
