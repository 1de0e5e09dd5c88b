"""Finds a Python that has ROS 2's client library ``rclpy``. Only child processes import it.

Looked for in this order: the key ``python``, ``METRONOME_ROS2_PYTHON``, ``.venv-ros2`` beside the
packages (made by ``make ros2``), and the Python of this process, for an environment in which ROS 2
was sourced. The wheels on the package index restart every Python of their environment, so they must
have one of their own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from robots.errors import ConnectFailed
from transport.child_process import PACKAGES

VARIABLE = "METRONOME_ROS2_PYTHON"
OWN_PYTHON = PACKAGES / ".venv-ros2" / "bin" / "python"
NEEDED = ("rclpy", "sensor_msgs.msg", "std_msgs.msg", "trajectory_msgs.msg")
CHECK_TIMEOUT_S = 60.0
HINT = f"expected one: run `make ros2`, or source ROS 2 Jazzy or newer, or set {VARIABLE}"
_CHECK = f"import sys; print(*sys.version_info[:2]); import {', '.join(NEEDED)}; print('found')"


def find_interpreter(configured: str) -> str:
    """A Python with ``rclpy``, of this process's minor version.

    Args:
        configured: The key ``python``; may be empty.

    Raises:
        ConnectFailed: There is none; says why and what to do.
    """
    chosen = configured or os.environ.get(VARIABLE, "")
    if not chosen:
        chosen = str(OWN_PYTHON) if OWN_PYTHON.exists() else sys.executable
    problem = _problem(chosen)
    if problem:
        raise ConnectFailed(f"ROS 2: got {chosen}, {problem}; {HINT}")
    return chosen


@functools.cache
def _problem(interpreter: str) -> str:
    """Why ``interpreter`` cannot be used; empty if it can."""
    if not Path(interpreter).exists():
        return "which does not exist"
    try:
        done = subprocess.run(
            [interpreter, "-c", _CHECK],
            capture_output=True,
            text=True,
            check=False,
            timeout=CHECK_TIMEOUT_S,
            env=_without_ours(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"which does not run ({error})"
    version, _, rest = done.stdout.partition("\n")
    expected = f"{sys.version_info[0]} {sys.version_info[1]}"
    if version != expected:
        got, needed = version.replace(" ", "."), expected.replace(" ", ".")
        return f"a Python {got or '?'}, not {needed} as here (ROS 2 Humble's is 3.10: too old)"
    if "found" not in rest:
        return f"which has no usable rclpy ({done.stderr.strip().rpartition(chr(10))[2]})"
    return ""


def _without_ours() -> Mapping[str, str]:
    """The environment without a marker of the wheels that an outer process may have set."""
    return {k: v for k, v in os.environ.items() if k != "_ROS_WHEELS_BOOTSTRAP_COMPLETE"}
