"""Creates a ``World`` from a configuration, a policy's contract and the user's overrides.

The contract defines the cameras, their sizes and how they are rendered. A key of the configuration
overrides the contract unless it is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from envs.config import EnvConfig, TaskConfig
from envs.errors import EnvError
from envs.world import World
from policies.types import CameraContract, Rendering
from policies.yaml_config import load_config

DEFAULT_CAMERAS = ("top",)
DEFAULT_HW = (480, 640)
DEFAULT_RENDERING = Rendering()
GYM_PREFIX = "gym:"


def load_env_config(name: str, overrides: Mapping[str, str] | None = None) -> EnvConfig:
    """Return the configuration that ``-e name`` means.

    Args:
        name: A name in ``configs/env``, a YAML path, or ``gym:<id>`` for any gymnasium
            environment, whose other keys are those of ``configs/env/gym.yaml``.
        overrides: Dotted key to YAML text, from ``--env.KEY VALUE``.

    Raises:
        InvalidConfig: No such configuration, an unknown key, a wrong type.
    """
    if name.startswith(GYM_PREFIX):
        config = load_config(EnvConfig, "gym", kind="env", overrides=overrides)
        return replace(config, task=name.removeprefix(GYM_PREFIX))
    return load_config(EnvConfig, name, kind="env", overrides=overrides)


def make_world(
    config: EnvConfig,
    *,
    cameras: Sequence[CameraContract] | None = None,
    rendering: Rendering | None = None,
) -> World:
    """Create the world that ``config`` describes.

    Args:
        config: The world's configuration.
        cameras: The contract's cameras, for keys that ``config`` leaves open.
        rendering: The contract's rendering, for keys that ``config`` leaves open.

    Raises:
        EnvError: The world lacks a camera or the task, or cannot render an image size.
        InvalidConfig: The task's configuration is missing or invalid.
    """
    sizes = {camera.name: camera.source_hw for camera in cameras or ()}
    names = config.cameras
    if names is None and cameras is not None:
        names = tuple(sizes)
    if config.kind == "gym":
        from envs.gym_world import GymWorld

        names = tuple(config.gym.images) if names is None else names
        return GymWorld(config, {name: config.image_hw or sizes.get(name) for name in names})
    names = DEFAULT_CAMERAS if names is None else names
    camera_hw = {name: config.image_hw or sizes.get(name, DEFAULT_HW) for name in names}
    contract_rendering = rendering or DEFAULT_RENDERING
    rendering = Rendering(
        shadows=contract_rendering.shadows if config.shadows is None else config.shadows,
        msaa=contract_rendering.msaa if config.msaa is None else config.msaa,
    )
    task = load_config(TaskConfig, config.task.removesuffix("_scripted"), kind="task")
    task = replace(
        task,
        max_timesteps=(
            task.max_timesteps if config.max_timesteps is None else config.max_timesteps
        ),
        success_reward=(
            task.success_reward if config.success_reward is None else config.success_reward
        ),
    )
    if config.kind == "fake":
        from envs.fake_world import FakeWorld

        return FakeWorld(
            task=task.name,
            language=task.language,
            camera_hw=camera_hw,
            max_timesteps=task.max_timesteps,
            dt_s=FakeWorld.DT_S if config.dt_s is None else config.dt_s,
            camera_map=config.camera_map,
        )
    from envs.aloha_physics import DT_S
    from envs.aloha_world import AlohaWorld

    if config.dt_s is not None and config.dt_s != DT_S:
        raise EnvError(f"dt_s: got {config.dt_s}, expected {DT_S}, which the task fixes")
    return AlohaWorld(
        task=task.name,
        language=task.language,
        camera_hw=camera_hw,
        camera_map=config.camera_map,
        rendering=rendering,
        max_timesteps=task.max_timesteps,
        success_reward=task.success_reward,
        video_camera=config.video_camera,
        video_hw=config.video_hw,
    )
