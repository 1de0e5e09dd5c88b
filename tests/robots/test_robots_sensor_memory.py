"""The shared memory of a robot's owner: samples by sensor, one segment, read-only for clients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from robots.sensor_memory import FRAME_SLOTS, JOINT_SLOTS, SensorMemory
from transport.errors import ProtocolError
from transport.shm.latest_value import LatestValueWriter

SHAPE = {"qpos": 5, "joints": 3, "cameras": {"top": (4, 6), "wrist": (2, 3)}}


@pytest.fixture
def memories() -> Iterator[tuple[SensorMemory, SensorMemory]]:
    """The memory as mapped by the owner and by a client."""
    fd = SensorMemory.create(**SHAPE)
    owner, client = (SensorMemory(fd, writable=writable, **SHAPE) for writable in (True, False))
    os.close(fd)
    with closing(owner), closing(client):
        yield owner, client


def publish(writer: LatestValueWriter, number: int) -> None:
    arrays = writer.claim()
    for array in arrays.values():
        array[...] = number
    arrays["stamp_ns"][...], arrays["received_ns"][...] = 10 * number, 10 * number + 1
    writer.publish()


def test_every_sensor_has_its_own_samples(memories: tuple[SensorMemory, SensorMemory]) -> None:
    owner, client = memories
    sensors = {"joints": client.joints, **client.cameras}
    writers = {"joints": owner.joint_writer()}
    writers |= {name: owner.camera_writer(name) for name in ("top", "wrist")}
    assert all(sensor.newest() is None and sensor.count == 0 for sensor in sensors.values())
    for number, name in enumerate(sensors, 1):
        publish(writers[name], number)
    for number, (name, sensor) in enumerate(sensors.items(), 1):
        sample = sensor.newest()
        assert (sample.sequence, sensor.count) == (1, 1)
        assert (sample.stamp_ns, sample.received_ns) == (10 * number, 10 * number + 1)
        values = sample.arrays["position" if name == "joints" else "image"]
        assert (values == number).all()
    assert client.joints.newest().arrays["qpos"].shape == (5,)
    assert client.cameras["top"].newest().arrays["image"].shape == (4, 6, 3)


def test_the_nearest_kept_state_is_found(memories: tuple[SensorMemory, SensorMemory]) -> None:
    owner, client = memories
    joints = owner.joint_writer()
    for number in range(1, 2 * JOINT_SLOTS):
        publish(joints, number)
    newest = 2 * JOINT_SLOTS - 1
    oldest = newest - (JOINT_SLOTS - 2)
    for stamp_ns, expected in ((0, oldest), (10 * oldest + 14, oldest + 1), (10**9, newest)):
        sample = client.joints.nearest(stamp_ns)
        assert sample.stamp_ns == 10 * expected
        np.testing.assert_array_equal(sample.arrays["position"], np.float32([expected] * 3))


def test_an_image_that_was_read_is_not_overwritten(
    memories: tuple[SensorMemory, SensorMemory],
) -> None:
    owner, client = memories
    top = owner.camera_writer("top")
    publish(top, 1)
    first = client.cameras["top"].newest()
    for number in range(2, 2 + 2 * FRAME_SLOTS):
        publish(top, number)
    assert (first.arrays["image"] == 1).all()


def test_a_client_sees_the_owners_flags(memories: tuple[SensorMemory, SensorMemory]) -> None:
    owner, client = memories
    assert (client.camera_clients.load(), client.refused_since_ns.load()) == (0, 0)
    owner.camera_clients.store(2)
    owner.refused_since_ns.store(7)
    assert (client.camera_clients.load(), client.refused_since_ns.load()) == (2, 7)


def test_a_client_cannot_write(memories: tuple[SensorMemory, SensorMemory]) -> None:
    _, client = memories
    with pytest.raises(ValueError, match="read-only"):
        client.joint_writer().claim()["stamp_ns"][...] = 1


@pytest.mark.parametrize("other", [{"qpos": 600}, {"joints": 900}, {"cameras": {"top": (4, 6)}}])
def test_a_segment_of_other_lengths_is_refused(other: dict) -> None:
    fd = SensorMemory.create(**SHAPE)
    try:
        with pytest.raises(ProtocolError, match=r"segment: got \d+ bytes, expected \d+"):
            SensorMemory(fd, writable=False, **{**SHAPE, **other})
    finally:
        os.close(fd)
