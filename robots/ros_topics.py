"""What the ROS 1 and the ROS 2 driver share: how messages become samples. Imports no ROS."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.base import CameraSample, JointSample
from robots.errors import ContractViolated, SensorLost
from robots.ros_images import assumption, decode_colour
from robots.sample_buffer import SampleBuffer

logger = logging.getLogger(__name__)


def sample_receiver(
    stream: SampleBuffer[Any],
    sample: type[JointSample] | type[CameraSample],
    decode: Callable[[Any], Any],
    stamp_ns: Callable[[Any], int],
) -> Callable[[Any], None]:
    """The callback of a topic: decodes a message and adds it to ``stream``.

    A message that does not fit the contract becomes a fault of ``stream``.

    Args:
        stream: The samples of the topic.
        sample: What is made of a message.
        decode: Returns the content of a message. Raises ``ContractViolated``.
        stamp_ns: Returns a message's ``header.stamp`` in nanoseconds.
    """
    make: Any = sample

    def receive(message: Any) -> None:
        received_ns = time.monotonic_ns()
        try:
            content = decode(message)
        except ContractViolated as error:
            stream.fail(ContractViolated, str(error))
        else:
            stream.add(make(content, stamp_ns(message), received_ns))

    return receive


def colour_decoder(
    topic: str, hw: tuple[int, int], encoding: str
) -> Callable[[Any], NDArray[np.uint8]]:
    """``decode_colour`` that logs once what it assumes about the encoding."""
    logged = bool(encoding)

    def decode(message: Any) -> NDArray[np.uint8]:
        nonlocal logged
        image = decode_colour(message, hw, encoding)
        if not logged and (assumed := assumption(message)):
            logged = True
            logger.warning(
                "%s: %s; set the camera's key `encoding` if that is wrong", topic, assumed
            )
        return image

    return decode


def decode_joints(message: Any, expected: Sequence[str]) -> NDArray[np.float32]:
    """Decode a ``sensor_msgs/JointState`` that has exactly the joints ``expected``, in that order.

    Names that are left out are accepted.

    Returns:
        (S,) float32.

    Raises:
        ContractViolated: Other joints, another number of positions, or a position that is not
            finite.
    """
    if message.name and list(message.name) != list(expected):
        raise ContractViolated(f"got joints {list(message.name)}, expected {list(expected)}")
    return _finite(_positions(message, expected), expected)


def pick_joints(message: Any, wanted: Sequence[str]) -> NDArray[np.float32]:
    """Decode a ``sensor_msgs/JointState`` that has at least the joints ``wanted``, in any order.

    Returns:
        (S,) float32, in the order of ``wanted``.

    Raises:
        ContractViolated: A joint is missing or appears twice; otherwise as ``decode_joints``.
    """
    names = list(message.name)
    if len(set(names)) != len(names) or not set(wanted) <= set(names):
        raise ContractViolated(f"got joints {names}, expected each of {list(wanted)} once")
    position = _positions(message, names)
    return _finite(position[[names.index(name) for name in wanted]], wanted)


def _positions(message: Any, expected: Sequence[str]) -> NDArray[np.float32]:
    if len(message.position) != len(expected):
        raise ContractViolated(
            f"got {len(message.position)} positions, expected {len(expected)}, of {list(expected)}"
        )
    return np.array(message.position, np.float32)


def _finite(position: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
    for value, name in zip(position.tolist(), names, strict=True):
        if not math.isfinite(value):
            raise ContractViolated(f"got {value} for joint {name}, expected finite positions")
    return position


def join_joints(parts: Sequence[JointSample]) -> JointSample:
    """The states of several topics as one, (S,), with the times of the oldest one."""
    return JointSample(
        np.concatenate([part.position for part in parts]),
        min(part.stamp_ns for part in parts),
        min(part.received_ns for part in parts),
    )


def wait_for_topics(
    streams: Sequence[SampleBuffer[Any]],
    deadline_s: float,
    timeout_s: float,
    *,
    subject: str = "",
    hint: str,
) -> None:
    """Wait until every topic sends messages whose stamps advance, before any motion.

    Args:
        deadline_s: By ``time.monotonic``.
        timeout_s: The time allowed, for errors.
        subject, hint: The beginning and the end of the error.

    Raises:
        SensorLost: Names all topics that do not.
        RobotError: As ``SampleBuffer.wait``.
    """
    missing = [stream.name for stream in streams if not stream.wait(deadline_s)]
    if missing:
        raise SensorLost(
            f"{subject}got nothing, or a single message, on {missing} within {timeout_s:g} s; "
            f"expected messages on {[stream.name for stream in streams]}{hint}"
        )
