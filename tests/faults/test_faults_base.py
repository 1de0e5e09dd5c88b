"""A mobile base comes to a stand when a process ends or dies while it drives.

``METRONOME_KILLS`` says how often each death is tried (``METRONOME_SOAK=1``: 20 times).
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults import base_robot
from tests.faults.rig import PATIENCE_S, Program

SOAK = bool(os.environ.get("METRONOME_SOAK"))
KILLS = int(os.environ.get("METRONOME_KILLS", "20" if SOAK else "1"))
QUANTUM = base_robot.ACCELERATION * 0.02
"""Largest change of velocity from one command to the next, m/s."""

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(3600 if SOAK else 300)]


class Device:
    """The base's own computer, a child process of the test alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = Program("-m", "tests.faults.base_robot", str(folder), keys=True)
        self.program.expect("ready")

    def rows(self) -> np.ndarray:
        return base_robot.read_record(self.folder)

    def until(self, condition, patience_s: float = PATIENCE_S) -> np.ndarray:
        """Its record, once ``condition`` is true of it."""
        deadline_s = time.monotonic() + patience_s
        while True:
            rows = self.rows()
            if len(rows) and condition(rows):
                return rows
            assert time.monotonic() < deadline_s, rows[-5:]
            time.sleep(0.005)

    def driving(self) -> np.ndarray:
        """Wait until the base has driven at full speed for a moment."""
        return self.until(lambda rows: (np.abs(rows[-10:, 2] - 0.3) < 1e-6).all())

    def standing(self) -> np.ndarray:
        return self.until(lambda rows: rows[-1, 2] == 0)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    with made.program:
        yield made


def evaluation(device: Device, out: Path, *flags: str, stops_alone: str = "true") -> Program:
    robot = device.folder / "robot.yaml"
    robot.write_text(
        "type: python:tests.faults.base_robot\nname: base\n"
        f"args: {{folder: {device.folder}, stops_alone: {stops_alone}}}\n"
    )
    return Program(
        "eval_real.py", "-m", "python:tests.faults.base_robot:make_policy", "-c", str(robot),
        "--task", "fake", "--yes", "-o", str(out), *flags,
    )  # fmt: skip


def family(pid: int) -> list[int]:
    """``pid`` and everything that descends from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def check_braking(rows: np.ndarray) -> None:
    """From command to command the velocity changed within its limit."""
    commanded = rows[rows[:, 3] == 1, 2]
    assert np.abs(np.diff(commanded)).max() <= QUANTUM + 1e-6


def test_the_base_stands_after_a_rollout_that_ends_normally(device: Device, tmp_path: Path) -> None:
    with evaluation(device, tmp_path / "out", "--max_timesteps", "60") as program:
        assert program.wait() == 0, program.said
    rows = device.rows()
    assert rows[:, 2].max() == pytest.approx(0.3, abs=1e-6)
    assert rows[-1, 2] == 0
    assert rows[:, 3].all()  # it was told to stop, it need not have done so alone
    check_braking(rows)


def test_the_base_stands_when_the_server_dies(device: Device, tmp_path: Path) -> None:
    with evaluation(device, tmp_path / "out", "--max_timesteps", "100000") as program:
        device.driving()
        os.kill(program.child("runtime.server"), signal.SIGKILL)
        assert program.wait() == 1, program.said
    rows = device.rows()
    assert rows[-1, 2] == 0
    assert rows[:, 3].all()
    check_braking(rows)


@pytest.mark.long
@pytest.mark.parametrize("name", ["control", "sensing", *(["watchdog"] if SOAK else [])])
def test_the_base_stands_when_a_process_dies(device: Device, tmp_path: Path, name: str) -> None:
    with evaluation(device, tmp_path / "out", "--max_timesteps", "100000") as program:
        device.driving()
        os.kill(program.child(f"runtime.eval_real.{name}_process"), signal.SIGKILL)
        assert program.wait() == 1, program.said
    rows = device.rows()
    assert rows[-1, 2] == 0
    assert rows[:, 3].all()
    check_braking(rows)


def test_the_base_stands_when_all_processes_are_killed(tmp_path: Path) -> None:
    """Nothing is left to command zero, so the device stops by itself, as its contract says."""
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        device = Device(folder)
        with device.program, evaluation(device, folder / "out", "--max_timesteps", "9999") as ours:
            device.driving()
            for pid in family(ours.pid):
                os.kill(pid, signal.SIGKILL)
            ours.process.wait()
            rows = device.standing()
        alone = rows[rows[:, 3] == 0]
        assert len(alone) == 1
        assert rows[-1, 3] == 0
        last = rows[-2]
        assert last[2] == pytest.approx(0.3, abs=1e-6)
        print(f"stood {alone[0, 0] - last[0]:.3f} s after the last command")  # noqa: T201


def test_a_base_that_may_not_stop_alone_is_refused(device: Device, tmp_path: Path) -> None:
    with evaluation(device, tmp_path / "out", stops_alone="false") as program:
        assert program.wait() == 2
    assert re.search(r"error: base is commanded by velocity \(x\.vel\)", program.said[-1])
    assert not (device.folder / "record").read_bytes()
