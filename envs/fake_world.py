"""A small deterministic world without MuJoCo or GL, for tests and for machines without either.

Fourteen joints move a fixed fraction of the way to the commanded position every tick. The seed
sets a target pose; success is a pose within a tolerance of it. The images show a gradient, a
square at the target and one at the current pose, so they depend on seed, state and camera. The
world does not model contact, gravity, noise or latency.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import MAX_SEED, START_POSE
from envs.errors import EnvError
from envs.world import Pictures, RecordedObservation, StepResult, check_action
from policies.types import MetaObs

START = np.array((*START_POSE[:6], 0.1) * 2, np.float64)
"""(14,) start pose: rad, grippers 0 to 1."""
FOLLOW = 0.2
"""Fraction of the distance to the command that one tick covers."""
TOLERANCE = 0.1
"""Largest distance of any joint from the target that counts as success."""
TARGET_SPREAD = 0.3
"""Largest distance of the target from ``START``, per joint."""
SQUARE = 1 / 8
"""Side of a drawn square, as a fraction of the image's side."""


class FakeWorld:
    """The fake world; see the module.

    Args:
        camera_hw: Camera names, any, to (height, width).
        camera_map: Of those, which show the picture of a camera of another name.
        task, language: Reported as they are.
        max_timesteps: Ticks per episode.
        dt_s: Seconds per tick.

    Attributes:
        target: (14,) the pose that counts as success. A test's perfect policy commands it.
    """

    DT_S = 0.02
    action_dim = state_dim = len(START)
    control = ("joint", "abs")
    object_pose_names = ("target.x", "target.y")

    def __init__(
        self,
        *,
        camera_hw: Mapping[str, tuple[int, int]],
        task: str = "fake",
        language: str = "",
        max_timesteps: int = 400,
        dt_s: float = DT_S,
        camera_map: Mapping[str, str] | None = None,
    ) -> None:
        self.task, self.language = task, language
        self.max_timesteps, self.dt_s = max_timesteps, dt_s
        self.camera_names = tuple(camera_hw)
        self.camera_hw = dict(camera_hw)
        self._camera_map = dict(camera_map or {})
        self._closed = False
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Start a new episode; ``seed`` (0 to 2³²-1) sets the target."""
        if not 0 <= seed <= MAX_SEED:
            raise EnvError(f"seed: got {seed}, expected 0 to {MAX_SEED}")
        generator = np.random.default_rng(seed)
        self.target = START + generator.uniform(-TARGET_SPREAD, TARGET_SPREAD, START.shape)
        self._pose = START.copy()
        self._timestep, self._highest_reward = 0, 0.0

    def observe(self, out: Pictures | None = None) -> MetaObs:
        """Draw every camera's image and return the pose, (14,) float32."""
        captured_ns = time.monotonic_ns()
        return MetaObs(
            images={
                name: self._draw(name, None if out is None else out.get(name), self._pose)
                for name in self.camera_names
            },
            state=self._pose.astype(np.float32),
            raw_lang=self.language,
            timestep=self._timestep,
            t_capture_ns=captured_ns,
        )

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Move ``FOLLOW`` of the way to ``action``, (14,)."""
        if self._closed:
            raise EnvError("the world is closed")
        check_action(action, self.action_dim)
        self._pose += FOLLOW * (action.astype(np.float64) - self._pose)
        self._timestep += 1
        distance = float(np.abs(self._pose - self.target).max())
        success = distance <= TOLERANCE
        # 0 to 4 as in the ALOHA tasks, so that code that reads rewards needs no special case.
        reward = 4.0 if success else float(np.clip(3.0 * (1.0 - distance / TARGET_SPREAD), 0, 3))
        self._highest_reward = max(self._highest_reward, reward)
        return StepResult(
            reward=reward,
            highest_reward=self._highest_reward,
            success=success,
            terminated=success,
            truncated=self._timestep >= self.max_timesteps,
        )

    def snapshot(self) -> object:
        """Copy the pose."""
        return self._pose.copy()

    def frame(self, snapshot: object = None) -> NDArray[np.uint8]:
        """Draw the first camera's image, at ``snapshot`` if given."""
        name = self.camera_names[0] if self.camera_names else "video"
        pose = snapshot if isinstance(snapshot, np.ndarray) else self._pose
        return self._draw(name, None, pose)

    def observation_snapshot(self) -> object:
        """Copy the pose."""
        return self._pose.copy()

    def observe_snapshot(self, snapshot: object) -> RecordedObservation:
        """Draw every camera's image at ``snapshot``, a pose; the object is the target's square."""
        pose = np.asarray(snapshot, np.float64)
        return RecordedObservation(
            images={name: self._draw(name, None, pose) for name in self.camera_names},
            state=pose.astype(np.float32),
            objects=self.target[:2].astype(np.float32),
        )

    def info(self) -> dict[str, Any]:
        """Return the task, the cameras and the episode's length."""
        return {
            "world": "fake",
            "task": self.task,
            "renderer": "numpy",
            "cameras": {name: {"hw": list(hw)} for name, hw in self.camera_hw.items()},
            "max_timesteps": self.max_timesteps,
            "dt_s": self.dt_s,
        }

    def close(self) -> None:
        """Make further steps fail. Idempotent."""
        self._closed = True

    def _draw(
        self, name: str, out: NDArray[np.uint8] | None, shown: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        if out is None:
            out = np.empty((*self.camera_hw.get(name, (120, 160)), 3), np.uint8)
        if out.ndim != 3 or out.shape[2] != 3 or out.dtype != np.uint8:
            raise EnvError(f"images.{name}: got {out.dtype} {out.shape}, expected uint8 (H, W, 3)")
        height, width = out.shape[:2]
        out[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
        out[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
        out[..., 2] = zlib.crc32(self._camera_map.get(name, name).encode()) % 256
        for pose, colour in ((self.target, (255, 0, 0)), (shown, (255, 255, 255))):
            # Map the first two joints, START ± 0.5 rad, to the image.
            x, y = np.clip(pose[:2] - START[:2] + 0.5, 0.0, 1.0) * (1.0 - SQUARE)
            top, left = int(y * height), int(x * width)
            side_h, side_w = max(1, int(SQUARE * height)), max(1, int(SQUARE * width))
            out[top : top + side_h, left : left + side_w] = colour
        return out
