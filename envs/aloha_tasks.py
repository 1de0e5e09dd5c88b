"""The two ALOHA tasks: their scene, the objects' start poses, and the reward.

Rewards, sampling and names are those of gym-aloha, so that seeds and numbers are comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.errors import EnvError

Contacts = frozenset[tuple[str, str]]
"""Pairs of geom names in contact, ordered as MuJoCo orders them."""

LEFT_FINGER = "vx300s_left/10_left_gripper_finger"
RIGHT_FINGER = "vx300s_right/10_left_gripper_finger"
SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")
MAX_REWARD = 4
"""Reward of a completed task."""
POSE = ("x", "y", "z", "qw", "qx", "qy", "qz")
"""Numbers of an object's pose: position in m, quaternion."""


@dataclass(frozen=True, slots=True)
class Task:
    """Definition of one task.

    Attributes:
        name: The name that users give.
        scene: The model's file among gym-aloha's assets.
        objects: Names of the free bodies, in the order of their qpos.
        sample: Seed to the objects' start poses, (7 * objects,): x, y, z (m), quaternion wxyz.
        reward: Contacts to a reward of 0 to ``MAX_REWARD``.
    """

    name: str
    scene: str
    objects: tuple[str, ...]
    sample: Callable[[int], NDArray[np.float64]]
    reward: Callable[[Contacts], int]

    @property
    def object_pose_names(self) -> tuple[str, ...]:
        """Seven for each object: position in m, and quaternion."""
        return tuple(f"{name}.{part}" for name in self.objects for part in POSE)


def find_task(name: str) -> Task:
    """Return the task called ``name``, with or without the suffix ``_scripted``.

    Raises:
        EnvError: No such task; the message lists the known ones.
    """
    task = TASKS.get(name.removesuffix("_scripted"))
    if task is None:
        raise EnvError(f"task: got {name!r}, expected one of {list(TASKS)} (or with '_scripted')")
    return task


def _sample_transfer(seed: int) -> NDArray[np.float64]:
    return _sample_poses(seed, (((0.0, 0.2), (0.4, 0.6)),))


def _sample_insertion(seed: int) -> NDArray[np.float64]:
    return _sample_poses(seed, (((0.1, 0.2), (0.4, 0.6)), ((-0.2, -0.1), (0.4, 0.6))))


def _sample_poses(
    seed: int, ranges: tuple[tuple[tuple[float, float], tuple[float, float]], ...]
) -> NDArray[np.float64]:
    """Return upright poses, drawn uniformly from x and y ``ranges`` (m), 5 cm above the ground.

    gym-aloha uses numpy's legacy generator; only the same one gives the same poses for a seed.
    """
    generator = np.random.RandomState(seed)
    poses = []
    for (x_low, x_high), (y_low, y_high) in ranges:
        # gym-aloha draws the constant height too, which advances the generator.
        position = generator.uniform((x_low, y_low, 0.05), (x_high, y_high, 0.05))
        poses.append(np.concatenate([position, (1.0, 0.0, 0.0, 0.0)]))
    return np.concatenate(poses)


def _reward_transfer(contacts: Contacts) -> int:
    """Return 1 if the right finger touches the cube, 2 if the cube is also off the table, 3 if the
    left finger touches it, 4 if it is then also off the table.
    """
    lifted = ("red_box", "table") not in contacts
    if ("red_box", LEFT_FINGER) in contacts:
        return 4 if lifted else 3
    if ("red_box", RIGHT_FINGER) in contacts:
        return 2 if lifted else 1
    return 0


def _reward_insertion(contacts: Contacts) -> int:
    """Return 1 if both objects are held, 2 if both are also off the table, 3 if peg and socket
    touch in the air, 4 if the peg touches the pin.
    """
    if ("red_peg", "pin") in contacts:
        return 4
    lifted = ("red_peg", "table") not in contacts and not any(
        (part, "table") in contacts for part in SOCKET
    )
    if lifted and any(("red_peg", part) in contacts for part in SOCKET):
        return 3
    held = ("red_peg", RIGHT_FINGER) in contacts and any(
        (part, LEFT_FINGER) in contacts for part in SOCKET
    )
    if held:
        return 2 if lifted else 1
    return 0


TASKS = {
    "sim_transfer_cube": Task(
        "sim_transfer_cube",
        "bimanual_viperx_transfer_cube.xml",
        ("box",),
        _sample_transfer,
        _reward_transfer,
    ),
    "sim_insertion": Task(
        "sim_insertion",
        "bimanual_viperx_insertion.xml",
        ("peg", "socket"),
        _sample_insertion,
        _reward_insertion,
    ),
}
