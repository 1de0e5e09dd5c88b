"""A cluster on this machine, and evaluations on it as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.evaluation.repeatable_fields import repeatable_fields

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
}
SLOW = "python:tests.fleet.slow_policy:make"
FAST = "python:tests.runtime.toy_policy:make"
"""The same policy without its delay, for the undisturbed result."""
SHORT = ("-e", "fake", "--env.max_timesteps", "25", "--videos", "0")
WORLD, SERVER = "ray::WorldActor", "ray::PolicyServerActor"
PATIENCE_S = 120.0
END_WITHIN_S = 1800.0
"""For the episodes that are left after the last kill."""


class Cluster:
    """The nodes of ``cluster_process``; the head has no CPUs and is never killed."""

    def __init__(
        self, nodes: int, cpus: float, *, prefix: Sequence[str] = (), head_ip: str = ""
    ) -> None:
        command = [*prefix, sys.executable, "-m", "tests.fleet.cluster_process"]
        self._process = subprocess.Popen(
            [*command, str(nodes), str(cpus), *filter(None, [head_ip])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
        )
        ready = self._read()
        self.address: str = ready["address"]
        self.raylets: list[int] = ready["raylets"]

    def _read(self) -> Any:
        """The next line that is JSON; Ray prints others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise AssertionError("the cluster did not start")

    def add_node(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.raylets.append(self._read())

    def kill_node(self) -> None:
        """``kill -9`` of a node; its actors end with it. Another takes its place."""
        victim = self.raylets.pop(random.randrange(len(self.raylets)))
        os.kill(victim, signal.SIGKILL)
        self.add_node()

    def actors(self, title: str) -> list[int]:
        """Process ids of the actors of a class on the nodes."""
        return [pid for pid, parent in _titled(title) if parent in self.raylets]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _titled(title: str) -> Iterator[tuple[int, int]]:
    """Process id and parent of every process whose title begins so."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if (folder / "cmdline").read_bytes().startswith(title.encode()):
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    yield int(folder.name), int(parent)


class Evaluation:
    """``eval_sim.py`` in a process of its own."""

    def __init__(self, folder: Path, *flags: str, model: str = SLOW) -> None:
        self._folder = folder
        command = [sys.executable, "eval_sim.py", "-m", model, *SHORT, "-o", str(folder), *flags]
        self._errors = (folder.parent / f"{folder.name}.err").open("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=self._errors
        )

    def journal_lines(self) -> int:
        """Lines of the journal: one for the run, and one for each finished episode."""
        journals = list(self._folder.glob("*/*.jsonl"))
        return len(journals[0].read_bytes().splitlines()) if journals else 0

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Wait until ``condition`` holds; None if the evaluation ends before."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            if found := condition():
                return found
            assert time.monotonic() < deadline_s, f"it did not happen: {self.errors()}"
            time.sleep(0.01)
        return None

    def errors(self) -> str:
        """What it printed to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def result(self, status: int = 0) -> dict[str, Any]:
        """Wait for the end, and return the result file; empty if there is none."""
        got = self.process.wait(END_WITHIN_S)
        text = self.errors()
        self._errors.close()
        assert got == status, text
        found = [path for path in self._folder.glob("*/*.json")]
        return dict(json.loads(found[0].read_text())) if found else {}


def same(result: dict[str, Any], undisturbed: dict[str, Any], *, served: bool = False) -> None:
    """Assert that nothing but measured time differs; a server adds stages of a request."""
    got, expected = repeatable_fields(result), repeatable_fields(undisturbed)
    if served:
        got["timing"].pop("stages"), expected["timing"].pop("stages")
    assert got == expected


def kill(pids: Sequence[int]) -> bool:
    """``kill -9`` of one of them, if there is one that still lives."""
    with contextlib.suppress(ProcessLookupError):
        if pids:
            os.kill(random.choice(pids), signal.SIGKILL)
            return True
    return False
