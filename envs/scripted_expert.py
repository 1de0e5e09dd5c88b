"""The scripted expert: waypoints of the fingertips, turned into joint commands.

A plan is open loop and depends on nothing but where the objects start. That is what makes it easy
to imitate: equal pictures ask for equal actions.
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
WRIST = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
"""Picks the wrist angle of six joints."""
UP, RIGHT = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0])
START_TIP = np.array([0.17291, 0.5, 0.30973])
"""Of the right gripper; the left one's is its mirror image."""
START_PITCH_RAD, START_GRIPPER = -0.1, 0.1
MEETING_POINT = np.array([0.0, 0.5, 0.25])
STEEP_RAD = np.deg2rad(75.0)
"""From above, a grasp forgives an error of 16 mm in the object's place (24 of 24; 18 at 55°)."""
CUBE_GRASP_HEIGHT_M = 0.015

PEG_REST_HEIGHT_M, SOCKET_REST_HEIGHT_M = 0.01, 0.022
"""Of their centres, lying on the table."""
PEG_GRASP_HEIGHT_M, SOCKET_GRASP_HEIGHT_M = 0.012, 0.02
PEG_GRIP_M, SOCKET_GRIP_M = 0.02, 0.02
"""How far outwards of the centre each is held, so that the fingers keep clear of the joint."""
MEETING_HEIGHT_M = 0.2
INSERTED_M = 0.02
"""Where the peg is pushed to; it meets the pin at 0.05. Those 30 mm forgive an error of 13 mm in
the objects' places (20 of 20 inserted; 14 of 20 with 5 mm)."""


@dataclass(frozen=True, slots=True)
class Waypoint:
    """Where one gripper shall be at a tick.

    Attributes:
        tick: When.
        position: (3,) of the fingertips, m, world frame.
        pitch_rad: How far down the gripper points.
        roll_rad: About where it points.
        gripper: 1 open, 0 closed.
        straight: Whether the fingertips come here on a straight line, or the joints by the
            shortest way. Only the latter can pass the wrist's singularity, where it is straight:
            there a line would make the forearm turn over, one way or the other by a hair's breadth
            of the object's place, which nobody can imitate.
    """

    tick: int
    position: Vector
    pitch_rad: float
    roll_rad: float
    gripper: float
    straight: bool


class Script:
    """Waypoints in the making: each call says what changes until a tick."""

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
    """Commands (400, 14) float32 that do ``sim``'s task from its present start state.

    Raises:
        Unreachable: The objects lie where an arm cannot go.
    """
    scripts = _PLANS[sim.task.name](sim.object_qpos)
    actions = np.empty((EPISODE_TICKS, ACTION_DIM))
    for column, side in ((0, "left"), (7, "right")):
        arm = ArmKinematics(sim.model, side)
        actions[:, column : column + 7] = _follow(arm, side, scripts[side].waypoints)
    return actions.astype(np.float32)


def _follow(arm: ArmKinematics, side: str, waypoints: Sequence[Waypoint]) -> Vector:
    """(400, 7) joint angles and gripper along ``waypoints``."""
    commands = np.empty((EPISODE_TICKS, 7))
    joints = arm.start
    for before, after in itertools.pairwise(waypoints):
        begin = joints
        # Of two solutions, the one in which the wrist bends and the forearm stays as it is.
        guess = begin + WRIST * (after.pitch_rad - before.pitch_rad)
        goal = arm.inverse(after.position, pointing(side, after.pitch_rad, after.roll_rad), guess)
        for tick in range(before.tick, after.tick):
            part = (tick + 1 - before.tick) / (after.tick - before.tick)
            # Speed is zero at both ends and continuous between: no jerk for the servos to chase.
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
    """The right arm lifts the cube to the meeting point; the left takes it, from its free faces."""
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
    """Each arm lifts its object off the table, both level; then the peg goes into the socket."""
    peg = np.array([objects[0], objects[1], PEG_GRASP_HEIGHT_M]) + RIGHT * PEG_GRIP_M
    socket = np.array([objects[7], objects[8], SOCKET_GRASP_HEIGHT_M]) - RIGHT * SOCKET_GRIP_M
    # Where the fingertips must be for the objects' centres to be on the meeting line.
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
    """A script that begins where ``START_POSE`` has the gripper of ``side``."""
    sign = -1.0 if side == "left" else 1.0
    return Script(START_TIP * (sign, 1.0, 1.0), START_PITCH_RAD, START_GRIPPER)


_PLANS: dict[str, Callable[[Vector], dict[str, Script]]] = {
    "sim_transfer_cube": _plan_transfer,
    "sim_insertion": _plan_insertion,
}
