"""A twin, a policy server and ``eval_real.py``, each a program of its own, which a test can kill.

The tests check the twin's own record of the commands that arrived.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robots.base import Role
from robots.joint_limits import JointLimits
from robots.sim_twin import SimTwin
from runtime.eval_real.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
PERIOD_S = 0.02
ARM_ACCELERATION = 4.0
CONFIG = Path(__file__).with_name("twin.yaml")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Program:
    """A process and the lines it prints."""

    def __init__(self, *command: str, keys: bool = False, prefix: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *command],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE if keys else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._buffer = b""
        self.said: list[str] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def expect(self, pattern: str, patience_s: float = PATIENCE_S) -> re.Match[str]:
        """The next line that ``pattern`` is found in."""
        deadline_s = time.monotonic() + patience_s
        while True:
            line = self._line(deadline_s)
            assert line is not None, f"{pattern!r} was not said; said was: {self.said}"
            if match := re.search(pattern, line):
                return match

    def _line(self, deadline_s: float) -> str | None:
        """The next line; None at the end, or when the time is over."""
        stdout = self.process.stdout
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([stdout], [], [], left_s)[0]:
                return None
            more = os.read(stdout.fileno(), 65536)
            if not more:
                return None
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.said.append(line.decode())
        return self.said[-1]

    def press(self, key: str) -> None:
        self.process.stdin.write(key.encode())
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, after all of its output was read."""
        while self._line(time.monotonic() + PATIENCE_S) is not None:
            pass
        return self.process.wait(PATIENCE_S)

    def child(self, module: str) -> int:
        """Process id of the living child that runs ``module``."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if module.encode() in words:
                        return int(pid)
        raise AssertionError(f"no child runs {module}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Program):
    """A policy server on ``port``; on a free port if that is 0."""

    def __init__(
        self,
        factory: str = "make",
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        prefix: tuple[str, ...] = (),
        module: str = "tests.faults.sine_policy",
        flags: tuple[str, ...] = (),
    ) -> None:
        super().__init__(
            "-m", "runtime.server",
            "-m", f"python:{module}:{factory}",
            "--host", host, "--port", str(port), "--log_level", "ERROR", *flags,
            prefix=prefix,
        )  # fmt: skip
        try:
            self.address = self.expect(r"Policy Server started on (\S+)")[1]
        except BaseException:
            self.close()
            raise

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


class Twin:
    """The simulated robot, and a connection that only reads its record."""

    def __init__(self, robot: SimTwin, address: str) -> None:
        self.robot, self.address = robot, address

    @property
    def limits(self) -> JointLimits:
        return self.robot.limits

    def record(self) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "record.npz"
            self.robot.save_record(path)
            with np.load(path) as arrays:
                return dict(arrays)


@contextlib.contextmanager
def twin() -> Iterator[Twin]:
    from robots.factory import make_robot

    robot = make_robot(str(CONFIG))
    assert isinstance(robot, SimTwin)
    with robot.companion() as found, robot:
        robot.connect(Role.CONTROL)
        yield Twin(robot, found["address"])


def evaluation(twin: Twin, server: str, folder: Path, *flags: str, **options: Any) -> Program:
    """``eval_real.py`` on the twin."""
    return Program(
        "eval_real.py", "-m", server, "-c", str(CONFIG), "--robot.address", twin.address,
        "-o", str(folder), "--video_fps", "0", *flags,
        keys=True, **options,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Motion:
    """The commands that arrived at the arm, one per instant."""

    arrived_ns: np.ndarray
    action: np.ndarray

    @classmethod
    def of(cls, record: Mapping[str, np.ndarray], since_ns: int = 0) -> Motion:
        order = np.argsort(record["command_arrived_ns"], kind="stable")
        arrived = record["command_arrived_ns"][order]
        action = record["command_action"][order].astype(np.float64)
        # A reset moves the arm without a command; what was before it is another story.
        episode = record["command_episode"][order]
        counts = (arrived >= since_ns) & (episode == episode.max(initial=0))
        arrived, action = arrived[counts], action[counts]
        # Whoever takes over sends the last command again, in case it was not sent: to an arm that
        # holds the newest command, one that it has already changes nothing.
        source = record["command_source"][order][counts]
        again = np.zeros(len(arrived), bool)
        again[1:] = (source[1:] != source[:-1]) & (action[1:] == action[:-1]).all(axis=1)
        return cls(arrived[~again], action[~again])

    def check(self, limits: JointLimits) -> None:
        """Every command within position, velocity and acceleration limits."""
        rounding = 2e-6  # float32 of a few rad, three of them
        speed = np.diff(self.action, axis=0) / PERIOD_S
        force = np.diff(speed, axis=0) / PERIOD_S
        assert (self.action >= limits.position_lower - rounding).all()
        assert (self.action <= limits.position_upper + rounding).all()
        too_fast = np.abs(speed) - limits.velocity
        assert too_fast.max() <= rounding / PERIOD_S, f"{too_fast.max()} too fast"
        too_hard = np.abs(force) - limits.acceleration
        assert too_hard.max() <= 2 * rounding / PERIOD_S**2, f"{too_hard.max()} too hard"

    @property
    def longest_gap_s(self) -> float:
        """Between two commands."""
        return float(np.diff(self.arrived_ns).max(initial=0)) / 1e9

    def moving_at(self, stamp_ns: int) -> bool:
        """Whether the arm was being moved just then."""
        before = self.arrived_ns <= stamp_ns
        return bool(before.sum() > 2 and np.ptp(self.action[before][-3:], axis=0).max() > 1e-4)

    def rest_s(self, since_ns: int) -> float:
        """From ``since_ns`` to the first command after which nothing changed; ends at the last."""
        changed = np.flatnonzero(np.abs(np.diff(self.action, axis=0)).max(axis=1) > 0)
        last = self.arrived_ns[changed[-1] + 1] if len(changed) else since_ns
        return max(0.0, (last - since_ns) / 1e9)


def stop_s(limits: JointLimits) -> float:
    """The longest stop there can be, with a tick for noticing and one for starting."""
    return float((limits.velocity / limits.acceleration).max()) + 2 * PERIOD_S


def max_sensing_age_s() -> float:
    """Default of ``eval_real.py`` for the age of the newest picture, at which the arm stops."""
    return float(RunConfig.__dataclass_fields__["max_sensing_age_s"].default)  # type: ignore[arg-type]
