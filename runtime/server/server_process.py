"""A private policy server in a child process, for a command that has only a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from runtime.errors import RuntimeFault
from transport.child_process import ChildProcess
from transport.errors import ChildFailed

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 15.0
"""How often a warning says that the server is still loading."""


class ServerProcess(ChildProcess):
    """``python -m runtime.server`` on a free loopback port; ``address`` is ``HOST:PORT``.

    ``ready["gateways"]`` has the protocol and the address of each gateway.

    Args:
        flags: Its command line; a host, a port or a log level in it replaces the default.
        ready_within_s: The limit for loading and warming up.

    Raises:
        RuntimeFault: It did not start; has what it printed.
    """

    def __init__(self, flags: Sequence[str], *, ready_within_s: float = 300.0) -> None:
        super().__init__(
            "runtime.server",
            [
                *("--host", "127.0.0.1", "--port", "0", "--log_level", "WARNING", *flags),
                "--stop_with_stdin",
            ],
            name="the policy server",
            events_flag="--ready_fd",
        )
        try:
            ready = self.wait_ready(ready_within_s, logger.warning, PROGRESS_EVERY_S)
        except BaseException as error:
            self.close(0.0)
            if isinstance(error, ChildFailed):
                raise RuntimeFault(str(error)) from error
            raise
        self.address: str = ready["address"]
