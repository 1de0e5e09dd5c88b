"""The scripted expert: waypoints of the fingertips, turned into joint commands.

A plan is open loop and depends on nothing but where the objects start. That is what makes it easy
to imitate: equal pictures ask for equal actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.errors import EnvError
from envs.kinematics import ArmKinematics, Vector, pointing
from envs.physics import ACTION_DIM, AlohaSim

EPISODE_TICKS = 400
OPEN, CLOSED = 1.0, 0.0
MEETING_POINT = (0.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Waypoint:
    """Where one gripper shall be at a tick; between two, it moves smoothly.

    Attributes:
        tick: When.
        position: (3,) of the fingertips, m, world frame.
        pitch_rad: How far down the gripper points.
        roll_rad: About where it points.
        gripper: 1 open, 0 closed.
    """

    tick: int
    position: Vector
    pitch_rad: float
    roll_rad: float
    gripper: float


class Script:
    """Waypoints in the making: each call says what changes until a tick."""

    def __init__(self, position: Sequence[float], pitch_rad: float, gripper: float) -> None:
        self.waypoints = [
            Waypoint(0, np.array(position, np.float64), pitch_rad, 0.0, gripper)
        ]

    def to(
        self,
        tick: int,
        position: Vector | None = None,
        *,
        pitch_rad: float | None = None,
        roll_rad: float | None = None,
        gripper: float | None = None,
    ) -> None:
        last = self.waypoints[-1]
        if tick <= last.tick:
            raise EnvError(f"waypoint: got tick {tick}, expected one after {last.tick}")
        self.waypoints.append(
            Waypoint(
                tick,
                last.position if position is None else position,
                last.pitch_rad if pitch_rad is None else pitch_rad,
                last.roll_rad if roll_rad is None else roll_rad,
                last.gripper if gripper is None else gripper,
            )
        )


def plan_episode(sim: AlohaSim) -> NDArray[np.float32]:
    """Commands (400, 14) float32 that do ``sim``'s task from its present start state.

    Raises:
        Unreachable: The objects lie where an arm cannot go.
    """
    plan = _PLANS[sim.task.name]
    scripts = plan(sim.object_qpos)
    actions = np.empty((EPISODE_TICKS, ACTION_DIM))
    for column, side in ((0, "left"), (7, "right")):
        arm = ArmKinematics(sim.model, side)
        actions[:, column : column + 7] = _follow(arm, side, scripts[side].waypoints)
    return actions.astype(np.float32)


def _follow(arm: ArmKinematics, side: str, waypoints: Sequence[Waypoint]) -> Vector:
    """(400, 7) joint angles and gripper along ``waypoints``."""
    commands = np.empty((EPISODE_TICKS, 7))
    joints = arm.start
    for before, after in zip(waypoints, waypoints[1:], strict=False):
        for tick in range(before.tick, min(after.tick, EPISODE_TICKS)):
            part = (tick + 1 - before.tick) / (after.tick - before.tick)
            # Speed is zero at both ends and continuous between: no jerk for the servos to chase.
            part = part * part * (3.0 - 2.0 * part)
            rotation = pointing(
                side,
                before.pitch_rad + part * (after.pitch_rad - before.pitch_rad),
                before.roll_rad + part * (after.roll_rad - before.roll_rad),
            )
            position = before.position + part * (after.position - before.position)
            joints = arm.inverse(position, rotation, joints)
            commands[tick, :6] = joints
            commands[tick, 6] = before.gripper + part * (after.gripper - before.gripper)
    last = waypoints[-1].tick
    commands[last:] = commands[min(last, EPISODE_TICKS) - 1]
    return commands


START_TIPS = {"left": (-0.17291, 0.5, 0.30973), "right": (0.17291, 0.5, 0.30973)}
START_PITCH_RAD = -0.1
START_GRIPPER = 0.1


def _plan_transfer(objects: Vector) -> dict[str, Script]:
    cube = objects[:3].copy()
    cube[2] = P["grasp_z"]
    meet = np.array(MEETING_POINT)
    right = Script(START_TIPS["right"], START_PITCH_RAD, START_GRIPPER)
    pitch = P["pitch"]
    right.to(80, cube + (0.0, 0.0, 0.09), pitch_rad=pitch, gripper=OPEN)
    right.to(115, cube)
    right.to(125)
    right.to(150, gripper=CLOSED)
    right.to(215, meet)
    right.to(285)
    right.to(310, gripper=OPEN)
    right.to(350, meet + (0.12, 0.0, 0.02))
    left = Script(START_TIPS["left"], START_PITCH_RAD, START_GRIPPER)
    grasp = meet + (P["lx"], 0.0, P["lz"])
    left.to(120, grasp - (0.12, 0.0, 0.0), pitch_rad=0.0, roll_rad=np.pi / 2, gripper=OPEN)
    left.to(215)
    left.to(250, grasp)
    left.to(258)
    left.to(285, gripper=CLOSED)
    left.to(312)
    left.to(370, grasp - (0.1, 0.0, 0.0))
    return {"left": left, "right": right}

P = {"pitch": np.deg2rad(55), "grasp_z": 0.02, "lx": -0.005, "lz": 0.0}
_PLANS = {"sim_transfer_cube": _plan_transfer}
