"""The scripted expert: waypoints of the fingertips, converted to joint commands.

A plan is open loop and depends only on where the objects start. That makes it easy to imitate:
equal images call for equal actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import ACTION_DIM, AlohaSim
from envs.errors import EnvError
from envs.kinematics import ArmKinematics, Vector, pointing

EPISODE_TICKS = 400
OPEN, CLOSED = 1.0, 0.0
"""Normalized gripper positions."""
WRIST = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
"""Selects the wrist angle of the six joints."""
UP, RIGHT = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])
"""Unit vectors of the world frame."""
START_TIP = np.array([0.17291, 0.5, 0.30973])
"""Start position of the right gripper's fingertips, m; the left one's is its mirror image."""
START_PITCH_RAD, START_GRIPPER = -0.1, 0.1
MEETING_POINT = np.array([0.0, 0.5, 0.25])
"""Where the cube is handed over, m, world frame."""
STEEP_RAD = np.deg2rad(75.0)
"""Pitch of a grasp from above. At 75° it tolerates an error of 16 mm in the object's position: 24
of 24 attempts succeeded, against 18 at 55°.
"""
CUBE_GRASP_HEIGHT_M = 0.015
"""Height of the fingertips at the grasp."""

PEG_REST_HEIGHT_M, SOCKET_REST_HEIGHT_M = 0.01, 0.022
"""Heights of the objects' centres when they lie on the table."""
PEG_GRASP_HEIGHT_M, SOCKET_GRASP_HEIGHT_M = 0.012, 0.02
"""Heights of the fingertips at the grasp."""
PEG_GRIP_M, SOCKET_GRIP_M = 0.02, 0.02
"""Distance of each grasp from the object's centre, outwards, so that the fingers keep clear of
where peg and socket join.
"""
MEETING_HEIGHT_M = 0.2
"""Height of the line on which peg and socket meet."""
INSERTED_M = 0.02
"""Final distance of the peg, which meets the pin at 0.05. These 30 mm of overtravel tolerate an
error of 13 mm in the objects' positions: 20 of 20 inserted, against 14 of 20 with 5 mm.
"""


@dataclass(frozen=True, slots=True)
class Waypoint:
    """Target of one gripper at a tick.

    Attributes:
        tick: Tick at which the target is reached.
        position: (3,) of the fingertips, m, world frame.
        pitch_rad: Angle of the gripper below the horizontal.
        roll_rad: Rotation about the gripper's axis.
        gripper: 1 open, 0 closed.
        straight: True moves the fingertips on a straight line; False interpolates the joints.
            Use False through the wrist's singularity, where the wrist is straight. There a
            straight line would turn the forearm over, in a direction that depends on tiny
            differences of the object's position, which no policy can imitate.
    """

    tick: int
    position: Vector
    pitch_rad: float
    roll_rad: float
    gripper: float
    straight: bool


class Script:
    """The waypoints of one gripper, built up call by call.

    Args:
        position: (3,) start of the fingertips, m, world frame.
        pitch_rad: Pitch at the start.
        gripper: Gripper position at the start.

    Attributes:
        waypoints: The start and one waypoint for each call of ``to``.
    """

    def __init__(self, position: Vector, pitch_rad: float, gripper: float) -> None:
        self.waypoints = [Waypoint(0, position, pitch_rad, 0.0, gripper, straight=False)]

    def to(
        self,
        tick: int,
        position: Vector | None = None,
        *,
        pitch_rad: float | None = None,
        roll_rad: float | None = None,
        gripper: float | None = None,
        straight: bool = True,
    ) -> None:
        """Append a waypoint; arguments left out keep the previous waypoint's value.

        Raises:
            EnvError: ``tick`` is not after the previous waypoint's.
        """
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
                straight,
            )
        )


def plan_episode(sim: AlohaSim) -> NDArray[np.float32]:
    """Return commands (400, 14) float32 that do ``sim``'s task from its current start state.

    Raises:
        Unreachable: The objects lie where an arm cannot reach.
    """
    scripts = _PLANS[sim.task.name](sim.object_qpos)
    actions = np.empty((EPISODE_TICKS, ACTION_DIM))
    for column, side in ((0, "left"), (7, "right")):
        arm = ArmKinematics(sim.model, side)
        actions[:, column : column + 7] = _follow(arm, side, scripts[side].waypoints)
    return actions.astype(np.float32)


