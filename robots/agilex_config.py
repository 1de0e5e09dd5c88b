"""Configuration of ``agilex_aloha``: ILStudio's keys, and those of this project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from policies.number_ranges import DURATION_S, FINITE, PIXELS, POSITIVE, RATE_HZ, check_ranges
from robots.ros_images import COLOURS

SIDES = ("left", "right")
JOINTS_PER_ARM = 7
ACTION_DIM = 2 * JOINTS_PER_ARM
GRIPPERS = (6, 13)
JOINT_NAMES = tuple(f"joint{index}" for index in range(JOINTS_PER_ARM))


@dataclass(frozen=True)
class InitPos:
    """The start pose of an episode, 7 numbers per arm."""

    left: tuple[Annotated[float, FINITE], ...]
    right: tuple[Annotated[float, FINITE], ...]


@dataclass(frozen=True)
class LimitPos:
    """Position limits, 14 numbers each: the left arm, then the right."""

    upper: tuple[Annotated[float, FINITE], ...]
    lower: tuple[Annotated[float, FINITE], ...]


@dataclass(frozen=True)
class RosOperator:
    """Topics and rates; ILStudio's keys.

    Attributes:
        arm_steps_length: 7 numbers, the same for both arms: largest step of the move to the start
            pose, which has ``publish_rate`` steps per second. It limits nothing else.
    """

    arm_steps_length: tuple[Annotated[float, POSITIVE], ...]
    publish_rate: Annotated[float, RATE_HZ] = 40.0
    img_front_topic: str = "/camera_f/color/image_raw"
    img_left_topic: str = "/camera_l/color/image_raw"
    img_right_topic: str = "/camera_r/color/image_raw"
    img_front_depth_topic: str = "/camera_f/depth/image_raw"
    img_left_depth_topic: str = "/camera_l/depth/image_raw"
    img_right_depth_topic: str = "/camera_r/depth/image_raw"
    puppet_arm_left_topic: str = "/puppet/joint_left"
    puppet_arm_right_topic: str = "/puppet/joint_right"
    puppet_arm_left_cmd_topic: str = "/master/joint_left"
    puppet_arm_right_cmd_topic: str = "/master/joint_right"
    robot_base_topic: str = "/odom_raw"
    robot_base_cmd_topic: str = "/cmd_vel"
    use_depth_image: bool = False
    use_robot_base: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.arm_steps_length) != JOINTS_PER_ARM:
            raise ValueError(
                f"arm_steps_length: got {self.arm_steps_length}, expected {JOINTS_PER_ARM} numbers"
            )
        if self.use_robot_base:
            # Holding the last command is safe for an arm, but keeps a base driving.
            raise ValueError(
                "use_robot_base: got true, expected false: the mobile base takes velocities, and "
                "this driver could not stop it safely"
            )


@dataclass(frozen=True)
class AgilexCamera:
    """One of the robot's cameras.

    Attributes:
        camera: The robot's name of the camera.
        hw: (height, width) of its images.
        encoding: Used instead of the encoding in its messages: one of ``ros_images.COLOURS``, for
            compressed images one of ``ros_compressed_images.COLOURS``. Empty: the messages' own.
    """

    camera: Literal["front", "left", "right"]
    hw: tuple[Annotated[int, PIXELS], Annotated[int, PIXELS]] = (480, 640)
    encoding: str = ""

    def __post_init__(self) -> None:
        if self.encoding not in ("", *COLOURS):
            raise ValueError(f"encoding: got {self.encoding!r}, expected one of {list(COLOURS)}")
        check_ranges(self)


@dataclass(frozen=True)
class TwinTopics:
    """Topics on which a simulated robot reports its outcome and accepts resets."""

    outcome: str
    reset: str


def _default_cameras() -> dict[str, AgilexCamera]:
    return {
        "primary": AgilexCamera("front"),
        "wrist_left": AgilexCamera("left"),
        "wrist_right": AgilexCamera("right"),
    }


@dataclass(frozen=True)
class AgilexConfig:
    """ILStudio's ``init_pos``, ``limit_pos`` and ``ros_operator``, then this project's keys.

    Attributes:
        limit_vel, limit_acc: Limits of the commands, 14 numbers each; per second, per second
            squared.
        cameras: The policy's camera name to the robot's camera.
        joint_names: 7 names, as in the messages of one arm.
        sensor_timeout_s: A topic that sends nothing, or the same stamp, for so long is lost.
        twin: Topics of a simulated robot; None for a real one.
    """

    init_pos: InitPos
    limit_pos: LimitPos
    ros_operator: RosOperator
    limit_vel: tuple[Annotated[float, POSITIVE], ...]
    limit_acc: tuple[Annotated[float, POSITIVE], ...]
    cameras: Mapping[str, AgilexCamera] = field(default_factory=_default_cameras)
    joint_names: tuple[str, ...] = JOINT_NAMES
    sensor_timeout_s: Annotated[float, DURATION_S] = 0.5
    twin: TwinTopics | None = None

    def __post_init__(self) -> None:
        if len(self.joint_names) != JOINTS_PER_ARM or len(set(self.joint_names)) != JOINTS_PER_ARM:
            raise ValueError(
                f"joint_names: got {self.joint_names}, expected {JOINTS_PER_ARM} different names"
            )
        check_ranges(self)
