"""What ``configs/env`` and ``configs/task`` say: which world, and what is to be done in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from policies.number_ranges import FINITE, MSAA, PERIOD_S, TICKS, check_ranges
from policies.types import Pixels


@dataclass(frozen=True)
class GymKeys:
    """Where a gymnasium environment's observations and infos hold what a policy needs.

    Attributes:
        state: Dotted keys whose values are flattened and concatenated to the state; empty where
            the observation is one array.
        images: Policy's camera name to a dotted key, or to ``render()`` for what that returns.
        success: Key of ``info`` that tells success; None where only the reward does.
        kwargs: For ``gymnasium.make``.
    """

    state: tuple[str, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    success: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EnvConfig:
    """``configs/env/*.yaml``.

    Attributes:
        kind: Which implementation.
        task: Name of a task in ``configs/task`` (``_scripted`` may follow), or for ``gym`` the id.
        cameras: The policy's camera names. None: the contract's.
        camera_map: Policy's camera name to this world's.
        image_hw: (height, width) of every camera. None: the contract's source size.
        shadows, msaa: How to render. None: as the contract says.
        max_timesteps: Ticks per episode. None: the task's.
        dt_s: Seconds per tick, for a world that doesn't fix it. None: the world's own.
        success_reward: Reward that means success. None: the task's.
        video_camera: This world's camera for videos. None: the policy's first.
        video_hw: (height, width) of videos. None: the policy's own picture.
        gym: For ``kind: gym``.
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
    """``configs/task/*.yaml``: what is to be done, whatever does it.

    Attributes:
        name: The simulation's name of the task.
        language: The instruction in words.
        max_timesteps: Ticks per episode.
        success_reward: Reward from which on the job is done.
    """

    name: str
    language: str = ""
    max_timesteps: Annotated[int, TICKS] = 400
    success_reward: Annotated[float, FINITE] = 4.0
