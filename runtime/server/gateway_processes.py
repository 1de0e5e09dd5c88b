"""A server's gateways: child processes that are started, watched, and started again.

Guaranteed:

* A gateway that does not start at first is reported, so that the server can end with the reason.
* One that ends later is started again on the same port: at once if it had been ready for
  ``HEALTHY_S``, else after a delay that doubles.
* No gateway outlives the server, also if that is killed.

Each gateway has a thread, which nearly always sleeps. The serving thread does nothing for gateways.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from runtime.server.config import ServerConfig
from runtime.server.gateway_options import GatewayOptions
from transport.address import parse_address
from transport.child_process import ChildProcess
from transport.errors import ChildFailed

logger = logging.getLogger(__name__)

MODULE = "runtime.gateway"
READY_WITHIN_S = 60.0
CLOSE_S = 5.0
"""Time for gateways to end by themselves when the server closes."""
HEALTHY_S = 1.0
FIRST_DELAY_S, MAX_DELAY_S = 0.25, 30.0
"""Delay before the restart of a gateway that ended before it was ready for ``HEALTHY_S``."""
LOOK_EVERY_S = 0.1
"""How soon a gateway that is starting is stopped."""


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway that was started.

    Attributes:
        protocol: Whose clients it serves.
        address: Where, ``HOST:PORT``.
    """

    protocol: str
    address: str


def shared_flags(config: ServerConfig, server: str, *, insecure: bool, log_level: str) -> list[str]:
    """Return the flags that all gateways of the server at address ``server`` get."""
    flags = [f"--server={server}", f"--host={config.gateway_host}", f"--log_level={log_level}"]
    if insecure:
        flags.append("--insecure")
    if config.curve_key:
        # A secret key file holds the public key, too, which is all that the gateway reads of it.
        flags += [f"--server_key={config.curve_key}", f"--client_key={config.gateway_key}"]
    return flags


def restart_delay_s(short_runs: int) -> float:
    """Return the delay before a restart, after so many short runs in a row, in seconds."""
    if short_runs == 0:
        return 0.0
    return min(FIRST_DELAY_S * 2.0 ** min(short_runs - 1, 30), MAX_DELAY_S)


class _Stopping(Exception):
    """The server closes."""


class GatewayProcesses:
    """Starts gateways to a server that already listens, and keeps them running.

    Args:
        gateways: Which.
        shared_flags: Further flags of every gateway: the server's address, its key.
        on_ready: Called once, with all gateways, when the last is ready. In another thread, or in
            this one if there are none.
        on_failure: Called in another thread when a gateway did not start; see ``failure``.

    Attributes:
        failure: Why the first gateway that did not start did not; empty if none failed.
    """

    def __init__(
        self,
        gateways: Sequence[GatewayOptions],
        shared_flags: Sequence[str],
        *,
        on_ready: Callable[[Sequence[RunningGateway]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.failure = ""
        self._shared_flags = list(shared_flags)
        self._on_ready, self._on_failure = on_ready, on_failure
        self._lock = threading.Lock()
        self._close_s = CLOSE_S
        self._running: list[RunningGateway | None] = [None] * len(gateways)
        self._stop_fd: int = os.eventfd(0)
        self._threads = [
            threading.Thread(
                target=self._run, args=(number, options), name=f"{options.protocol} gateway"
            )
            for number, options in enumerate(gateways)
        ]
        if not gateways:
            on_ready(())
        for thread in self._threads:
            thread.start()

    def close(self, within_s: float = CLOSE_S) -> None:
        """End all gateways; one that takes longer than ``within_s`` is killed. Idempotent."""
        if self._stop_fd < 0:
            return
        self._close_s = within_s
        os.eventfd_write(self._stop_fd, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._stop_fd)
        self._stop_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.close(CLOSE_S if error is None else 0.0)

    def _run(self, number: int, options: GatewayOptions) -> None:
        """Keep one gateway running until the server closes."""
        name = f"the {options.protocol} gateway"
        try:
            self._keep_running(name, number, options)
        except _Stopping:
            pass
        except Exception as error:  # e.g. the banner cannot be printed: the gateway is gone
            logger.exception("%s is not kept running", name)
            self._report_failure(f"{name}: {error!r}")

    def _keep_running(self, name: str, number: int, options: GatewayOptions) -> None:
        try:
            child = self._start(name, options)
        except (ChildFailed, OSError) as error:
            self._report_failure(str(error))
            return
        address = child.ready["address"]
        self._report_ready(number, RunningGateway(options.protocol, address))
        # A restart must not choose another port.
        options = dataclasses.replace(options, port=parse_address(address)[1])
        short_runs = 0
        while True:
            ran_s = self._wait_for_end(child)
            short_runs = 0 if ran_s >= HEALTHY_S else short_runs + 1
            child, short_runs = self._restart(name, options, short_runs)

    def _wait_for_end(self, child: ChildProcess) -> float:
        """Wait until a gateway that is ready ends; return how long that took, in seconds."""
        ready_s = time.monotonic()
        try:
            self._wait(None, child.pidfd)
            logger.error("%s ended (%s)", child.name, child.status)
            return time.monotonic() - ready_s
        finally:
            child.close(self._close_s)

    def _restart(
        self, name: str, options: GatewayOptions, short_runs: int
    ) -> tuple[ChildProcess, int]:
        """Start a gateway, after so many short runs, until it is ready; return it and the runs."""
        while True:
            delay_s = restart_delay_s(short_runs)
            logger.info("%s is started again in %g s", name, delay_s)
            self._wait(delay_s)
            try:
                return self._start(name, options), short_runs
            except (ChildFailed, OSError) as error:
                logger.error("%s", error)
                short_runs += 1

    def _start(self, name: str, options: GatewayOptions) -> ChildProcess:
        """Start a gateway and wait until it is ready.

        Raises:
            ChildFailed, OSError: It did not start; has the reason.
            _Stopping: The server closes.
        """
        child = ChildProcess(
            MODULE,
            [*options.arguments(), *self._shared_flags, "--stop_with_stdin"],
            name=name,
            events_flag="--ready_fd",
            shares_output=True,
            # In a session of its own: a terminal's Ctrl-C ends the server, which ends its gateways.
            outlives=True,
        )
        try:
            child.wait_ready(READY_WITHIN_S, lambda _: self._wait(0.0), LOOK_EVERY_S)
        except BaseException:
            child.close(0.0)
            raise
        return child

    def _wait(self, timeout_s: float | None, *fds: int) -> None:
        """Wait until one of ``fds`` is readable. Raises ``_Stopping`` if the server closes."""
        poller = select.poll()
        for fd in (self._stop_fd, *fds):
            poller.register(fd, select.POLLIN)
        readable = poller.poll(None if timeout_s is None else round(timeout_s * 1000))
        if self._stop_fd in dict(readable):
            raise _Stopping

    def _report_ready(self, number: int, gateway: RunningGateway) -> None:
        with self._lock:
            self._running[number] = gateway
            running = [one for one in self._running if one is not None]
        if len(running) == len(self._running):
            self._on_ready(running)

    def _report_failure(self, reason: str) -> None:
        with self._lock:
            self.failure = self.failure or reason
        self._on_failure(reason)
