"""Failures of third-party code in the worker processes are reported in one clear line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

SILENCE_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


def evaluate(
    tmp_path: Path, habit: str, *flags: str, policy: str = "tests.faults.sine_policy:make_short"
) -> tuple[int, str]:
    """Exit status and standard error of a rollout with a vendor's driver of this ``habit``."""
    robot = tmp_path / "robot.yaml"
    robot.write_text(
        f"""
type: python:tests.runtime.vendor_robot
name: vendor
args:
  habit: {habit}
  obs_config:
    qpos: {{shape: [14], dtype: float32}}
    image: {{top: {{shape: [48, 64, 3], dtype: uint8}}}}
  action_config: {{shape: [14], dtype: float32}}
  position_limit: 3.2
  velocity_limit: 3.14
  acceleration_limit: 40
"""
    )
    done = subprocess.run(
        [
            *(sys.executable, "eval_real.py", "-m", f"python:{policy}"),
            *("-c", str(robot), "--task", "fake", "--yes", "-o", str(tmp_path / "out"), "--near"),
            *("9", "--max_timesteps", "100", *flags),
        ],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        (
            "asks",
            r"error: vendor: connecting as control: it asked 'Press ENTER to use the calibration",
        ),
        ("fails", r"error: vendor: connecting as control: LookupError: no motor 3 on this bus"),
        ("is not made", r"error: .*robot.yaml: type: .*: LookupError: no licence for this arm"),
    ],
)
def test_a_driver_that_fails_is_reported_in_one_line(
    tmp_path: Path, habit: str, message: str
) -> None:
    status, said = evaluate(tmp_path, habit)
    assert re.search(message, said.splitlines()[-1]), said
    assert "Traceback" not in said
    assert status == 2


@pytest.mark.long
def test_a_driver_that_never_connects_times_out(tmp_path: Path) -> None:
    status, said = evaluate(tmp_path, "hangs", "--connect_timeout_s", "0.5")
    last = said.splitlines()[-1]
    assert re.match(
        r"error: vendor: connecting as control took longer than \S+ s; it printed last: 'Turn the",
        last,
    ), said
    assert "waiting for the control process to be ready" in said
    assert status == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("habit", "last", "expected"),
    [
        ("asks when it is commanded", "the control process does not command", 2),
        ("its camera hangs", "the sensing process has been silent|the newest picture is", 1),
    ],
)
def test_a_driver_that_hangs_while_running_ends_the_evaluation(
    tmp_path: Path, habit: str, last: str, expected: int
) -> None:
    began_s = time.monotonic()
    status, said = evaluate(tmp_path, habit)
    assert re.search(last, said.splitlines()[-1]), said
    assert "Traceback" not in said
    assert status == expected
    assert time.monotonic() - began_s < SILENCE_S  # far below what any single wait may take


@pytest.mark.long
@pytest.mark.alone
def test_a_slow_reset_is_no_stall(tmp_path: Path) -> None:
    status, said = evaluate(tmp_path, "resets slowly", "-n", "5", "--max_timesteps", "5")
    assert status == 0, said
    assert "stalled" not in said


@pytest.mark.alone
def test_output_of_a_driver_does_no_harm(tmp_path: Path) -> None:
    status, said = evaluate(tmp_path, "prints")
    assert status == 0, said
    assert "Vendor SDK 1.2" in said


def test_a_policy_that_reads_input_in_a_private_server_is_reported_in_one_line(
    tmp_path: Path,
) -> None:
    status, said = evaluate(tmp_path, "", policy="tests.runtime.vendor_robot:ask")
    assert re.search(
        r"error: the policy server did not start .*Which adapter\?.*the factory failed: EOFError",
        said.splitlines()[-1],
    ), said
    assert "Traceback" not in said
    assert status == 2
