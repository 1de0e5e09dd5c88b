"""Inverse kinematics of one arm: joint angles that put the fingertips at a pose.

The solver is damped least squares on the model that is simulated, so there is no second
description of the arm that could disagree with it. It ignores gravity, friction and contacts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import JOINTS_PER_ARM, START_POSE
from envs.errors import EnvError
from envs.gl_context import import_mujoco

if TYPE_CHECKING:
    import mujoco

Vector = NDArray[np.float64]

TIP_OFFSET_M = 0.145
"""Distance from the gripper's frame forward to the point between the fingertip pads."""
DAMPING = 1e-3
"""Damping per squared error: large far from the goal, and vanishing near it for quadratic
convergence.
"""
MAX_ITERATIONS = 100
TOLERANCE = 1e-4
"""Norm of all six errors (position in m, orientation in rad) at which the solver stops."""
MAX_STEP_RAD = 0.2
"""Largest change of a joint per iteration."""


class Unreachable(EnvError):
    """The arm cannot take this pose within its joint limits."""


class ArmKinematics:
    """Forward and inverse kinematics of one arm.

    Poses are those of the point between the fingertips, in the world frame. The rotation's columns
    are the direction in which the gripper points, the direction in which the fingers close, and
    their cross product.

    Args:
        model: The simulation's model.
        side: ``"left"`` or ``"right"``.
    """

    def __init__(self, model: mujoco.MjModel, side: str) -> None:
        mj = import_mujoco()
        self._mj: Any = mj
        self._model, self._side = model, side
        # Separate data, so that planning does not change the simulation's state.
        self._data = mj.MjData(model)
        self._data.qpos[: len(START_POSE)] = START_POSE
        self._body = model.body(f"vx300s_{side}/gripper_link").id
        first = model.joint(f"vx300s_{side}/waist").id
        self._qpos = slice(
            int(model.jnt_qposadr[first]), int(model.jnt_qposadr[first]) + JOINTS_PER_ARM
        )
        dof = int(model.jnt_dofadr[first])
        self._dofs = slice(dof, dof + JOINTS_PER_ARM)
        limits = model.jnt_range[first : first + JOINTS_PER_ARM]
        self._low, self._high = limits[:, 0].copy(), limits[:, 1].copy()

    @property
    def start(self) -> Vector:
        """(6,) joint angles in rad at the start of an episode."""
        return np.array(START_POSE[:JOINTS_PER_ARM])

    def forward(self, joints: Vector) -> tuple[Vector, Vector]:
        """Return position (3,) in m and rotation (3, 3) for ``joints`` (6,) in rad."""
        self._data.qpos[self._qpos] = joints
        self._mj.mj_kinematics(self._model, self._data)
        rotation: Vector = self._data.xmat[self._body].reshape(3, 3).copy()
        body: Vector = self._data.xpos[self._body]
        return body + rotation[:, 0] * TIP_OFFSET_M, rotation

    def inverse(self, position: Vector, rotation: Vector, guess: Vector) -> Vector:
        """Return joints (6,) in rad, near ``guess``, for a pose.

        Raises:
            Unreachable: No solution was found within the joint limits.
        """
        joints = np.array(guess)
        jacobian = np.empty((6, self._model.nv))
        for _ in range(MAX_ITERATIONS):
            at, turned = self.forward(joints)
            error = np.concatenate([position - at, _rotation_error(turned, rotation)])
            if np.linalg.norm(error) < TOLERANCE:
                return joints
            self._mj.mj_comPos(self._model, self._data)
            self._mj.mj_jac(self._model, self._data, jacobian[:3], jacobian[3:], at, self._body)
            j = jacobian[:, self._dofs]
            damping = DAMPING * float(error @ error) + 1e-9
            step = j.T @ np.linalg.solve(j @ j.T + damping * np.eye(6), error)
            step *= min(1.0, MAX_STEP_RAD / max(float(np.abs(step).max()), 1e-12))
            joints = np.clip(joints + step, self._low, self._high)
        raise Unreachable(
            f"{self._side} arm: got {np.round(position, 3)} m, off by {np.round(error, 4)} "
            f"(m, rad) after {MAX_ITERATIONS} iterations, expected a pose within reach"
        )


def pointing(side: str, pitch_rad: float, roll_rad: float = 0.0) -> Vector:
    """Return the rotation of a gripper that points inwards from ``side`` and down by ``pitch_rad``.

    Without roll the fingers close along the world's y axis. The roll turns about the gripper's
    axis.
    """
    sign = 1.0 if side == "left" else -1.0
    forward = np.array([sign * np.cos(pitch_rad), 0.0, -np.sin(pitch_rad)])
    across = np.array([0.0, sign, 0.0])
    up = np.cross(forward, across)
    cos, sin = np.cos(roll_rad), np.sin(roll_rad)
    return np.stack([forward, cos * across + sin * up, cos * up - sin * across], axis=1)


def _rotation_error(current: Vector, target: Vector) -> Vector:
    """Return the rotation vector (3,), world frame, that turns ``current`` into ``target``."""
    turn = target @ current.T
    axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    sine, cosine = float(np.linalg.norm(axis)) / 2, (float(np.trace(turn)) - 1) / 2
    turned: Vector = axis / 2
    if sine > 1e-9:
        turned *= np.arctan2(sine, cosine) / sine
    return turned
