"""Nodes of other people on ROS 2, each a process of its own, which tests can spoil and kill."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.yaml_config import as_plain
from robots.errors import ConnectFailed
from robots.factory import make_robot
from robots.ros2_environment import find_interpreter
from robots.ros2_robot import Ros2Robot

SHARED_MEMORY = Path("/dev/shm")
ARM = Path(__file__).with_name("ros2_arm.yaml")
JOINT_STATES, PICTURES = "/joint_states", "/top/image_raw"
COMPRESSED = "/top/compressed"
LONG = os.environ.get("METRONOME_LONG", "") not in ("", "0")
TIMES = 20 if LONG else 1


def interpreter() -> str:
    """A Python with rclpy; without one the test is skipped, and says why."""
    try:
        return find_interpreter("")
    except ConnectFailed as error:
        pytest.skip(str(error))


def arm(overrides: Mapping[str, str] | None = None) -> Ros2Robot:
    robot = make_robot(str(ARM), overrides)
    assert isinstance(robot, Ros2Robot)
    return robot


def remove_left_memory() -> None:
    """Remove Fast DDS's shared memory of killed nodes, which may cost a later node its messages.

    Whoever uses a segment or a port holds a lock on the file beside it.
    """
    for lock in SHARED_MEMORY.glob("fastdds_*_[es]l"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.name[: -len("_el")])
            lock.unlink(missing_ok=True)
    for pattern in ("fastdds_port*[0-9]", "sem.fastdds_port*_mutex"):
        for path in SHARED_MEMORY.glob(pattern):
            port = path.name.removeprefix("sem.").removesuffix("_mutex")
            if not list(SHARED_MEMORY.glob(f"{port}_[es]l")):
                _remove(port)


def _remove(name: str) -> None:
    """Remove a segment or a port, and its semaphore."""
    (SHARED_MEMORY / name).unlink(missing_ok=True)
    (SHARED_MEMORY / f"sem.{name}_mutex").unlink(missing_ok=True)


def held_locks(pid: int) -> list[Path]:
    """The locks of Fast DDS's shared memory that belongs to a process."""
    opened = [file.readlink() for file in Path(f"/proc/{pid}/fd").iterdir()]
    return [path for path in opened if path.match(f"{SHARED_MEMORY}/fastdds_*_el")]


def free_domain() -> int:
    """A ROS domain that others hardly have; 101 is the last below Linux's own ports."""
    return random.SystemRandom().randrange(10, 101)


class Peer:
    """A node of ``ros2_peer.py``."""

    def __init__(self, domain: int, description: Mapping[str, Any]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "ROS_DOMAIN_ID": str(domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        }
        script = str(Path(__file__).with_name("ros2_peer.py"))
        remove_left_memory()
        self.process = subprocess.Popen(
            [interpreter(), script, json.dumps(description)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready\n")

    @property
    def pid(self) -> int:
        return self.process.pid

    def set_mode(self, topic: str, mode: str) -> None:
        self.process.stdin.write(f"{topic} {mode}\n")
        self.process.stdin.flush()
        self._expect("done\n")

    @contextlib.contextmanager
    def spoilt(self, topic: str, mode: str) -> Iterator[None]:
        self.set_mode(topic, mode)
        try:
            yield
        finally:
            self.set_mode(topic, "sound")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it in good order, and remove what killed nodes left, this one or others."""
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
        remove_left_memory()

    def _expect(self, line: str) -> None:
        got = self.process.stdout.readline()
        assert got == line, f"got {got!r}, expected {line!r}"


@contextlib.contextmanager
def peers(
    folder: Path, domain: int, robot: Ros2Robot, images: tuple[str, ...] = (PICTURES,)
) -> Iterator[tuple[Peer, Peer]]:
    """The arm's node and the camera's, for the topics of ``robot``."""
    with contextlib.ExitStack() as stack:
        joints = stack.enter_context(contextlib.closing(joint_peer(folder, domain, robot)))
        camera = stack.enter_context(contextlib.closing(camera_peer(domain, images)))
        yield joints, camera


def joint_peer(
    folder: Path,
    domain: int,
    robot: Ros2Robot,
    states: str = "",
    images: tuple[str, ...] = (),
) -> Peer:
    """The arm's node; with another topic for its states, it only listens to the same commands."""
    config = robot.config
    names = [name for state in config.states for name in state.joints]
    commands = [[c.topic, c.message, as_plain(c.joints)] for c in config.commands]
    start = np.zeros(len(names)) if robot.start_pose is None else robot.start_pose
    pose = dict(zip(robot.contract.action_names, start.tolist(), strict=True))
    return Peer(
        domain,
        {
            "joints": names,
            "start": [pose.get(name, 0.0) for name in names],
            "states": states or config.states[0].topic,
            "commands": commands,
            "record": str(folder / "commands"),
            "images": list(images),
            "pictures": str(folder / "pictures"),
        },
    )


def camera_peer(domain: int, images: tuple[str, ...] = (PICTURES,)) -> Peer:
    return Peer(domain, {"images": list(images)})


def read_commands(folder: Path, joints: int) -> np.ndarray:
    """Rows of (arrival in ns, a trajectory's duration in s, the target of every joint)."""
    row = np.dtype([("ns", "<i8"), ("within_s", "<f8"), ("values", "<f8", (joints,))])
    return np.fromfile(folder / "commands", row)


def read_pictures(folder: Path) -> dict[int, int]:
    """When the arm's node began to publish each picture, ns, by the number in its first pixel."""
    rows = np.fromfile(folder / "pictures", np.dtype([("number", "<i8"), ("ns", "<i8")]))
    return dict(zip(rows["number"].tolist(), rows["ns"].tolist(), strict=True))
