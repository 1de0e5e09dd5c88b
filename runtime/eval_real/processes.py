"""The processes beside the parent: how they are started, what they say, how their end is seen.

A member is ``python -m runtime.<name>`` with the mailbox's descriptor and the mission on its
command line. It says one JSON object per line on its standard output and hears lines on its input.
It is in a session of its own, so that Ctrl-C reaches the parent alone, which then ends things in
order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from policies.errors import PolicyError
from policies.yaml_config import ConfigError
from robots.base import Robot, Role
from robots.errors import ConnectFailed, RobotError
from robots.processes import isolate, write_line
from runtime.errors import RuntimeFault
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState
from runtime.trace import recorder as trace
from transport.errors import TransportError

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (ConfigError, RobotError, PolicyError, RuntimeFault, TransportError, ValueError)
"""What a user can act on: reported by message alone, without a traceback."""
FAILED = 1
CONNECT_GRACE_S = 10.0
"""What connecting may take beyond its own timeout."""
SAY_EVERY_S = 5.0


class WorkerProcessFailed(RuntimeFault):
    """A process did not come up; says which and why."""


# In the child


def say(event: str, **fields: Any) -> None:
    """Tell the parent; whether it still listens is not this process' concern."""
    with contextlib.suppress(OSError):
        write_line(json.dumps({"event": event, **fields}))


class ParentPipe:
    """The parent's pipes, kept from a driver's code, which may be others', may print and may ask.

    Attributes:
        input_fd: Where the parent's lines arrive; at its end the parent is gone.
    """

    def __init__(self) -> None:
        self._isolation = isolate()
        self.input_fd = self._isolation.input_fd

    def fail(self, error: BaseException | str) -> None:
        """Tell the parent why this process ends."""
        if isinstance(error, (str, *EXPECTED_FAILURES)):
            text = str(error)
        else:
            text = self._isolation.explain(error)
        say("failed", error=text)

    def connect(self, robot: Robot, role: Role, timeout_s: float) -> None:
        """``robot.connect``, which may not take much longer than it was told to.

        Code of others can hang, and cannot be interrupted: this process ends then.
        """
        what = f"{robot.name}: connecting as {role}"
        with self._isolation.deadline(timeout_s + CONNECT_GRACE_S, what, self.fail):
            try:
                robot.connect(role, timeout_s)
            except EXPECTED_FAILURES:
                raise
            except Exception as error:  # of any kind: a vendor's
                raise ConnectFailed(f"{what}: {self._isolation.explain(error)}") from error


def child_main(
    module: str,
    work: Callable[[RunConfig, SharedState, ParentPipe], int],
    argv: Sequence[str] | None,
) -> int:
    """What every member's ``main`` does: open what it was given, work, report a failure."""
    cli = argparse.ArgumentParser(prog=f"python -m {module}", description="Started by eval_real.py")
    cli.add_argument("--shared_state", type=int, required=True, help="inherited descriptor")
    cli.add_argument("--config", required=True, help="JSON")
    args = cli.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = ParentPipe()
    try:
        config = RunConfig.from_json(args.config)
        dims = config.dims(config.make_robot())
        worker = module.rpartition(".")[2]
        # A watchdog sleeps; and whoever may have to wake for a dying arm writes no files.
        file = Path(config.trace) if config.trace and worker != "watchdog" else None
        # Written after the work, the robot's end included. A successor's does not replace it.
        beside = trace.sibling(file, f"{worker}-{os.getpid()}")
        with trace.tracing(beside, worker), SharedState(args.shared_state, dims) as shared_state:
            return work(config, shared_state, parent)
    except Exception as error:  # a driver's own errors are of any kind
        if not isinstance(error, (*EXPECTED_FAILURES, OSError, EOFError)):
            logger.info("%s ended", module, exc_info=error)
        parent.fail(error)
        return FAILED


# In the parent


class WorkerProcess:
    """One process, running.

    Args:
        name: ``control``, ``watchdog`` or ``sensing``.
        mission: For its command line.
        mailbox_fd: Inherited by it.
        pass_fds: Further descriptors that it inherits, and ``arguments`` that say which.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        shared_state_fd: int,
        *,
        pass_fds: Sequence[int] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", f"runtime.{name}", "--shared_state", str(shared_state_fd)),
                *("--config", config.to_json(), *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[shared_state_fd, *pass_fds],
            start_new_session=True,
        )
        # Opened while the child cannot have been reaped, so it means this very process.
        self.pidfd = os.pidfd_open(self.process.pid)
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name=f"{name} says", daemon=True)
        self._listener.start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def status(self) -> str:
        """How it ended, in words."""
        code = self.process.poll()
        if code is None:
            return "alive"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def wait_ready(self, timeout_s: float, tell: Callable[[str], None]) -> dict[str, Any]:
        """What it says when it is ready.

        Args:
            tell: Called with a line every few seconds that it takes.

        Raises:
            WorkerProcessFailed: It failed, ended, or took longer.
        """
        said = None
        began_s = time.monotonic()
        while said is None:
            waited_s = time.monotonic() - began_s
            if waited_s >= timeout_s:
                raise WorkerProcessFailed(
                    f"the {self.name} process was not ready within {timeout_s:g} s"
                )
            try:
                said = self._said.get(timeout=min(SAY_EVERY_S, timeout_s - waited_s))
            except queue.Empty:
                waited_s = time.monotonic() - began_s
                tell(f"waiting for the {self.name} process to be ready, {waited_s:.0f} s so far")
        if said["event"] == "ready":
            return said
        if said["event"] == "failed":
            raise WorkerProcessFailed(said["error"])
        self.process.wait()
        raise WorkerProcessFailed(
            f"the {self.name} process ended before it was ready ({self.status})"
        )

    def heard(self) -> Iterator[dict[str, Any]]:
        """What it has said since, without waiting."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._said.get_nowait()

    def tell(self, line: str) -> None:
        """Say a line to it; a dead one does not hear."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.write(f"{line}\n".encode())
                self.process.stdin.flush()

    def close(self, grace_s: float) -> None:
        """Wait so long for it to end, then kill it. Idempotent."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            logger.error("the %s process did not end within %g s: killed", self.name, grace_s)
            self.process.kill()
            self.process.wait()
        self._listener.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            try:
                said = json.loads(line)
            except ValueError:
                logger.info("%s: %s", self.name, line.decode(errors="replace").rstrip())
                continue
            self._said.put(said)
        self._said.put({"event": "ended"})
