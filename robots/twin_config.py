"""Configuration of ``sim_twin``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from policies.number_ranges import (
    DURATION_S,
    FINITE,
    MSAA,
    PIXELS,
    POSITIVE,
    RATE_HZ,
    Range,
    check_ranges,
)
from policies.yaml_config import parse_config

SUBSTEP_HZ = 500
"""Physics steps of the simulation per second."""
JOINTS = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in (
        "waist",
        "shoulder",
        "elbow",
        "forearm_roll",
        "wrist_angle",
        "wrist_rotate",
        "gripper",
    )
)
GRIPPERS = (6, 13)


@dataclass(frozen=True)
class TwinCamera:
    """A camera of the simulation, and the (height, width) of its images."""

    camera: str
    hw: tuple[Annotated[int, PIXELS], Annotated[int, PIXELS]]

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class TwinLimits:
    """Per arm, 7 numbers each: six joints (rad) and the gripper (0 closed to 1 open)."""

    position_lower: tuple[Annotated[float, FINITE], ...]
    position_upper: tuple[Annotated[float, FINITE], ...]
    velocity: tuple[Annotated[float, POSITIVE], ...]
    acceleration: tuple[Annotated[float, POSITIVE], ...]


@dataclass(frozen=True)
class TwinConfig:
    """Keys of ``configs/robot/sim_twin.yaml``.

    Attributes:
        task: ``sim_transfer_cube`` or ``sim_insertion``.
        cameras: The policy's camera name to the simulation's camera.
        limits: Of each arm.
        camera_hz: Images of each camera per second.
        control_hz: How often the arms take over the newest command; a divisor of 500.
        shadows, msaa: Whether to render shadows, and samples per pixel of multisampling.
        success_reward: Lowest reward at which the task is done.
        start_velocity: Per arm, 7 numbers: speed limits of the move to the start pose.
        sensor_timeout_s: A sensor that sends nothing for so long is lost.
        address: Of a running simulator; None until ``companion`` starts one.
    """

    task: str
    cameras: Mapping[str, TwinCamera]
    limits: TwinLimits
    start_velocity: tuple[Annotated[float, POSITIVE], ...]
    camera_hz: Annotated[float, RATE_HZ] = 50.0
    control_hz: Annotated[int, Range(1, SUBSTEP_HZ)] = 100
    shadows: bool = False
    msaa: Annotated[int, MSAA] = 0
    success_reward: Annotated[float, FINITE] = 4.0
    sensor_timeout_s: Annotated[float, DURATION_S] = 0.5
    address: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if SUBSTEP_HZ % self.control_hz:
            raise ValueError(
                f"control_hz: got {self.control_hz}, expected a divisor of {SUBSTEP_HZ}"
            )
        if len(self.start_velocity) != 7:
            raise ValueError(
                f"start_velocity: got {self.start_velocity}, expected 7 positive numbers"
            )

    @property
    def camera_hw(self) -> dict[str, tuple[int, int]]:
        """The policy's camera name to (height, width)."""
        return {name: camera.hw for name, camera in self.cameras.items()}

    @property
    def max_hw(self) -> tuple[int, int]:
        """The largest height and width of any camera."""
        sizes = list(self.camera_hw.values()) or [(1, 1)]
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def to_json(self) -> str:
        """As text, for ``from_json`` in another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TwinConfig:
        """From the text of ``to_json``."""
        return parse_config(cls, json.loads(text), source="twin")
