"""``agilex_aloha``: Agilex's two-armed ALOHA over ROS 1, with ILStudio's topics and configuration.

Joint states arrive on ``/puppet/joint_left`` and ``_right``, commands go to ``/master/joint_left``
and ``_right``, 7 positions each: six joints (rad) and the gripper (0 to 7). Header stamps pair
images with joint states; ages are computed from this host's clock.
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
from robots.agilex_config import GRIPPERS, JOINTS_PER_ARM, SIDES, AgilexConfig
from robots.base import CameraSample, JointSample, Outcome, Robot, RobotContract, Role, arm_actions
from robots.errors import (
    ConfigError,
    ConnectFailed,
    ContractViolated,
    NotConnected,
    RobotLost,
)
from robots.joint_limits import JointLimits
from robots.ros_compressed_images import decode_compressed_colour, decode_compressed_depth
from robots.ros_images import decode_depth, message_type
from robots.ros_topics import (
    colour_decoder,
    decode_joints,
    join_joints,
    sample_receiver,
    wait_for_topics,
)
from robots.ros_twin_channel import TwinChannel
from robots.sample_buffer import SampleBuffer

logger = logging.getLogger(__name__)

START_TOLERANCE = 0.05
"""How far outside its limits (rad) a configured start pose may be; it is moved inside. ILStudio's
start pose was measured, and is outside by 0.035."""
JOINTS_BUFFER, IMAGE_BUFFER = 2**14, 2**24
"""rospy reads a socket in pieces of this size, and allocates as much each time. With less than an
image it falls behind. In the control process, whose memory is locked, every page is allocated for
real: 16 MiB a hundred times a second cost one and a half cores."""
POLL_PERIOD_S = 0.005


class AgilexAloha(Robot):
    """Agilex's two-armed ALOHA; see the module. Any number of processes may connect.

    Args:
        config: The configuration.
        name: The robot's name in results.
        source: Where the configuration comes from, for errors.

    Raises:
        ConfigError: Invalid limits, or a start pose outside them.
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
            cameras={name: camera.hw for name, camera in config.cameras.items()},
            repeats_pictures=config.twin is not None,
            control_hz=(1.0, 500.0),
            depth_cameras=tuple(config.cameras) if config.ros_operator.use_depth_image else (),
        )
        super().__init__(name, contract, limits)
        self._start_pose = self._start_pose_inside(config, source)
        self._joints: dict[str, SampleBuffer[JointSample]] = {}
        self._colours: dict[str, SampleBuffer[CameraSample]] = {}
        self._depths: dict[str, SampleBuffer[CameraSample]] = {}
        self._subscribers: list[Any] = []
        self._published: dict[str, str] = {}
        self._publishers: dict[str, Any] = {}
        self._messages: Any = None
        self._time: Any = None
        self._twin: TwinChannel | None = None

    @property
    def start_pose(self) -> NDArray[np.float32]:
        """(A,) float32, ``init_pos`` moved inside the limits."""
        return self._start_pose.copy()

    @property
    def start_velocity(self) -> NDArray[np.float64]:
        """(A,) per second: ``arm_steps_length`` times ``publish_rate``."""
        operator = self.config.ros_operator
        return np.array(operator.arm_steps_length * 2) * operator.publish_rate

    @property
    def sensor_timeout_s(self) -> float:
        """As configured, seconds."""
        return self.config.sensor_timeout_s

    def _start_pose_inside(self, config: AgilexConfig, source: str) -> NDArray[np.float32]:
        """(A,) the configured start pose, moved inside the limits."""
        for side in SIDES:
            arm_pose = getattr(config.init_pos, side)
            if len(arm_pose) != JOINTS_PER_ARM:
                raise ConfigError(
                    f"{source}: init_pos.{side}: got {len(arm_pose)} numbers, expected "
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
        # Rounding to float32 must not move it outside again.
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
        decode = functools.partial(decode_joints, expected=self.config.joint_names)
        for side in SIDES:
            topic = getattr(topics, f"puppet_arm_{side}_topic")
            stream = SampleBuffer[JointSample](topic, timeout_s=self.config.sensor_timeout_s)
            self._joints[side] = stream
            self._subscribe(rospy, stream, self._messages.JointState, decode)
            if role is not Role.SENSING:
                # A thread of its own sends the newest message only: a subscriber that does not read
                # its messages, e.g. a recorder, must not delay the arm.
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
        hint = ": are the nodes of the arms and cameras running?"
        wait_for_topics(self._streams(), deadline_s, timeout_s, subject=f"{self.name}: ", hint=hint)
        self._wait_for_subscribers(deadline_s, timeout_s)
        if self._twin is not None:
            self._twin.wait(deadline_s, timeout_s)

    def _subscribe_to_cameras(self, rospy: Any) -> None:
        topics = self.config.ros_operator

        def subscribe(
            stream: SampleBuffer[CameraSample],
            decode: Callable[[Any], Any],
            decode_compressed: Callable[[Any], Any],
        ) -> None:
            name = message_type(stream.name, self._published_type(rospy, stream.name))
            kind = getattr(self._messages, name)
            raw = kind is self._messages.Image
            self._subscribe(rospy, stream, kind, decode if raw else decode_compressed)

        for name, camera in self.config.cameras.items():
            topic = getattr(topics, f"img_{camera.camera}_topic")
            # Images are large, and old ones are not needed.
            colour = SampleBuffer[CameraSample](
                topic, timeout_s=self.config.sensor_timeout_s, keep=2
            )
            self._colours[name] = colour
            compressed = functools.partial(
                decode_compressed_colour, hw=camera.hw, encoding=camera.encoding
            )
            subscribe(colour, colour_decoder(topic, camera.hw, camera.encoding), compressed)
            if topics.use_depth_image:
                topic = getattr(topics, f"img_{camera.camera}_depth_topic")
                depth = SampleBuffer[CameraSample](
                    topic, timeout_s=self.config.sensor_timeout_s, keep=8
                )
                self._depths[name] = depth
                subscribe(depth, decode_depth, decode_compressed_depth)

    def _subscribe(
        self, rospy: Any, stream: SampleBuffer[Any], kind: Any, decode: Callable[[Any], Any]
    ) -> None:
        expected, got = kind._type, self._published_type(rospy, stream.name)
        if got not in (None, expected):
            raise ContractViolated(
                f"{stream.name}: got messages of type {got}, expected {expected}; check the "
                "topic's name in ros_operator"
            )
        joints = kind is self._messages.JointState
        receive = sample_receiver(
            stream,
            JointSample if joints else CameraSample,
            decode,
            lambda message: int(message.header.stamp.to_nsec()),
        )
        self._subscribers.append(
            rospy.Subscriber(
                stream.name,
                kind,
                receive,
                queue_size=1,
                buff_size=JOINTS_BUFFER if joints else IMAGE_BUFFER,
                tcp_nodelay=True,
            )
        )

    def _published_type(self, rospy: Any, topic: str) -> str | None:
        """Type of the messages on ``topic``; None without a publisher.

        It is checked because rospy waits forever for messages of another type than published.
        """
        return self._published.get(rospy.resolve_name(topic))

    def _streams(self) -> list[SampleBuffer[Any]]:
        return [*self._joints.values(), *self._colours.values(), *self._depths.values()]

    def _wait_for_subscribers(self, deadline_s: float, timeout_s: float) -> None:
        """Wait until the arms' nodes have subscribed to the topics of the commands."""
        while missing := [p.name for p in self._publishers.values() if not p.get_num_connections()]:
            if time.monotonic() >= deadline_s:
                raise ConnectFailed(
                    f"{self.name}: got no subscriber on {missing} within {timeout_s:g} s, expected "
                    "one on each: are the arms' nodes running?"
                )
            time.sleep(POLL_PERIOD_S)

    def _get_joints(self) -> JointSample:
        return join_joints([self._joints[side].newest() for side in SIDES])

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        return join_joints([self._joints[side].nearest(stamp_ns) for side in SIDES])

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
                    f"{self.name}: the last subscriber on {publisher.name} has gone: has the "
                    f"{side} arm's node ended?"
                )
            message = self._messages.JointState()
            # One stamp for both messages: together they are one command.
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
    """Build the robot; called by ``robots.factory``, which describes the arguments."""
    config = parse_config(AgilexConfig, args, source=source, overrides=overrides)
    return AgilexAloha(config, name=name, source=source)
