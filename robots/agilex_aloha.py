"""``agilex_aloha``: Agilex's two-armed ALOHA over ROS 1, with ILStudio's topics and configuration.

Joint states come on ``/puppet/joint_left`` and ``_right``, commands leave on ``/master/joint_left``
and ``_right``, 7 positions each: six joints (rad) and the gripper (0 to 7). Header stamps pair
pictures with joints; the age of what was received comes from our own clock.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.yaml_config import parse_config
from robots import ros_node
from robots.agilex_config import GRIPPERS, JOINTS_PER_ARM, SIDES, AgilexCamera, AgilexConfig
from robots.base import CameraSample, JointSample, Outcome, Robot, RobotContract, Role, arm_actions
from robots.errors import (
    ConfigError,
    ConnectFailed,
    ContractViolated,
    NotConnected,
    RobotLost,
    SensorLost,
)
from robots.joint_limits import JointLimits
from robots.ros_compressed_images import decode_compressed_colour, decode_compressed_depth
from robots.ros_images import assumption, decode_colour, decode_depth, message_type
from robots.ros_twin_channel import TwinChannel
from robots.sample_stream import SampleStream

logger = logging.getLogger(__name__)

START_TOLERANCE = 0.05
"""How far outside its limits (rad) a configured start pose may be; it is moved inside. ILStudio's
own is, by 0.035: a pose that was measured, not chosen."""
JOINTS_BUFFER, PICTURE_BUFFER = 2**14, 2**24
"""rospy reads a socket in pieces of this size, and allocates as much each time. Smaller than a
picture, it falls behind; in the control process, whose memory is locked, every page of it is real:
16 MiB a hundred times a second was a core and a half."""
LOOK_AGAIN_S = 0.005


class AgilexAloha(Robot):
    """See the module. Any number of processes may connect.

    Args:
        config: Its keys.
        name: What it is called in results.
        source: Where the keys come from, for errors.

    Raises:
        ConfigError: Limits or a start pose that cannot be.
    """

    def __init__(
        self, config: AgilexConfig, *, name: str = "agilex_aloha", source: str = ""
    ) -> None:
        self.config = config
        names = tuple(f"{side}_{joint}" for side in SIDES for joint in config.joint_names)
        limits = JointLimits.from_config(
            names,
            position_lower=config.limit_pos.lower,
            position_upper=config.limit_pos.upper,
            velocity=config.limit_vel,
            acceleration=config.limit_acc,
            source=source,
        )
        contract = RobotContract(
            joint_names=names,
            actions=arm_actions(names, GRIPPERS),
            cameras={camera: given.hw for camera, given in config.cameras.items()},
            repeats_pictures=config.twin is not None,
            control_hz=(1.0, 500.0),
            depth_cameras=tuple(config.cameras) if config.ros_operator.use_depth_image else (),
        )
        super().__init__(name, contract, limits)
        self._start_pose = self._inside(config, source)
        self._joints: dict[str, SampleStream[JointSample]] = {}
        self._colours: dict[str, SampleStream[CameraSample]] = {}
        self._depths: dict[str, SampleStream[CameraSample]] = {}
        self._subscribers: list[Any] = []
        self._published: dict[str, str] = {}
        self._publishers: dict[str, Any] = {}
        self._messages: Any = None
        self._time: Any = None
        self._twin: TwinChannel | None = None

    @property
    def start_pose(self) -> NDArray[np.float32]:
        return self._start_pose.copy()

    @property
    def start_velocity(self) -> NDArray[np.float64]:
        given = self.config.ros_operator
        return np.array(given.arm_steps_length * 2) * given.publish_rate

    @property
    def sensor_timeout_s(self) -> float:
        return self.config.sensor_timeout_s

    def _inside(self, config: AgilexConfig, source: str) -> NDArray[np.float32]:
        """The configured start pose, within the limits."""
        for side in SIDES:
            given = getattr(config.init_pos, side)
            if len(given) != JOINTS_PER_ARM:
                raise ConfigError(
                    f"{source}: init_pos.{side}: got {len(given)} numbers, expected "
                    f"{JOINTS_PER_ARM}"
                )
        pose = np.array([*config.init_pos.left, *config.init_pos.right])
        lower, upper = self._limits.position_lower, self._limits.position_upper
        inside = np.clip(pose, lower, upper)
        for index in self._limits.violations(pose):
            joint = self._contract.joint_names[index]
            bounds = f"{lower[index]:g} to {upper[index]:g}"
            if not abs(pose[index] - inside[index]) <= START_TOLERANCE:
                raise ConfigError(
                    f"{source}: init_pos: got {pose[index]:g} for joint {index} ({joint}), "
                    f"expected {bounds}, its limits"
                )
            logger.warning(
                "%s: the start pose of %s is %.4f, outside its limits (%s); %.4f is used",
                source, joint, pose[index], bounds, inside[index],
            )  # fmt: skip
        # Rounding to float32 must not carry it outside again.
        rounded: NDArray[np.float32] = inside.astype(np.float32)
        above, below = rounded > upper, rounded < lower
        rounded[above] = np.nextafter(rounded[above], np.float32(-np.inf))
        rounded[below] = np.nextafter(rounded[below], np.float32(np.inf))
        return rounded

    def _connect(self, role: Role, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        rospy = ros_node.start_node("metronome", timeout_s)
        self._time = rospy.Time
        self._published = ros_node.published_types(timeout_s)
        self._messages = ros_node.import_ros("sensor_msgs.msg")
        topics = self.config.ros_operator
        for side in SIDES:
            topic = getattr(topics, f"puppet_arm_{side}_topic")
            stream = SampleStream[JointSample](topic, timeout_s=self.config.sensor_timeout_s)
            self._joints[side] = stream
            self._subscribe(rospy, stream, self._messages.JointState, self._decode_joints)
            if role is not Role.SENSING:
                # Sent by a thread of its own, the newest only: one that does not read its messages,
                # a recorder perhaps, must not be able to hold up the arm.
                self._publishers[side] = ros_node.publisher(
                    rospy,
                    getattr(topics, f"puppet_arm_{side}_cmd_topic"),
                    self._messages.JointState,
                    queue_size=1,
                )
        if role is not Role.CONTROL:
            self._subscribe_to_cameras(rospy)
        if self.config.twin is not None:
            self._twin = TwinChannel(rospy, self.config.twin)
        self._wait_for_sensors(deadline_s, timeout_s)
        self._wait_for_listeners(deadline_s, timeout_s)
        if self._twin is not None:
            self._twin.wait(deadline_s, timeout_s)

    def _subscribe_to_cameras(self, rospy: Any) -> None:
        topics = self.config.ros_operator

        def subscribe(
            stream: SampleStream[CameraSample],
            decode: Callable[[Any], Any],
            decode_compressed: Callable[[Any], Any],
        ) -> None:
            name = message_type(stream.name, self._published_type(rospy, stream.name))
            kind = getattr(self._messages, name)
            raw = kind is self._messages.Image
            self._subscribe(rospy, stream, kind, decode if raw else decode_compressed)

        for name, given in self.config.cameras.items():
            topic = getattr(topics, f"img_{given.camera}_topic")
            # Pictures are large, and nobody asks for old ones.
            colour = SampleStream[CameraSample](
                topic, timeout_s=self.config.sensor_timeout_s, keep=2
            )
            self._colours[name] = colour
            compressed = functools.partial(
                decode_compressed_colour, hw=given.hw, encoding=given.encoding
            )
            subscribe(colour, _colour_decoder(topic, given), compressed)
            if topics.use_depth_image:
                topic = getattr(topics, f"img_{given.camera}_depth_topic")
                depth = SampleStream[CameraSample](
                    topic, timeout_s=self.config.sensor_timeout_s, keep=8
                )
                self._depths[name] = depth
                subscribe(depth, decode_depth, decode_compressed_depth)

    def _subscribe(
        self, rospy: Any, stream: SampleStream[Any], kind: Any, decode: Callable[[Any], Any]
    ) -> None:
        expected, got = kind._type, self._published_type(rospy, stream.name)
        if got not in (None, expected):
            raise ContractViolated(
                f"{stream.name}: got messages of type {got}, expected {expected}"
            )
        joints = kind is self._messages.JointState
        sample: Any = JointSample if joints else CameraSample

        def receive(message: Any) -> None:
            received_ns = time.monotonic_ns()
            try:
                content = decode(message)
            except ContractViolated as error:
                stream.fail(ContractViolated, str(error))
            else:
                stream.add(sample(content, message.header.stamp.to_nsec(), received_ns))

        self._subscribers.append(
            rospy.Subscriber(
                stream.name,
                kind,
                receive,
                queue_size=1,
                buff_size=JOINTS_BUFFER if joints else PICTURE_BUFFER,
                tcp_nodelay=True,
            )
        )

    def _published_type(self, rospy: Any, topic: str) -> str | None:
        """What is published there, if anything: rospy would wait for other messages for ever."""
        return self._published.get(rospy.resolve_name(topic))

    def _decode_joints(self, message: Any) -> NDArray[np.float32]:
        expected = list(self.config.joint_names)
        if message.name and list(message.name) != expected:
            raise ContractViolated(f"got joints {list(message.name)}, expected {expected}")
        if len(message.position) != len(expected):
            raise ContractViolated(
                f"got {len(message.position)} positions, expected {len(expected)}, of {expected}"
            )
        position = np.array(message.position, np.float32)
        if not np.isfinite(position).all():
            raise ContractViolated(f"got {position.tolist()}, expected finite positions")
        return position

    def _streams(self) -> list[SampleStream[Any]]:
        return [*self._joints.values(), *self._colours.values(), *self._depths.values()]

    def _wait_for_sensors(self, deadline_s: float, timeout_s: float) -> None:
        """Until every topic runs; one that does not is named before anything moves."""
        silent = [s.name for s in self._streams() if not s.wait(deadline_s)]
        if silent:
            raise SensorLost(
                f"{self.name}: nothing, or one message only, on {silent} within {timeout_s:g} s; "
                f"expected messages on {[stream.name for stream in self._streams()]}"
            )

    def _wait_for_listeners(self, deadline_s: float, timeout_s: float) -> None:
        while deaf := [p.name for p in self._publishers.values() if not p.get_num_connections()]:
            if time.monotonic() >= deadline_s:
                raise ConnectFailed(
                    f"{self.name}: nobody listens on {deaf} within {timeout_s:g} s: is the arms' "
                    "own node running?"
                )
            time.sleep(LOOK_AGAIN_S)

    def _get_joints(self) -> JointSample:
        return _both([self._joints[side].newest() for side in SIDES])

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        return _both([self._joints[side].nearest(stamp_ns) for side in SIDES])

    def _get_cameras(self) -> dict[str, CameraSample]:
        samples = {name: stream.newest() for name, stream in self._colours.items()}
        for name, stream in self._depths.items():
            depth: Any = stream.nearest(samples[name].stamp_ns).image
            samples[name] = samples[name]._replace(depth=depth)
        return samples

    def _send_action(self, action: NDArray[np.float32]) -> None:
        if not self._publishers:
            raise NotConnected(f"{self.name}: not connected")
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        for index, (side, publisher) in enumerate(self._publishers.items()):
            if not publisher.get_num_connections():
                raise RobotLost(
                    f"{self.name}: nobody listens on {publisher.name} any more: the {side} arm's "
                    "node has ended"
                )
            message = self._messages.JointState()
            # One stamp for both arms: they are two halves of one command.
            message.header.stamp = self._time(seconds, nanoseconds)
            message.name = list(self.config.joint_names)
            first = index * JOINTS_PER_ARM
            message.position = action[first : first + JOINTS_PER_ARM].tolist()
            publisher.publish(message)

    def _outcome(self) -> Outcome | None:
        return None if self._twin is None else self._twin.outcome()

    def _reset(self, seed: int) -> bool:
        if self._twin is None:
            return False
        stamp_ns = self._twin.reset(seed)
        for stream in self._streams():
            self._twin.wait_for_stamp(stream, stamp_ns)
        return True

    def _disconnect(self) -> None:
        for subscriber in self._subscribers:
            subscriber.unregister()
        if self._twin is not None:
            self._twin.close()
        self._twin = self._messages = self._time = None
        self._subscribers.clear()
        self._published.clear()
        for streams in (self._publishers, self._joints, self._colours, self._depths):
            streams.clear()


def make(
    args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]
) -> AgilexAloha:
    config = parse_config(AgilexConfig, args, source=source, overrides=overrides)
    return AgilexAloha(config, name=name, source=source)


def _colour_decoder(topic: str, given: AgilexCamera) -> Callable[[Any], Any]:
    """``decode_colour`` that says once what it assumes."""
    said = bool(given.encoding)

    def decode(message: Any) -> Any:
        nonlocal said
        image = decode_colour(message, given.hw, given.encoding)
        if not said and (assumed := assumption(message)):
            said = True
            logger.warning("%s: %s; the camera's key `encoding` changes it", topic, assumed)
        return image

    return decode


def _both(arms: list[JointSample]) -> JointSample:
    """Both arms as one state, as old as the older."""
    return JointSample(
        np.concatenate([arm.position for arm in arms]),
        min(arm.stamp_ns for arm in arms),
        min(arm.received_ns for arm in arms),
    )
