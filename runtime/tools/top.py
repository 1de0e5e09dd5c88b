"""``metronome top HOST:PORT``: show a server's sessions in the terminal, updated live."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from policies.command_line import CommandLine
from policies.flag_builder import Flag, add_flags, from_flags
from policies.number_ranges import Range
from policies.standard_streams import run_command
from runtime.tools.ctl import BAD_INPUT, ServerAccess
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError

COLUMNS: dict[str, Literal["left", "right"]] = {
    "id": "right",
    "client": "left",
    "kind": "left",
    "from": "left",
    "req/s": "right",
    "p50 ms": "right",
    "p99 ms": "right",
    "answered": "right",
    "superseded": "right",
    "late": "right",
    "failed": "right",
    "batches": "left",
    "idle s": "right",
}
INTERVAL_S = Range(0.01, 3600)
ADDRESS_CHARS, NAME_CHARS = len("127.0.0.1:65535"), 60
"""Least width of a client's name, and its longest."""
FILE_COLUMNS = 120
"""Width of the output if it is a pipe or a file."""


@dataclass(frozen=True, slots=True)
class TopCommand:
    """The server to show, and how often the display is updated."""

    server: ServerAccess
    interval_s: Annotated[float, INTERVAL_S, Flag("seconds between two updates")] = 1.0
    once: Annotated[bool, Flag("print once and exit")] = False


def render(status: dict[str, Any]) -> Group:
    """Return the display of ``status``, which is ``PolicyServer.status``."""
    policy, counts = status["policy"], status["counts"]
    costs = ", ".join(
        f"{size}: {figures['usual']:.1f}" for size, figures in status["costs_ms"].items()
    )
    head = Text(
        f"{status['address']}  up {status['up_s']:.0f} s\n"
        f"policy {policy['id']}: {policy['checkpoint']} on {policy['device']}, {policy['engine']}, "
        f"{policy['precision']}\n"
        f"inference, ms by batch size: {costs or '-'}\n"
        + "  ".join(f"{name} {count}" for name, count in counts.items())
    )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name, justify in COLUMNS.items():
        if name == "client":  # wrapped, not cut: the end of an address tells two clients apart
            table.add_column(name, overflow="fold", min_width=ADDRESS_CHARS)
        else:
            table.add_column(name, justify=justify)
    for session in status["sessions"]:
        table.add_row(*map(Text, _row(session)))  # a client's name is not markup
    return Group(head, table)


def _row(session: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a session, in the order of ``COLUMNS``."""
    latency = session["latency_ms"]
    batches = ", ".join(f"{size}x{count}" for size, count in session["batches"].items())
    return (
        str(session["id"]),
        _shortened(session["client"]),
        session["kind"],
        f"{session['peer']} {session['transport']}",
        f"{session['rate_hz']:.1f}",
        f"{latency['p50']:.1f}",
        f"{latency['p99']:.1f}",
        *(str(session[name]) for name in ("answered", "superseded", "late", "failed")),
        batches,
        f"{session['idle_s']:.0f}",
    )


def _shortened(name: str) -> str:
    """Return a client's name, without its middle if it is long: it may end with an address."""
    if len(name) <= NAME_CHARS:
        return name
    return f"{name[: NAME_CHARS // 4]}…{name[1 - NAME_CHARS * 3 // 4 :]}"


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``TopCommand``."""
    cli = CommandLine(
        prog="metronome top", description="Show a server's sessions in the terminal, updated live."
    )
    add_flags(cli, TopCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Show the sessions until Ctrl-C; return the exit status: 0, or 2 without a server."""
    command = from_flags(TopCommand, parser().parse_args(argv))
    console = Console()
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    try:
        with command.server.dial() as dialer:
            if command.once:
                console.print(render(dialer.send_admin_command("status")))
                return 0
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(render(dialer.send_admin_command("status")), refresh=True)
                    time.sleep(command.interval_s)
    except KeyboardInterrupt:
        return 0
    except (TransportError, KeyFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    raise SystemExit(run_command(main))
