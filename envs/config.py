"""The configurations in ``configs/env`` (a simulated world) and ``configs/task`` (a task)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from policies.number_ranges import FINITE, MSAA, PERIOD_S, TICKS, check_ranges
from policies.types import Pixels


@dataclass(frozen=True)
class GymKeys:
    """Keys of a gymnasium environment's observations and infos that hold a policy's inputs.

    Attributes:
        state: Dotted keys whose values are flattened and concatenated to the state; empty if the
            observation is one array.
        images: Camera name to a dotted key, or to ``render()`` for the image that it returns.
        success: Key of ``info`` with the success; None if only the reward shows it.
        kwargs: Keyword arguments of ``gymnasium.make``.
    """

    state: tuple[str, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    success: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EnvConfig:
    """The keys of ``configs/env/*.yaml``: a simulated world.

    Attributes:
        kind: The implementation.
        task: A name in ``configs/task`` (``_scripted`` may follow); for ``gym``, the environment's
            id.
        cameras: The policy's camera names. None: the contract's.
        camera_map: The policy's camera name to this world's.
        image_hw: (height, width) of every camera, in pixels. None: the contract's source size.
        shadows: Whether shadows are rendered. None: the contract's value.
        msaa: Samples per pixel, 0 for no antialiasing. None: the contract's value.
        max_timesteps: Ticks per episode. None: the task's.
        dt_s: Seconds per tick, for a world in which it can be chosen. None: the world's own.
        success_reward: Reward from which on an episode is a success. None: the task's.
        video_camera: This world's camera for videos. None: the policy's first.
        video_hw: (height, width) of videos, in pixels. None: the size of the policy's images.
        gym: The keys for ``kind: gym``.

    Raises:
        ValueError: A value is out of range, or a camera is listed twice.
    """

    kind: Literal["aloha", "fake", "gym"]
    task: str
    cameras: tuple[str, ...] | None = None
    camera_map: Mapping[str, str] = field(default_factory=dict)
    image_hw: tuple[Pixels, Pixels] | None = None
    shadows: bool | None = None
    msaa: Annotated[int, MSAA] | None = None
    max_timesteps: Annotated[int, TICKS] | None = None
    dt_s: Annotated[float, PERIOD_S] | None = None
    success_reward: Annotated[float, FINITE] | None = None
    video_camera: str | None = None
    video_hw: tuple[Pixels, Pixels] | None = None
    gym: GymKeys = field(default_factory=GymKeys)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.cameras is not None and len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"cameras: got {list(self.cameras)}, expected different names")


@dataclass(frozen=True)
class TaskConfig:
    """The keys of ``configs/task/*.yaml``: a task, in simulation or on a robot.

    Attributes:
        name: The task's name in the simulation.
        language: The instruction in words.
        max_timesteps: Ticks per episode.
        success_reward: Reward from which on an episode is a success.
    """

    name: str
    language: str = ""
    max_timesteps: Annotated[int, TICKS] = 400
    success_reward: Annotated[float, FINITE] = 4.0
