"""``metronome ctl HOST:PORT status | load CKPT``: show or administer a running server.

Every client that may connect can read the status. ``load`` is allowed to the server's own user on
its machine, and to keys listed under ``operators/``.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from policies.command_line import CommandLine
from policies.flag_builder import Flag, add_flags, from_flags
from policies.number_ranges import DURATION_S
from policies.standard_streams import run_command
from runtime.options.connection import ClientKey, ServerKey
from runtime.server.admin_token import read_token
from transport.address import parse_address
from transport.dialer import Dialer
from transport.errors import TransportError
from transport.zeromq.curve import ClientKeys, KeyFileError

FAILED, BAD_INPUT = 1, 2
POLL_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """A server's address, and the keys for it."""

    address: Annotated[str, Flag("the server's address", positional=True, metavar="HOST:PORT")]
    server_key: ServerKey = ""
    client_key: ClientKey = ""

    def dial(self) -> Dialer:
        """Return a dialer for the server; raises as ``dial``."""
        return dial(self.address, self.server_key, self.client_key)


@dataclass(frozen=True, slots=True)
class LoadCommand:
    """The arguments of ``load``."""

    checkpoint: Annotated[str, Flag("checkpoint on the server's machine", positional=True)]
    timeout_s: Annotated[
        float, DURATION_S, Flag("seconds to wait until the checkpoint is served")
    ] = 600.0


def dial(address: str, server_key: str, client_key: str, timeout_s: float = 5.0) -> Dialer:
    """Return a dialer for the server at ``address``.

    Args:
        address: ``HOST:PORT``.
        server_key, client_key: Key files; both or neither.
        timeout_s: Longest wait for a reply.

    Raises:
        TransportError: ``address`` is not an address.
        KeyFileError: A key file cannot be used, or one of the two is missing.
    """
    if bool(server_key) != bool(client_key):
        raise KeyFileError("--server_key, --client_key: got one, expected both or neither")
    keys = ClientKeys.load(server_key, client_key) if server_key else None
    return Dialer(*parse_address(address), timeout_s=timeout_s, curve=keys)


def load(dialer: Dialer, checkpoint: str, timeout_s: float) -> dict[str, Any]:
    """Load a checkpoint into the server and wait; return the last ``LoadState``.

    Args:
        dialer: The server's.
        checkpoint: A path on the server's machine; one that exists here is made absolute.
        timeout_s: Longest wait until it is served.

    Raises:
        Refused: Not an operator, or another checkpoint is being loaded.
        TransportError: The server does not reply, or ``timeout_s`` has passed.
    """
    path = Path(checkpoint)
    name = str(path.resolve()) if path.exists() else checkpoint
    token = read_token(dialer.port) if _is_this_machine(dialer.host) else ""
    state = dialer.send_admin_command("load", {"checkpoint": name, "token": token})
    until_s = time.monotonic() + timeout_s
    while state["state"] not in ("serving", "failed"):
        if time.monotonic() >= until_s:
            raise TransportError(f"{name}: still {state['state']} after {timeout_s:g} s")
        time.sleep(POLL_INTERVAL_S)
        state = dialer.send_admin_command("load_state")
    return state


def _is_this_machine(host: str) -> bool:
    """Return whether ``host`` is this machine: the token must not be sent to another one."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as own:
                own.bind(address)  # fails for another machine's address
    except OSError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """Return the parser, with its subcommands."""
    cli = CommandLine(
        prog="metronome ctl",
        description="Show a running server's status, or load another checkpoint into it.",
    )
    add_flags(cli, ServerAccess)
    commands = cli.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="print policy, sessions and latencies as JSON")
    loading = commands.add_parser("load", help="serve another checkpoint, without interruption")
    add_flags(loading, LoadCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; return the exit status: 0, 1 not loaded, 2 bad input or no reply."""
    args = parser().parse_args(argv)
    try:
        with from_flags(ServerAccess, args).dial() as dialer:
            if args.command == "status":
                print(json.dumps(dialer.send_admin_command("status"), indent=2))
                return 0
            command = from_flags(LoadCommand, args)
            state = load(dialer, command.checkpoint, command.timeout_s)
    except (TransportError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if state["state"] == "failed":
        kept = "the server keeps the old policy"
        print(f"error: {state['checkpoint']}: {state['error']} ({kept})", file=sys.stderr)
        return FAILED
    print(f"policy {state['policy_id']}: {state['checkpoint']}, after {state['took_s']:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
