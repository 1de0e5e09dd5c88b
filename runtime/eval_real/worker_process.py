"""Start and failure of the worker processes of a real evaluation: control, sensing, watchdog.

The command line of each has the shared memory's descriptor and the run's configuration. Each is in
a session of its own, so that Ctrl-C reaches the parent alone, which then ends the others in order.
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
from policies.yaml_config import InvalidConfig
from robots.base import Robot, Role
from robots.errors import ConnectFailed, RobotError
from runtime.errors import RuntimeFault
from runtime.eval_real.run_config import RunConfig
from runtime.eval_real.shared_state import SharedState
from runtime.trace import recorder as trace
from transport.child_process import REPORT_EVERY_S, ChildProcess, isolate, send_event
from transport.errors import ChildFailed, TransportError

logger = logging.getLogger(__name__)

EXPECTED_FAILURES = (
    InvalidConfig,
    RobotError,
    PolicyError,
    RuntimeFault,
    TransportError,
    ValueError,
)
"""What a user can act on: reported by message alone, without a traceback."""
FAILED = 1
CONNECT_GRACE_S = 10.0
"""Time that connecting may take beyond its own timeout."""
MODULES = {
    "control": "runtime.eval_real.control_process",
    "watchdog": "runtime.eval_real.watchdog_process",
    "sensing": "runtime.eval_real.sensing_process",
}
"""Short name of a process to its module."""


class WorkerProcessFailed(RuntimeFault):
    """A process did not start; the message says which and why."""


# In the child


class ParentPipe:
    """The pipes to and from the parent, separated from the standard streams of third-party code.

    A driver may print or read its standard input; neither reaches the parent's pipes.

    Attributes:
        input_fd: Carries the parent's lines; end of file means that the parent has ended.
    """

    def __init__(self) -> None:
        self._isolation = isolate()
        self.input_fd = self._isolation.input_fd

    def fail(self, error: BaseException) -> None:
        """Send the parent the event ``failed`` with the reason."""
        expected = isinstance(error, EXPECTED_FAILURES)
        send_event("failed", error=str(error) if expected else self._isolation.explain(error))

    def connect(self, robot: Robot, role: Role, timeout_s: float) -> None:
        """Call ``robot.connect``; end this process if it takes much longer than ``timeout_s``.

        Third-party code may hang and cannot be interrupted from here.

        Raises:
            ConnectFailed: The driver raised an error that is none of ``EXPECTED_FAILURES``.
        """
        what = f"{robot.name}: connecting as {role}"
        with self._isolation.deadline(timeout_s + CONNECT_GRACE_S, what):
            try:
                robot.connect(role, timeout_s)
            except EXPECTED_FAILURES:
                raise
            except Exception as error:  # a vendor's driver may raise anything
                raise ConnectFailed(f"{what}: {self._isolation.explain(error)}") from error


def child_main(
    short_name: str,
    work: Callable[[RunConfig, SharedState, ParentPipe], int],
    argv: Sequence[str] | None,
) -> int:
    """The ``main`` of each worker process: open the shared memory, call ``work``, report a failure.

    Returns:
        The exit status.
    """
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
        # The watchdog writes no files: it may have to stop the arm at any time.
        file = Path(config.trace) if config.trace and short_name != "watchdog" else None
        # Written after ``work``. The process id keeps a successor from replacing the file.
        trace_file = trace.sibling(file, f"{short_name}-{os.getpid()}")
        with (
            trace.tracing(trace_file, short_name),
            SharedState(args.shared_state, dims) as shared_state,
        ):
            return work(config, shared_state, parent)
    except Exception as error:  # a driver may raise anything
        if not isinstance(error, (*EXPECTED_FAILURES, OSError, EOFError)):
            logger.info("%s ended", short_name, exc_info=error)
        parent.fail(error)
        return FAILED


# In the parent


class WorkerProcess(ChildProcess):
    """A running worker process of an evaluation.

    A process that died is replaced by a new one with the same short name.

    Args:
        short_name: ``control``, ``watchdog`` or ``sensing``.
        config: Passed on its command line.
        shared_state_fd: Descriptor of the shared memory; inherited.
        pass_fds: Further descriptors to inherit.
        arguments: Further command-line arguments, such as the numbers of ``pass_fds``.
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
            WorkerProcessFailed: It reported a failure, ended, or took longer.
        """
        try:
            return super().wait_ready(timeout_s, tell, tell_every_s)
        except ChildFailed as failed:
            raise WorkerProcessFailed(failed.error or str(failed)) from failed
