"""Steps of a measurement, each in a process of its own that cannot take the others with it.

A step is a function ``(say, arguments) -> record`` in a table ``STEPS`` of its module, which calls
``main``. ``say(record)`` keeps what has been measured so far. A CUDA error spoils a process for
good, a driver may hang, a measurement may run out of time: the step is then absent from there on,
with its own last words, and the next one starts afresh.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from bench.inference.gpu_results import write_json

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 5.0
"""A step is not started when less time than this is left."""
ENDED_WITHIN_S = 10.0
LONGEST_WORDS = 300
NEWS_EVERY_S = 0.2
SUSPECT = "making"
"""Key of a record: what a step was making when it last said something."""
_PR_SET_PDEATHSIG = 1

Record: TypeAlias = dict[str, Any]
Say: TypeAlias = Callable[[Mapping[str, Any]], None]
StepFunction: TypeAlias = Callable[[Say, Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """A step and its limit.

    Attributes:
        name: In the results.
        module, function: What runs: ``python -m module function``.
        within_s: The process is killed after this time.
    """

    name: str
    module: str
    function: str
    within_s: float
    arguments: tuple[str, ...] = ()


class StepFailed(Exception):
    """What a step raises to say in its own words why it has no result."""


def run_step(step: Step, put: Say, *, ends_s: float, python: str = sys.executable) -> Record:
    """Run a step and return its record.

    The record has ``ok`` and ``seconds``, what the step said, and ``absent``, the reason, where the
    step did not get to its end. ``put`` gets it at the end, and whenever the step said something.

    Args:
        ends_s: The step is killed at this time at the latest, monotonic.
    """
    began_s = time.monotonic()
    within_s = min(step.within_s, ends_s - began_s)
    if within_s < LEAST_S:
        record: Record = {"ok": False, "seconds": 0.0, "absent": "no time was left for it"}
        put(record)
        return record
    print(f"{step.name} (at most {within_s:.0f} s)", flush=True)
    with TemporaryDirectory(prefix="metronome-step-") as folder:
        said, printed = Path(folder) / "said.json", Path(folder) / "printed"
        command = [python, "-m", step.module, step.function, str(said), *step.arguments]
        with printed.open("wb") as errors:
            process = subprocess.Popen(command, cwd=ROOT, stderr=errors, start_new_session=True)
        seen: tuple[int, int] | None = None
        late = False
        try:
            while process.poll() is None and not late:
                time.sleep(NEWS_EVERY_S)
                late = time.monotonic() - began_s > within_s
                if (now := _version(said)) != seen:
                    seen = now
                    put({"ok": False, **_read(said), "absent": "cut before its end"})
        finally:
            _end(process)
        record = {"ok": False, "seconds": round(time.monotonic() - began_s, 1), **_read(said)}
        text = printed.read_text(encoding="utf-8", errors="replace")
    if process.returncode == 0 and not late:
        record["ok"] = record.get("ok_so_far", True)
    else:
        record["absent"] = _reason(step, process.returncode, text, within_s if late else None)
        print(f"  absent: {record['absent']}", flush=True)
    record.pop("ok_so_far", None)
    sys.stderr.write(text)
    put(record)
    return record


def main(steps: Mapping[str, StepFunction], argv: Sequence[str]) -> int:
    """Run the step ``argv[0]`` in this process; its record goes to the file ``argv[1]``."""
    die_with_parent()
    name, path, *arguments = argv

    def say(record: Mapping[str, Any]) -> None:
        write_json(Path(path), record)

    try:
        say(steps[name](say, arguments))
    except Exception as error:
        # A few words in the last line: that is what is kept.
        traceback.print_exc()
        words = str(error) if isinstance(error, StepFailed) else f"{type(error).__name__}: {error}"
        print(shorten(words), file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not through the interpreter's end, which may hang with a device that is lost.
        os._exit(1)
    return 0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def shorten(text: str) -> str:
    """``text`` in one line, at most ``LONGEST_WORDS`` characters of it."""
    return " ".join(text.split())[:LONGEST_WORDS]


def _reason(step: Step, status: int | None, text: str, late_s: float | None) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = shorten(lines[-1]) if lines else ""
    if late_s is not None:
        return f"killed after {late_s:.0f} s" + (f"; its last words: {words}" if words else "")
    if status == 1 and words:
        return words
    return f"its process ended with status {status}" + (f": {words}" if words else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it started, in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process can be stuck in a driver
        process.wait(ENDED_WITHIN_S)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return record
