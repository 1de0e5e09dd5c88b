"""The ALOHA simulation as a ``World``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import ACTION_DIM, DT_S, ROBOT_QPOS, STATE_DIM, AlohaSim, joint_positions
from envs.errors import UnknownCamera
from envs.rendering import OffscreenRenderer
from envs.world import Pictures, RecordedObservation, StepResult
from policies.types import MetaObs, Rendering

VIDEO_MSAA = 4
"""Videos are for people: antialiased edges, but no shadows, which are most of a frame's cost."""


class AlohaWorld:
    """One ALOHA task with the cameras, sizes and names that a policy expects.

    Args:
        task: ``sim_transfer_cube`` or ``sim_insertion``.
        camera_hw: The policy's camera names, in its order, to (height, width).
        camera_map: The policy's camera name to the model's. A name that the model has needs no
            entry.
        rendering: Shadows and multisampling.
        max_timesteps: Ticks per episode.
        success_reward: A tick with at least this reward counts as success.
        video_camera: The model's camera for ``frame``; None for the policy's first camera.
        video_hw: (height, width) of ``frame``, rendered with antialiasing by a renderer of its own;
            None to use the policy's image of that camera.
        language: The instruction.

    Raises:
        UnknownCamera: A name that is neither in the map nor in the model.
        EnvError: As ``AlohaSim``.
    """

    dt_s = DT_S
    action_dim = ACTION_DIM
    state_dim = STATE_DIM
    control = ("joint", "abs")

    def __init__(
        self,
        *,
        task: str,
        camera_hw: Mapping[str, tuple[int, int]],
        camera_map: Mapping[str, str] | None = None,
        rendering: Rendering | None = None,
        max_timesteps: int = 400,
        success_reward: float = 4.0,
        video_camera: str | None = None,
        video_hw: tuple[int, int] | None = None,
        language: str = "",
    ) -> None:
        rendering = rendering or Rendering()
        heights, widths = zip(*camera_hw.values(), strict=True) if camera_hw else ((480,), (640,))
        self.sim = AlohaSim(
            task,
            max_hw=(max(heights), max(widths)),
            shadows=rendering.shadows,
            msaa=rendering.msaa,
        )
        self.task, self.language = self.sim.task.name, language
        self.max_timesteps = max_timesteps
        self.camera_names = tuple(camera_hw)
        self.camera_hw = dict(camera_hw)
        self._success_reward = success_reward
        self._rendering = rendering
        self._sim_names = {
            name: self._sim_name(name, camera_map or {}) for name in self.camera_names
        }
        first = self._sim_names[self.camera_names[0]] if self.camera_names else "top"
        self._video_camera = first if video_camera is None else self._sim_name(video_camera, {})
        own = (hw for name, hw in camera_hw.items() if self._sim_names[name] == self._video_camera)
        self._frame_hw = video_hw or next(own, (max(heights), max(widths)))
        self._smooth = video_hw is not None
        self._video: OffscreenRenderer | None = None
        self._timestep = 0
        self._highest_reward = 0.0

    def reset(self, seed: int) -> None:
        """Start a new episode; ``seed`` (0 to 2³²-1) places the objects as in gym-aloha."""
        self.sim.reset(seed)
        self._timestep, self._highest_reward = 0, 0.0

    def observe(self, out: Pictures | None = None) -> MetaObs:
        """Render every camera and read the joint positions, (14,) float32."""
        captured_ns = time.monotonic_ns()
        images = {}
        for name, sim_name in self._sim_names.items():
            target = None if out is None else out.get(name)
            images[name] = self.sim.render_camera(sim_name, hw=self.camera_hw[name], out=target)
        return MetaObs(
            images=images,
            state=self.sim.agent_pos.astype(np.float32),
            raw_lang=self.language,
            timestep=self._timestep,
            t_capture_ns=captured_ns,
        )

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Run one control step of ``DT_S`` towards ``action``, (14,)."""
        reward = float(self.sim.step(action))
        self._timestep += 1
        self._highest_reward = max(self._highest_reward, reward)
        success = reward >= self._success_reward
        return StepResult(
            reward=reward,
            highest_reward=self._highest_reward,
            success=success,
            terminated=success,
            truncated=self._timestep >= self.max_timesteps,
        )

    def snapshot(self) -> object:
        """Copy ``qpos``, which is all that an image depends on."""
        return self.sim.data.qpos.copy()

    def frame(self, snapshot: object = None) -> NDArray[np.uint8]:
        """Render the video camera, at ``snapshot`` if given."""
        qpos = snapshot if isinstance(snapshot, np.ndarray) else None
        if not self._smooth:
            return self.sim.render_camera(self._video_camera, hw=self._frame_hw, qpos=qpos)
        if self._video is None:
            self._video = OffscreenRenderer(
                self.sim.model, max_hw=self._frame_hw, shadows=False, msaa=VIDEO_MSAA
            )
        picture = np.empty((*self._frame_hw, 3), np.uint8)
        data = self.sim.data if qpos is None else self.sim.data_at(qpos)
        self._video.render(data, self._video_camera, picture)
        return picture

    @property
    def object_pose_names(self) -> tuple[str, ...]:
        """Seven for each object: position in m, and quaternion."""
        return self.sim.task.object_pose_names

    def observation_snapshot(self) -> object:
        """Copy ``qpos``, which is all that an observation depends on."""
        return self.sim.data.qpos.copy()

    def observe_snapshot(self, snapshot: object) -> RecordedObservation:
        """Render every camera at ``snapshot``, a ``qpos``, and read its joint positions."""
        qpos = np.asarray(snapshot, np.float64)
        return RecordedObservation(
            images={
                name: self.sim.render_camera(sim_name, hw=self.camera_hw[name], qpos=qpos)
                for name, sim_name in self._sim_names.items()
            },
            state=joint_positions(qpos).astype(np.float32),
            objects=qpos[ROBOT_QPOS:].astype(np.float32),
        )

    def info(self) -> dict[str, Any]:
        """Return the task, MuJoCo's version, the renderer and the cameras."""
        import mujoco

        return {
            "world": "aloha",
            "task": self.task,
            "mujoco": mujoco.mj_versionString(),
            "renderer": self.sim.renderer.name,
            "shadows": self._rendering.shadows,
            "msaa": self._rendering.msaa,
            "cameras": {
                name: {"camera": sim_name, "hw": list(self.camera_hw[name])}
                for name, sim_name in self._sim_names.items()
            },
            "max_timesteps": self.max_timesteps,
            "dt_s": self.dt_s,
        }

    def close(self) -> None:
        """Release the simulation and its GL contexts. Idempotent."""
        if self._video is not None:
            self._video.close()
        self.sim.close()

    def _sim_name(self, name: str, camera_map: Mapping[str, str]) -> str:
        mapped = camera_map.get(name, name)
        if mapped not in self.sim.camera_names:
            raise UnknownCamera(
                f"cameras: got {name!r}{f' (mapped to {mapped!r})' if mapped != name else ''}, "
                f"expected some of {list(self.sim.camera_names)} or a name in camera_map, "
                f"which is {dict(camera_map)}"
            )
        return mapped
