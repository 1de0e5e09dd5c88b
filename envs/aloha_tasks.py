"""The two ALOHA tasks: their scene, where objects start, and how far the job is done.

Rewards, sampling and names are those of gym-aloha, so that seeds and numbers can be compared.
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


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: As users write it.
        scene: The model's file among gym-aloha's assets.
        objects: Names of the free bodies, in the order of their qpos.
        sample: Seed to the objects' start poses, (7 * objects,): x, y, z (m), quaternion wxyz.
        reward: Contacts to 0 … ``MAX_REWARD``.
    """

    name: str
    scene: str
    objects: tuple[str, ...]
    sample: Callable[[int], NDArray[np.float64]]
    reward: Callable[[Contacts], int]


def find_task(name: str) -> Task:
    """The task called ``name``, with or without the suffix ``_scripted``.

    Raises:
        EnvError: No such task; lists the known ones.
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
    """Upright poses 5 cm above the ground; the legacy generator is what makes seeds agree."""
    generator = np.random.RandomState(seed)
    poses = []
    for (x_low, x_high), (y_low, y_high) in ranges:
        # The height is drawn too: it moves the generator on to the next object.
        position = generator.uniform((x_low, y_low, 0.05), (x_high, y_high, 0.05))
        poses.append(np.concatenate([position, (1.0, 0.0, 0.0, 0.0)]))
    return np.concatenate(poses)


def _reward_transfer(contacts: Contacts) -> int:
    """1 right finger touches the cube, 2 lifted, 3 left finger touches it, 4 held off the table."""
    lifted = ("red_box", "table") not in contacts
    if ("red_box", LEFT_FINGER) in contacts:
        return 4 if lifted else 3
    if ("red_box", RIGHT_FINGER) in contacts:
        return 2 if lifted else 1
    return 0


def _reward_insertion(contacts: Contacts) -> int:
    """1 both held, 2 both lifted, 3 peg and socket touch in the air, 4 the pin is reached."""
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
