"""Simulates two ViperX arms on a table: physics, reward and cameras, without gymnasium.

Results equal gym-aloha's for equal seeds and actions. It is faster because it renders nothing
unless a camera is asked for.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.aloha_tasks import find_task
from envs.errors import EnvError, PhysicsDiverged
from envs.gl_context import import_mujoco
from envs.rendering import OffscreenRenderer, camera_names
from envs.world import check_action

DT_S = 0.02
"""One control step, 50 Hz."""
JOINTS_PER_ARM = 6
ACTION_DIM = STATE_DIM = 14
"""Per arm: waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate (rad), gripper (0 to 1).
The left arm first."""
FINGER_OPEN_M, FINGER_CLOSED_M = 0.05800, 0.01844
"""Finger travel that a normalized gripper position of 1 and 0 stand for."""
START_POSE = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.02239, -0.02239) * 2
"""qpos of both arms at reset, with two finger joints each."""
ROBOT_QPOS = len(START_POSE)
"""Entries of qpos that belong to the arms; the objects' follow."""
DEFAULT_HW = (480, 640)
MAX_SEED = 2**32 - 1


class AlohaSim:
    """The simulation of one task.

    Args:
        task: ``sim_transfer_cube`` or ``sim_insertion``.
        max_hw: The largest (height, width) to be rendered, in pixels.
        shadows, msaa: See ``OffscreenRenderer``; gym-aloha uses True and 4.

    Attributes:
        model, data: MuJoCo's objects, for callers that need more than this class offers.

    Raises:
        EnvError: An unknown task, an invalid size, or the package gym-aloha is not installed.
    """

    def __init__(
        self,
        task: str,
        *,
        max_hw: tuple[int, int] = DEFAULT_HW,
        shadows: bool = True,
        msaa: int = 4,
    ) -> None:
        self.task = find_task(task)
        if min(max_hw) < 1:
            raise EnvError(f"max_hw: got {max_hw}, expected a positive height and width")
        if msaa not in (0, 2, 4, 8, 16):
            raise EnvError(f"msaa: got {msaa}, expected one of 0, 2, 4, 8, 16")
        mujoco = import_mujoco()
        self._mj: Any = mujoco
        self.model = mujoco.MjModel.from_xml_path(str(assets_folder() / self.task.scene))
        self.data = mujoco.MjData(self.model)
        self.camera_names = camera_names(self.model)
        self._substeps = round(DT_S / self.model.opt.timestep)
        self._geom_names = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self._warnings = np.zeros(len(self.data.warning), np.int64)
        self._max_hw, self._shadows, self._msaa = max_hw, shadows, msaa
        self._renderer: OffscreenRenderer | None = None
        self._pose_data: Any = None
        self._closed = False
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Set the arms to the start pose and place the objects by ``seed`` (0 to 2³²-1)."""
        if not 0 <= seed <= MAX_SEED:
            raise EnvError(f"seed: got {seed}, expected 0 to {MAX_SEED}")
        self.place_objects(self.task.sample(seed))

    def place_objects(self, poses: NDArray[np.float64]) -> None:
        """As ``reset``, with the objects at ``poses``, (7 * objects,) as in ``object_qpos``."""
        if poses.shape != self.object_qpos.shape:
            raise EnvError(f"poses: got {poses.shape}, expected {self.object_qpos.shape}")
        self._mj.mj_resetData(self.model, self.data)
        # dm_control computes the model's default pose first and the start pose twice. Each leaves
        # a warm start for the contact solver that changes the first steps, so this does the same.
        self._forward_without_actuation()
        self.data.qpos[:ROBOT_QPOS] = START_POSE
        self.data.ctrl[:] = START_POSE
        self.data.qpos[ROBOT_QPOS:] = poses
        self._forward_without_actuation()
        self._forward_without_actuation()
        self._warnings[:] = self._warning_counts()

    def step(self, action: NDArray[np.floating[Any]], *, substeps: int | None = None) -> int:
        """Run one control step (10 substeps of 2 ms) towards ``action``, (14,); return the reward.

        Args:
            substeps: Fewer substeps, for callers that send commands more often than every ``DT_S``.

        Raises:
            EnvError: Another shape, or a value that is not finite.
            PhysicsDiverged: The state is no longer valid; ``reset`` restores a valid one.
        """
        check_action(action, ACTION_DIM)
        control = self.data.ctrl
        for arm in (0, 1):
            first, target = arm * 7, arm * 8
            control[target : target + JOINTS_PER_ARM] = action[first : first + JOINTS_PER_ARM]
            # In the action's own precision, as gym-aloha computes it.
            finger = action[first + 6] * (FINGER_OPEN_M - FINGER_CLOSED_M) + FINGER_CLOSED_M
            control[target + 6], control[target + 7] = finger, -finger
        # The previous call ran the first half of this step (mj_step1), so that contacts and images
        # belong to the positions that are read with them.
        self._mj.mj_step2(self.model, self.data)
        self._mj.mj_step(self.model, self.data, (substeps or self._substeps) - 1)
        self._mj.mj_step1(self.model, self.data)
        counts = self._warning_counts()
        if (counts > self._warnings).any():
            names = list(self._mj.mjtWarning.__members__)
            raised = [names[i] for i in np.flatnonzero(counts > self._warnings)]
            self._warnings[:] = counts
            raise PhysicsDiverged(f"the simulation is invalid at {self.data.time:.2f} s: {raised}")
        return self.reward()

    def reward(self) -> int:
        """Return the task's progress in the current state, 0 to 4; see ``envs.aloha_tasks``."""
        names = self._geom_names
        pairs = self.data.contact.geom[: self.data.ncon].tolist()
        return self.task.reward(frozenset((names[first], names[second]) for first, second in pairs))

    @property
    def agent_pos(self) -> NDArray[np.float64]:
        """(14,) joint positions in the order of the action; grippers normalized to 0 to 1."""
        return joint_positions(self.data.qpos)

    @property
    def agent_vel(self) -> NDArray[np.float64]:
        """(14,) velocities of ``agent_pos``: rad/s, and normalized gripper travel per second."""
        qvel = self.data.qvel
        arms = np.array([*qvel[:7], *qvel[8:15]])
        arms[[6, 13]] /= FINGER_OPEN_M - FINGER_CLOSED_M
        return arms

    @property
    def object_qpos(self) -> NDArray[np.float64]:
        """(7 * objects,) poses of the free bodies: x, y, z (m), quaternion wxyz."""
        return np.array(self.data.qpos[ROBOT_QPOS:])

    def render_camera(
        self,
        name: str,
        *,
        hw: tuple[int, int] = DEFAULT_HW,
        out: NDArray[np.uint8] | None = None,
        qpos: NDArray[np.float64] | None = None,
    ) -> NDArray[np.uint8]:
        """Render camera ``name`` into ``out`` (H, W, 3) if given, else into a new array of size
        ``hw``.

        Args:
            qpos: A copy of an earlier ``data.qpos`` to show instead of the current state. The
                simulation itself does not change.

        Raises:
            EnvError: After ``close``.
            UnknownCamera: No such camera.
        """
        if self._closed:
            raise EnvError("the simulation is closed")
        if out is None:
            out = np.empty((*hw, 3), np.uint8)
        self.renderer.render(self.data if qpos is None else self.data_at(qpos), name, out)
        return out

    def data_at(self, qpos: NDArray[np.float64]) -> Any:
        """Return MuJoCo data at ``qpos`` with everything that an image depends on; not ``data``
        itself.
        """
        if self._pose_data is None:
            self._pose_data = self._mj.MjData(self.model)
        self._pose_data.qpos[:] = qpos
        self._mj.mj_kinematics(self.model, self._pose_data)
        self._mj.mj_comPos(self.model, self._pose_data)
        self._mj.mj_camlight(self.model, self._pose_data)
        return self._pose_data

    @property
    def renderer(self) -> OffscreenRenderer:
        """The renderer, created on first use: stepping needs no GL."""
        if self._renderer is None:
            self._renderer = OffscreenRenderer(
                self.model, max_hw=self._max_hw, shadows=self._shadows, msaa=self._msaa
            )
        return self._renderer

    def close(self) -> None:
        """Release the GL context. Idempotent."""
        self._closed = True
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __enter__(self) -> AlohaSim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forward_without_actuation(self) -> None:
        flags = self.model.opt.disableflags
        self.model.opt.disableflags = flags | self._mj.mjtDisableBit.mjDSBL_ACTUATION.value
        try:
            self._mj.mj_forward(self.model, self.data)
        finally:
            self.model.opt.disableflags = flags

    def _warning_counts(self) -> NDArray[np.int64]:
        return np.array(self.data.warning.number, np.int64)


def assets_folder() -> Path:
    """Return the folder of gym-aloha's models and meshes.

    Finds it without importing the package, which would import dm_control.

    Raises:
        EnvError: gym-aloha is not installed.
    """
    spec = importlib.util.find_spec("gym_aloha")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location) / "assets"
        if folder.is_dir():
            return folder
    raise EnvError("the models of gym-aloha are not installed: pip install '.[sim]'")


def joint_positions(qpos: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``AlohaSim.agent_pos`` at ``qpos``, (14,)."""
    arms = [*qpos[:7], *qpos[8:15]]
    for gripper in (6, 13):
        arms[gripper] = (arms[gripper] - FINGER_CLOSED_M) / (FINGER_OPEN_M - FINGER_CLOSED_M)
    return np.array(arms, np.float64)
