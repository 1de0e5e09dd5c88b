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
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from policies.command_line import CommandLine
from policies.errors import PolicyError
from policies.flag_builder import add_flags, from_flags
from policies.types import PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.errors import RuntimeFault
from runtime.gateway.config import GatewayCommand
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.renewing_gateway import Gateway, RenewingGateway
from runtime.gateway.start_signals import STOP_SIGNALS, STOPPED, ending_at_once
from runtime.options.api_keys import ApiKeys
from runtime.options.gateways import (
    DEFAULT_PORTS,
    PROTOCOLS,
    check_api_keys,
    listen,
    load_observation_keys,
)
from runtime.options.observation_keys import ObservationKeys
from transport.address import format_address, is_loopback, parse_address
from transport.child_process import die_with_parent, stop_with_stdin, write_event
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

FAILED, BAD_INPUT = 1, 2
ADMISSION_S, ADMISSION_EVERY_S = 1.0, 0.1
"""How long and how often a gateway that starts asks for a session that the server refuses."""
GATEWAYS = {
    "ilstudio": ("runtime.gateway.ilstudio.gateway", "IlstudioGateway"),
    "openpi": ("runtime.gateway.openpi.gateway", "OpenpiGateway"),
    "lerobot": ("runtime.gateway.lerobot.gateway", "LerobotGateway"),
    "groot": ("runtime.gateway.groot.gateway", "GrootGateway"),
}
"""Protocol: (module, class). Only the chosen module is imported."""
PLAYED_AT_ONCE = ("ilstudio", "openpi")
"""Protocols that cannot say for which tick an action is."""


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
    with ending_at_once():  # until there is a gateway to stop
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        command = read_command(argv)
        if command.ready_fd is not None:
            os.set_inheritable(command.ready_fd, False)
    except (OSError, ValueError) as error:
        return _fail(error)
    try:
        keys = load_observation_keys(command.config)
        api_keys = ApiKeys(Path(command.api_keys)) if command.api_keys else None
        command.connection.check()
        listen(command.host, command.port or 0).close()  # the gateway's own error says less
    except (InvalidConfig, OSError, ValueError, TransportError) as error:
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
    words = sys.argv[1:] if argv is None else argv
    if not words:
        raise ValueError(f"protocol: got none, expected one of {', '.join(PROTOCOLS)}")
    command = from_flags(GatewayCommand, parser().parse_args(words))
    try:
        parse_address(command.server)
    except TransportError as error:
        raise ValueError(f"--server: {error}") from error
    if not command.insecure and not is_loopback(command.host):
        raise ValueError(
            f"--host: got {command.host}, expected a loopback address: {command.protocol} has no "
            "encryption. Use a tunnel, or --insecure"
        )
    try:
        check_api_keys(command.protocol, command.api_keys)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if command.port is None:
        command = dataclasses.replace(command, port=DEFAULT_PORTS[command.protocol])
    return command


def _serve(command: GatewayCommand, keys: ObservationKeys, api_keys: ApiKeys | None) -> int:
    module, name = GATEWAYS[command.protocol]
    try:
        gateway_class: Any = getattr(import_module(module), name)
    except ImportError as missing:
        reason = ValueError(f"{missing} (pip install '.[gateway]')")
        return _fail(reason, ready_fd=command.ready_fd)

    def make(command: GatewayCommand, contract: PolicyContract) -> Gateway:
        _check_playable(command.protocol, contract)
        made: Gateway = gateway_class(command, keys, api_keys, contract)
        return made

    try:
        probe = try_session(command)
        gateway = RenewingGateway(command, probe.contract, probe.episode_state, make)
    except (InvalidConfig, Refused, KeyFileError, OSError, ValueError) as error:
        return _fail(error, ready_fd=command.ready_fd)
    except (PolicyError, RuntimeFault, TransportError) as error:
        return _fail(error, FAILED, command.ready_fd)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: gateway.stop())
    address = format_address(command.host, gateway.port)
    logger.info("%s clients are served on %s by %s", command.protocol, address, command.server)
    if command.ready_fd is not None:
        write_event(command.ready_fd, "ready", address=address)
    try:
        gateway.serve()
    finally:
        gateway.close()
    return STOPPED


def try_session(command: GatewayCommand) -> GatewaySession:
    """Return a session that was opened as a client's would be, and is closed.

    It shows whether the server admits one, and its cost is not the first client's: modules are
    loaded and compiled, shared memory was used. A server that has no place just now is no reason
    not to start. An admission is asked for again for ``ADMISSION_S``, since other gateways that
    start may have such a session, too.

    Raises:
        InvalidConfig: Clients of the protocol cannot play the server's policy.
        Refused: The server does not admit such a session.
        PolicyError, TransportError, KeyFileError: As ``GatewaySession``.
    """
    session = GatewaySession(command, f"{command.protocol} gateway")
    deadline_s = time.monotonic() + ADMISSION_S
    try:
        _check_playable(command.protocol, session.contract)
        while True:
            try:
                session.open()
                return session
            except Refused as error:
                if error.field == "sessions":
                    logger.warning("clients are refused until there is room: %s", error)
                    return session
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(ADMISSION_EVERY_S)
    finally:
        session.close()


def _check_playable(protocol: str, contract: PolicyContract) -> None:
    if contract.first_action_offset and protocol in PLAYED_AT_ONCE:
        raise InvalidConfig(
            f"policy: got a first action {contract.first_action_offset} ticks after its "
            f"observation, expected 0: clients of {protocol} execute it at once"
        )
    if contract.n_obs_steps > 1:
        raise InvalidConfig(
            f"policy: got n_obs_steps {contract.n_obs_steps}, expected 1: clients of "
            f"{protocol} send one tick at a time, and not every tick"
        )


def _fail(error: Exception, status: int = BAD_INPUT, ready_fd: int | None = None) -> int:
    """Tell the program that started the gateway, if any, else print the reason."""
    if ready_fd is not None:
        write_event(ready_fd, "failed", error=" ".join(str(error).split()))
    else:
        print(f"error: {error}", file=sys.stderr)
    return status
