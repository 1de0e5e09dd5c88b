"""The ALOHA tasks as ``gymnasium`` environments; importing this module registers them.

``metronome/AlohaTransferCube-v0`` and ``metronome/AlohaInsertion-v0`` replace gym-aloha's
environments with ``obs_type="pixels_agent_pos"``: they have the same observation keys, seeds,
rewards and images. They render only the cameras that were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.aloha_physics import ACTION_DIM, DEFAULT_HW, STATE_DIM, AlohaSim
from envs.aloha_tasks import MAX_REWARD
from envs.errors import EnvError, UnknownCamera

Observation = dict[str, Any]

FPS = 50
EPISODE_STEPS = 400
"""Ticks of an episode in the ACT paper; ``gymnasium.make(..., max_episode_steps=N)`` changes it."""
POSITION_BOUND = 1000.0
"""Bound of ``agent_pos`` in the observation space, in each direction."""


class AlohaEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """One ALOHA task as a gymnasium environment.

    Observations: ``pixels``, camera to (H, W, 3) uint8 RGB, and ``agent_pos``, (14,) float64: per
    arm six joint angles in rad and the gripper from 0 (closed) to 1 (open), left arm first.
    Actions are targets for the same 14 numbers. As in gym-aloha the action space says -1 to 1, but
    larger angles are accepted up to the joints' limits. The reward is 0 to 4; 4 ends the episode.

    Args:
        task: ``sim_transfer_cube`` or ``sim_insertion``.
        cameras: Cameras in ``pixels``.
        height, width: Size of the images in pixels.
        shadows: Whether lights cast shadows. They are most of the cost of software rendering.
        msaa: Samples per pixel, 0 for none.
        lazy_pixels: Leave ``pixels`` out of observations and of the observation space. Callers
            that need an image call ``env.unwrapped.render_camera``.
        render_mode: ``"rgb_array"`` or None.

    Raises:
        EnvError: An unknown task or render mode, no cameras, or an invalid size.
        UnknownCamera: A camera that the model does not have.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": FPS}  # type: ignore[misc]

    def __init__(
        self,
        task: str = "sim_transfer_cube",
        *,
        cameras: Sequence[str] = ("top",),
        height: int = DEFAULT_HW[0],
        width: int = DEFAULT_HW[1],
        shadows: bool = True,
        msaa: int = 4,
        lazy_pixels: bool = False,
        render_mode: str | None = "rgb_array",
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise EnvError(f"render_mode: got {render_mode!r}, expected 'rgb_array' or None")
        if not cameras or isinstance(cameras, str):
            raise EnvError(f"cameras: got {cameras!r}, expected a list of at least one name")
        self.render_mode = render_mode
        self.sim = AlohaSim(task, max_hw=(height, width), shadows=shadows, msaa=msaa)
        for camera in cameras:
            if camera not in self.sim.camera_names:
                raise UnknownCamera(
                    f"cameras: got {camera!r}, expected some of {list(self.sim.camera_names)}"
                )
        self._cameras, self._hw, self._lazy = tuple(cameras), (height, width), lazy_pixels
        self._joints = spaces.Box(-POSITION_BOUND, POSITION_BOUND, (STATE_DIM,), np.float64)
        picture = spaces.Box(0, 255, (height, width, 3), np.uint8)
        keys: dict[str, spaces.Space[Any]] = {"agent_pos": self._joints}
        if not lazy_pixels:
            keys = {"pixels": spaces.Dict(dict.fromkeys(self._cameras, picture)), **keys}
        self.observation_space = spaces.Dict(keys)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a new episode; ``seed`` (0 to 2³²-1) places the objects as in gym-aloha."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**32))
        self.sim.reset(seed)
        return self._observation(), {"is_success": False}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run one control step; success (a reward of 4) terminates the episode."""
        reward = self.sim.step(action)
        success = reward == MAX_REWARD
        return self._observation(), float(reward), success, False, {"is_success": success}

    def render(self) -> NDArray[np.uint8] | None:
        """Return the first camera's current image, (H, W, 3) uint8."""
        if self.render_mode is None:
            return None
        return self.render_camera(self._cameras[0])

    def render_camera(
        self, name: str, *, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Render camera ``name`` (any of the model's), into ``out`` (H, W, 3) uint8 if given."""
        return self.sim.render_camera(name, hw=self._hw, out=out)

    def close(self) -> None:
        """Release the simulation and its GL context. Idempotent."""
        self.sim.close()

    def _observation(self) -> Observation:
        observation: Observation = {}
        if not self._lazy:
            observation["pixels"] = {name: self.render_camera(name) for name in self._cameras}
        observation["agent_pos"] = self.sim.agent_pos
        return observation


for _name, _task in (("TransferCube", "sim_transfer_cube"), ("Insertion", "sim_insertion")):
    gymnasium.register(
        id=f"metronome/Aloha{_name}-v0",
        entry_point="envs.aloha_gym:AlohaEnv",
        max_episode_steps=EPISODE_STEPS,
        kwargs={"task": _task},
    )
