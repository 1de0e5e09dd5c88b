"""Ask or command a running server: ``metronome ctl HOST:PORT status | load CKPT``.

Everybody who may connect may ask for the status. Orders are for whoever runs the server, on its
machine, and for keys listed under ``operators/``.
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
from policies.flags import Flag, add_flags, from_flags
from policies.number_ranges import DURATION_S
from policies.standard_streams import run_command
from runtime.options.connection import ClientKey, ServerKey
from runtime.server.admin_token import read_token
from transport.address import parse_address
from transport.dialer import Dialer
from transport.errors import TransportError
from transport.zeromq.curve import ClientKeys, KeyFileError

FAILED, BAD_INPUT = 1, 2
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """Which server is asked, and with which keys."""

    address: Annotated[str, Flag(positional=True, metavar="HOST:PORT")]
    server_key: ServerKey = ""
    client_key: ClientKey = ""

    def dial(self) -> Dialer:
        """As ``dial``."""
        return dial(self.address, self.server_key, self.client_key)


@dataclass(frozen=True, slots=True)
class LoadCommand:
    """``load``."""

    checkpoint: Annotated[str, Flag("on the server's machine", positional=True)]
    timeout_s: Annotated[float, DURATION_S, Flag("how long to wait for it")] = 600.0


def dial(address: str, server_key: str, client_key: str, timeout_s: float = 5.0) -> Dialer:
    """To the server at ``address``.

    Raises:
        TransportError: Not an address.
        KeyFileError: A key file that cannot be used, or one without the other.
    """
    if bool(server_key) != bool(client_key):
        raise KeyFileError("--server_key, --client_key: got one, expected both or neither")
    keys = ClientKeys.load(server_key, client_key) if server_key else None
    return Dialer(*parse_address(address), timeout_s=timeout_s, curve=keys)


def load(dialer: Dialer, checkpoint: str, timeout_s: float) -> dict[str, Any]:
    """Order it and wait; the last ``LoadState``.

    Args:
        checkpoint: On the server's machine; from this process' folder where it is found there.

    Raises:
        Refused: Not an operator, or another one is being loaded.
        TransportError: The server does not answer, or it takes longer than ``timeout_s``.
    """
    path = Path(checkpoint)
    name = str(path.resolve()) if path.exists() else checkpoint
    token = read_token(dialer.port) if _is_here(dialer.host) else ""
    state = dialer.send_admin_command("load", {"checkpoint": name, "token": token})
    until_s = time.monotonic() + timeout_s
    while state["state"] not in ("serving", "failed"):
        if time.monotonic() >= until_s:
            raise TransportError(f"{name}: still {state['state']} after {timeout_s:g} s")
        time.sleep(LOOK_S)
        state = dialer.send_admin_command("load_state")
    return state


def _is_here(host: str) -> bool:
    """Whether that is this machine: a token is nobody else's business."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
        for family, kind, _, _, address in found:
            with socket.socket(family, kind) as own:
                own.bind(address)  # only one's own addresses can be
    except OSError:
        return False
    return True


def parser() -> argparse.ArgumentParser:
    cli = CommandLine(prog="python -m runtime.tools.ctl", description=__doc__)
    add_flags(cli, ServerAccess)
    commands = cli.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="what it serves, to whom and how fast, as JSON")
    loading = commands.add_parser("load", help="serve another checkpoint, without a pause")
    add_flags(loading, LoadCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = parser().parse_args(argv)
    try:
        with from_flags(ServerAccess, args).dial() as dialer:
            if args.command == "status":
                print(json.dumps(dialer.send_admin_command("status"), indent=2))
                return 0
            order = from_flags(LoadCommand, args)
            state = load(dialer, order.checkpoint, order.timeout_s)
    except (TransportError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if state["state"] == "failed":
        kept = "the old policy serves on"
        print(f"error: {state['checkpoint']}: {state['error']} ({kept})", file=sys.stderr)
        return FAILED
    print(f"policy {state['policy_id']}: {state['checkpoint']}, after {state['took_s']:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
