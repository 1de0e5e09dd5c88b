"""``metronome gateway``, also ``python -m runtime.gateway``: serve clients of other systems.

Exit status: 0 stopped by a signal, 1 the gateway failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from policies.command_line import CommandLine
from policies.errors import PolicyError
from policies.flag_builder import add_flags, from_flags
from policies.yaml_config import InvalidConfig, load_config
from runtime.errors import RuntimeFault
from runtime.gateway.api_keys import ApiKeys
from runtime.gateway.config import GatewayCommand, ObservationKeys
from runtime.gateway.gateway_session import GatewaySession
from transport.address import format_address, is_loopback, parse_address
from transport.child_process import die_with_parent, stop_with_stdin, write_event
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

FAILED, BAD_INPUT = 1, 2
GATEWAYS = {
    "ilstudio": ("runtime.gateway.ilstudio.gateway", "IlstudioGateway", 5001),
    "openpi": ("runtime.gateway.openpi.gateway", "OpenpiGateway", 8000),
    "lerobot": ("runtime.gateway.lerobot.gateway", "LerobotGateway", 8080),
    "groot": ("runtime.gateway.groot.gateway", "GrootGateway", 5555),
}
"""Protocol: (module, class, default port). Only the chosen module is imported."""
WITH_API_KEYS = ("openpi", "groot")
"""The protocols that have a place for a key."""


PLAYED_AT_ONCE = ("ilstudio", "openpi")
"""Protocols that cannot say for which tick an action is."""


class Gateway(Protocol):
    """A listener for the clients of one foreign protocol.

    The constructor takes ``(command, keys, api_keys, contract)`` and listens on the command's port.
    It raises ``InvalidConfig`` if ``keys`` does not fit the contract or the protocol
    cannot serve the policy, and ``OSError`` if the address is taken.

    Attributes:
        port: The TCP port that it listens on.
    """

    port: int

    def serve(self) -> None:
        """Serve clients until ``stop``."""
        ...

    def stop(self) -> None:
        """Make ``serve`` return soon. For a signal handler or another thread. Idempotent."""
        ...

    def close(self) -> None:
        """End all sessions and free the address. Call it after ``serve``. Idempotent."""
        ...


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``GatewayCommand``."""
    cli = CommandLine(
        prog="metronome gateway",
        description="Let clients of another system use a policy server.",
    )
    add_flags(cli, GatewayCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a gateway until SIGINT or SIGTERM. Returns the exit status."""
    try:
        command = read_command(argv)
        if command.ready_fd is not None:
            os.set_inheritable(command.ready_fd, False)
    except (OSError, ValueError) as error:
        return _fail(error)
    try:
        keys = _observation_keys(command)
        api_keys = ApiKeys(Path(command.api_keys)) if command.api_keys else None
    except (InvalidConfig, OSError, ValueError) as error:
        return _fail(error, ready_fd=command.ready_fd)
    keep_freed_memory()
    if command.stop_with_stdin:
        # The kernel ends a gateway that is stuck, too; it would keep the next one's port.
        die_with_parent(os.getppid())
        stop_with_stdin()
    logging.basicConfig(
        level=command.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    return _serve(command, keys, api_keys)


def read_command(argv: Sequence[str] | None) -> GatewayCommand:
    """Return the command line, with the protocol's own port where none is given.

    Raises:
        ValueError: A flag is invalid.
    """
    command = from_flags(GatewayCommand, parser().parse_args(argv))
    try:
        parse_address(command.server)
    except TransportError as error:
        raise ValueError(f"--server: {error}") from error
    if not command.insecure and not is_loopback(command.host):
        raise ValueError(
            f"--host: got {command.host}, expected a loopback address: {command.protocol} has no "
            "encryption. Use a tunnel, or --insecure"
        )
    if command.api_keys and command.protocol not in WITH_API_KEYS:
        raise ValueError(
            f"--api_keys: got {command.api_keys}, expected none: {command.protocol} has no place "
            f"for keys; {' and '.join(WITH_API_KEYS)} have"
        )
    if command.port is None:
        command = dataclasses.replace(command, port=GATEWAYS[command.protocol][2])
    return command


def _observation_keys(command: GatewayCommand) -> ObservationKeys:
    if not command.config:
        return ObservationKeys()
    return load_config(ObservationKeys, command.config, kind="gateway")


def _serve(command: GatewayCommand, keys: ObservationKeys, api_keys: ApiKeys | None) -> int:
    module, name, _ = GATEWAYS[command.protocol]
    try:
        make: Any = getattr(import_module(module), name)
    except ImportError as missing:
        reason = ValueError(f"{missing} (pip install '.[gateway]')")
        return _fail(reason, ready_fd=command.ready_fd)
    try:
        probe = GatewaySession(command, f"{command.protocol} gateway")
        contract = probe.contract
        probe.close()
        if contract.first_action_offset and command.protocol in PLAYED_AT_ONCE:
            raise InvalidConfig(
                f"policy: got a first action {contract.first_action_offset} ticks after its "
                f"observation, expected 0: clients of {command.protocol} execute it at once"
            )
        gateway: Gateway = make(command, keys, api_keys, contract)
    except (InvalidConfig, OSError, ValueError) as error:
        return _fail(error, ready_fd=command.ready_fd)
    except (PolicyError, RuntimeFault, TransportError, KeyFileError) as error:
        return _fail(error, FAILED, command.ready_fd)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: gateway.stop())
    address = format_address(command.host, gateway.port)
    logger.info("%s clients are served on %s by %s", command.protocol, address, command.server)
    if command.ready_fd is not None:
        write_event(command.ready_fd, "ready", address=address)
    try:
        gateway.serve()
    finally:
        gateway.close()
    return 0


def _fail(error: Exception, status: int = BAD_INPUT, ready_fd: int | None = None) -> int:
    """Tell the program that started the gateway, if any, else print the reason."""
    if ready_fd is not None:
        write_event(ready_fd, "failed", error=" ".join(str(error).split()))
    else:
        print(f"error: {error}", file=sys.stderr)
    return status