def _follow(arm: ArmKinematics, side: str, waypoints: Sequence[Waypoint]) -> Vector:
    """Return (400, 7) joint angles (rad) and gripper positions along ``waypoints``."""
    commands = np.empty((EPISODE_TICKS, 7))
    joints = arm.start
    for before, after in itertools.pairwise(waypoints):
        begin = joints
        # Start the solver near the solution that bends the wrist and keeps the forearm.
        guess = begin + WRIST * (after.pitch_rad - before.pitch_rad)
        goal = arm.inverse(after.position, pointing(side, after.pitch_rad, after.roll_rad), guess)
        for tick in range(before.tick, after.tick):
            part = (tick + 1 - before.tick) / (after.tick - before.tick)
            # The smoothstep polynomial: speed is zero at both ends and continuous between them.
            part = part * part * (3.0 - 2.0 * part)
            if after.straight:
                rotation = pointing(
                    side,
                    before.pitch_rad + part * (after.pitch_rad - before.pitch_rad),
                    before.roll_rad + part * (after.roll_rad - before.roll_rad),
                )
                position = before.position + part * (after.position - before.position)
                joints = arm.inverse(position, rotation, joints)
            else:
                joints = begin + part * (goal - begin)
            commands[tick, :6] = joints
            commands[tick, 6] = before.gripper + part * (after.gripper - before.gripper)
    commands[waypoints[-1].tick :] = commands[waypoints[-1].tick - 1]
    return commands


def _plan_transfer(objects: Vector) -> dict[str, Script]:
    """The right arm lifts the cube to the meeting point; the left arm takes it there.

    The left gripper closes on the two faces that the right one leaves free.
    """
    cube = np.array([objects[0], objects[1], CUBE_GRASP_HEIGHT_M])
    right = _script("right")
    right.to(80, cube + UP * 0.08, pitch_rad=STEEP_RAD, gripper=OPEN, straight=False)
    right.to(115, cube)
    right.to(125)
    right.to(150, gripper=CLOSED)
    right.to(170, cube + UP * 0.05)
    right.to(215, MEETING_POINT, straight=False)
    right.to(285)
    right.to(310, gripper=OPEN)
    right.to(350, MEETING_POINT + RIGHT * 0.12 + UP * 0.02)
    left = _script("left")
    away = MEETING_POINT - RIGHT * 0.125
    left.to(120, away, pitch_rad=0.0, roll_rad=np.pi / 2, gripper=OPEN, straight=False)
    left.to(215)
    left.to(250, MEETING_POINT - RIGHT * 0.005)
    left.to(258)
    left.to(285, gripper=CLOSED)
    left.to(312)
    left.to(370, away)
    return {"left": left, "right": right}


def _plan_insertion(objects: Vector) -> dict[str, Script]:
    """Each arm lifts its object, both level; then the right arm pushes the peg into the socket."""
    peg = np.array([objects[0], objects[1], PEG_GRASP_HEIGHT_M]) + RIGHT * PEG_GRIP_M
    socket = np.array([objects[7], objects[8], SOCKET_GRASP_HEIGHT_M]) - RIGHT * SOCKET_GRIP_M
    # Offsets of the fingertips that put the objects' centres on the meeting line.
    peg_in_hand = RIGHT * PEG_GRIP_M + UP * (PEG_GRASP_HEIGHT_M - PEG_REST_HEIGHT_M)
    socket_in_hand = UP * (SOCKET_GRASP_HEIGHT_M - SOCKET_REST_HEIGHT_M) - RIGHT * SOCKET_GRIP_M
    line = np.array([0.0, 0.5, MEETING_HEIGHT_M])
    right = _script("right")
    right.to(80, peg + UP * 0.08, pitch_rad=STEEP_RAD, gripper=OPEN, straight=False)
    right.to(115, peg)
    right.to(125)
    right.to(150, gripper=CLOSED)
    right.to(170, peg + UP * 0.05)
    right.to(220, line + peg_in_hand + RIGHT * 0.12, straight=False)
    right.to(235)
    right.to(320, line + peg_in_hand + RIGHT * INSERTED_M)
    left = _script("left")
    left.to(80, socket + UP * 0.08, pitch_rad=STEEP_RAD, gripper=OPEN, straight=False)
    left.to(115, socket)
    left.to(125)
    left.to(150, gripper=CLOSED)
    left.to(170, socket + UP * 0.05)
    left.to(220, line + socket_in_hand - RIGHT * 0.05, straight=False)
    return {"left": left, "right": right}


def _script(side: str) -> Script:
    """Return a script that starts at the pose of gripper ``side`` in ``START_POSE``."""
    sign = -1.0 if side == "left" else 1.0
    return Script(START_TIP * (sign, 1.0, 1.0), START_PITCH_RAD, START_GRIPPER)


_PLANS: dict[str, Callable[[Vector], dict[str, Script]]] = {
    "sim_transfer_cube": _plan_transfer,
    "sim_insertion": _plan_insertion,
}
