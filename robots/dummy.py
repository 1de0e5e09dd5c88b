"""``dummy``: a robot without hardware, in ILStudio's configuration format.

For testing the data path of a policy. Joints are where they were last commanded; images are noise
that changes ``camera_hz`` times a second. It has no dynamics, no meaningful limits and no outcome,
and two processes that connect get two independent robots.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from policies.number_ranges import PIXELS, POSITIVE_OR_ANY, RATE_HZ, check_ranges
from policies.types import CtrlSpace, CtrlType
from policies.yaml_config import parse_config
from robots.base import (
    DEFAULT_SENSOR_TIMEOUT_S,
    ActionSpec,
    CameraSample,
    JointSample,
    Robot,
    RobotContract,
    Role,
)
from robots.errors import ConfigError
from robots.joint_limits import JointLimits

_SHAPE = re.compile(r"\(\s*\d+\s*(,\s*\d+\s*)*,?\s*\)")


@dataclass(frozen=True)
class ArrayConfig:
    """Shape and dtype of one array.

    ``shape`` is a list, or text as in ILStudio's files: ``(480, 640, 3)``.
    """

    shape: tuple[Annotated[int, PIXELS], ...] | str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not sizes or min(sizes) < 1:
            raise ValueError(f"shape: got {self.shape!r}, expected positive sizes: (480, 640, 3)")

    @property
    def sizes(self) -> tuple[int, ...]:
        """``shape`` as numbers; empty if its text is not a shape."""
        if isinstance(self.shape, tuple):
            return self.shape
        if not _SHAPE.fullmatch(self.shape.strip()):
            return ()
        return tuple(int(number) for number in re.findall(r"\d+", self.shape))


@dataclass(frozen=True)
class ObsConfig:
    """Arrays of an observation.

    Attributes:
        qpos: Joint positions, (S,) float32.
        image: The policy's camera name to (H, W, 3) uint8.
        qvel: Present in ILStudio's configurations; ignored, as no policy here uses velocities.
    """

    qpos: ArrayConfig
    image: Mapping[str, ArrayConfig] = field(default_factory=dict)
    qvel: ArrayConfig | None = None


@dataclass(frozen=True)
class DummyConfig:
    """Configuration of the dummy: ILStudio's keys, then optional keys of this project.

    Attributes:
        obs_config, action_config: Shapes.
        ctrl_type, ctrl_space: Of the commands.
        camera_hz: New images per second.
        position_limit, velocity_limit, acceleration_limit: Of every joint, in both directions.
    """

    obs_config: ObsConfig
    action_config: ArrayConfig
    ctrl_type: CtrlType = "abs"
    ctrl_space: CtrlSpace = "joint"
    camera_hz: Annotated[float, RATE_HZ] = 30.0
    position_limit: Annotated[float, POSITIVE_OR_ANY] = math.inf
    velocity_limit: Annotated[float, POSITIVE_OR_ANY] = math.inf
    acceleration_limit: Annotated[float, POSITIVE_OR_ANY] = math.inf

    def __post_init__(self) -> None:
        check_ranges(self)


class DummyRobot(Robot):
    """A robot without hardware; see the module.

    Args:
        config: The configuration.
        name: The robot's name in results.
        source: Where the configuration comes from, for errors.

    Raises:
        ConfigError: Shapes, dtypes or limits that no robot can have.
    """

    def __init__(self, config: DummyConfig, *, name: str = "dummy", source: str = "") -> None:
        arrays = {
            "obs_config.qpos": (config.obs_config.qpos, "float32", 1),
            "action_config": (config.action_config, "float32", 1),
            **{
                f"obs_config.image.{camera}": (array, "uint8", 3)
                for camera, array in config.obs_config.image.items()
            },
        }
        for key, (array, dtype, dimensions) in arrays.items():
            if array.dtype != dtype or len(array.sizes) != dimensions:
                shape = "(height, width, 3)" if dimensions == 3 else "(n,)"
                raise ConfigError(
                    f"{source}: {key}: got {array.dtype} {array.sizes}, expected {dtype} {shape}"
                )
            if dimensions == 3 and array.sizes[2] != 3:
                raise ConfigError(
                    f"{source}: {key}: got {array.sizes}, expected 3 colours: (height, width, 3)"
                )
        (state_dim,), (action_dim,) = config.obs_config.qpos.sizes, config.action_config.sizes
        if action_dim > state_dim:
            raise ConfigError(
                f"{source}: action_config: got {action_dim} commands, expected at most the "
                f"{state_dim} joints of obs_config.qpos"
            )
        self._period_ns = round(1e9 / config.camera_hz)
        contract = RobotContract(
            joint_names=tuple(f"joint_{index}" for index in range(state_dim)),
            actions=tuple(ActionSpec(f"joint_{index}") for index in range(action_dim)),
            cameras={
                camera: (array.sizes[0], array.sizes[1])
                for camera, array in config.obs_config.image.items()
            },
            ctrl_space=config.ctrl_space,
            ctrl_type=config.ctrl_type,
        )
        limits = JointLimits.from_config(
            contract.joint_names[:action_dim],
            position_lower=(-config.position_limit,) * action_dim,
            position_upper=(config.position_limit,) * action_dim,
            velocity=(config.velocity_limit,) * action_dim,
            acceleration=(config.acceleration_limit,) * action_dim,
            source=source,
        )
        super().__init__(name, contract, limits)
        self._position = np.zeros(state_dim, np.float32)
        self._images: dict[str, CameraSample] = {}

    @property
    def start_pose(self) -> NDArray[np.float32]:
        """(A,) float32 zeros."""
        return np.zeros(self.contract.action_dim, np.float32)

    @property
    def sensor_timeout_s(self) -> float:
        """The default, or three periods of the cameras if those are longer."""
        return max(DEFAULT_SENSOR_TIMEOUT_S, 3e-9 * self._period_ns)

    def _connect(self, role: Role, timeout_s: float) -> None:
        del role, timeout_s
        self._images.clear()

    def _get_joints(self) -> JointSample:
        now_ns = time.monotonic_ns()
        return JointSample(self._position.copy(), now_ns, now_ns)

    def _get_joints_at(self, stamp_ns: int) -> JointSample:
        return JointSample(self._position.copy(), stamp_ns, stamp_ns)

    def _get_cameras(self) -> dict[str, CameraSample]:
        now_ns = time.monotonic_ns()
        stamp_ns = now_ns - now_ns % self._period_ns
        for camera, hw in self.contract.cameras.items():
            previous = self._images.get(camera)
            if previous is None or previous.stamp_ns != stamp_ns:
                generator = np.random.default_rng(stamp_ns)
                noise = generator.integers(0, 256, (*hw, 3), np.uint8)
                self._images[camera] = CameraSample(noise, stamp_ns, now_ns)
        return dict(self._images)

    def _send_action(self, action: NDArray[np.float32]) -> None:
        commanded = self._position[: len(action)]
        if self.contract.ctrl_type == "abs":
            commanded[:] = action
        else:
            commanded += action

    def _reset(self, seed: int) -> bool:
        del seed
        self._position.fill(0.0)
        return True

    def _disconnect(self) -> None:
        self._images.clear()


def make(
    args: Mapping[str, Any], name: str, source: str, overrides: Mapping[str, str]
) -> DummyRobot:
    """Build the robot; called by ``robots.factory``, which describes the arguments."""
    config = parse_config(DummyConfig, args, source=source, overrides=overrides)
    return DummyRobot(config, name=name, source=source)
