"""The processes beside the parent of a real evaluation: how they are started, and how they fail.

Each has the mailbox's descriptor and the mission on its command line. Each is in a session of its
own, so that Ctrl-C reaches the parent alone, which then ends things in order.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.errors import PolicyError
from policies.yaml_config import ConfigError
from robots.base import Robot, Role
from robots.errors import ConnectFailed, RobotError
from runtime.errors import RuntimeFault
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState
from runtime.trace import recorder as trace
from transport.child_process import REPORT_EVERY_S, ChildProcess, isolate, send_event
from transport.errors import ChildFailed, TransportError

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (ConfigError, RobotError, PolicyError, RuntimeFault, TransportError, ValueError)
"""What a user can act on: reported by message alone, without a traceback."""
FAILED = 1
CONNECT_GRACE_S = 10.0
"""What connecting may take beyond its own timeout."""
MODULES = {
    "control": "runtime.eval_real.control_process",
    "watchdog": "runtime.eval_real.watchdog_process",
    "sensing": "runtime.eval_real.sensing_process",
}
"""Short name to what ``python -m`` runs."""


class WorkerProcessFailed(RuntimeFault):
    """A process did not come up; says which and why."""


# In the child


class ParentPipe:
    """The parent's pipes, kept from a driver's code, which may be others', may print and may ask.

    Attributes:
        input_fd: Where the parent's lines arrive; at its end the parent is gone.
    """

    def __init__(self) -> None:
        self._isolation = isolate()
        self.input_fd = self._isolation.input_fd

    def fail(self, error: BaseException) -> None:
        """Tell the parent why this process ends."""
        expected = isinstance(error, EXPECTED_FAILURES)
        send_event("failed", error=str(error) if expected else self._isolation.explain(error))

    def connect(self, robot: Robot, role: Role, timeout_s: float) -> None:
        """``robot.connect``, which may not take much longer than it was told to.

        Code of others can hang, and cannot be interrupted: this process ends then.
        """
        what = f"{robot.name}: connecting as {role}"
        with self._isolation.deadline(timeout_s + CONNECT_GRACE_S, what):
            try:
                robot.connect(role, timeout_s)
            except EXPECTED_FAILURES:
                raise
            except Exception as error:  # of any kind: a vendor's
                raise ConnectFailed(f"{what}: {self._isolation.explain(error)}") from error


def child_main(
    short_name: str,
    work: Callable[[RunConfig, SharedState, ParentPipe], int],
    argv: Sequence[str] | None,
) -> int:
    """What the ``main`` of each does: open what it was given, work, report a failure."""
    cli = argparse.ArgumentParser(
        prog=f"python -m {MODULES[short_name]}", description="Started by eval_real.py"
    )
    cli.add_argument("--shared_state", type=int, required=True, help="inherited descriptor")
    cli.add_argument("--config", required=True, help="JSON")
    args = cli.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = ParentPipe()
    try:
        config = RunConfig.from_json(args.config)
        dims = config.dims(config.make_robot())
        # A watchdog sleeps; and whoever may have to wake for a dying arm writes no files.
        file = Path(config.trace) if config.trace and short_name != "watchdog" else None
        # Written after the work, the robot's end included. A successor's does not replace it.
        beside = trace.sibling(file, f"{short_name}-{os.getpid()}")
        with (
            trace.tracing(beside, short_name),
            SharedState(args.shared_state, dims) as shared_state,
        ):
            return work(config, shared_state, parent)
    except Exception as error:  # a driver's own errors are of any kind
        if not isinstance(error, (*EXPECTED_FAILURES, OSError, EOFError)):
            logger.info("%s ended", short_name, exc_info=error)
        parent.fail(error)
        return FAILED


# In the parent


class WorkerProcess(ChildProcess):
    """One process of an evaluation, running. Several are called ``the control process`` in turn.

    Args:
        short_name: ``control``, ``watchdog`` or ``sensing``.
        mission: For its command line.
        mailbox_fd: Inherited by it.
        pass_fds: Further descriptors that it inherits, and ``arguments`` that say which.
    """

    def __init__(
        self,
        short_name: str,
        config: RunConfig,
        shared_state_fd: int,
        *,
        pass_fds: Sequence[int] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        self.short_name = short_name
        super().__init__(
            MODULES[short_name],
            ["--shared_state", str(shared_state_fd), "--config", config.to_json(), *arguments],
            name=f"the {short_name} process",
            pass_fds=[shared_state_fd, *pass_fds],
            outlives=True,
        )

    def wait_ready(
        self,
        timeout_s: float,
        tell: Callable[[str], None] | None = None,
        tell_every_s: float = REPORT_EVERY_S,
    ) -> Mapping[str, Any]:
        """As ``ChildProcess.wait_ready``.

        Raises:
            WorkerProcessFailed: It failed, which it says in its own words, ended, or took longer.
        """
        try:
            return super().wait_ready(timeout_s, tell, tell_every_s)
        except ChildFailed as failed:
            raise WorkerProcessFailed(failed.error or str(failed)) from failed
