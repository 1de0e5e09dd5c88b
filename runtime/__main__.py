"""The console command ``metronome``, also ``python -m runtime``, with its subcommands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from policies.standard_streams import run_command

COMMANDS = {
    "serve": ("runtime.server.cli", "serve a policy"),
    "eval-sim": ("runtime.eval_sim.cli", "evaluate a policy in simulation"),
    "eval-real": ("runtime.eval_real.cli", "evaluate a policy on a robot"),
    "gateway": ("runtime.gateway.cli", "let clients of another system use a server"),
    "top": ("runtime.tools.top", "show the sessions of a running server"),
    "ctl": (
        "runtime.tools.ctl",
        "show a running server's status, or load another checkpoint into it",
    ),
    "keys": ("runtime.tools.keys", "make and list the keys of encrypted sessions"),
    "train": ("runtime.tools.train", "train a policy on demonstrations"),
    "replay": (
        "runtime.eval_real.replay",
        "recompute the commands of a robot's recordings and compare them",
    ),
    "compare": ("runtime.tools.compare", "compare the results of evaluations"),
    "latency": ("runtime.tools.latency", "measure what latency does to a policy"),
    "trace": ("runtime.trace.merge", "merge the trace files of several processes"),
}
"""Subcommand: (module with ``main``, what it does). Only the chosen module is imported."""
BAD_INPUT = 2


def main() -> int:
    """Run the subcommand that ``sys.argv`` names. Returns the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in {"-h", "--help"}:
        sys.stdout.write(usage())
        return 0 if len(sys.argv) > 1 else BAD_INPUT
    if name not in COMMANDS:
        sys.stderr.write(f"error: command: got {name!r}, expected one of {', '.join(COMMANDS)}\n")
        return BAD_INPUT
    command: Callable[[], int] = import_module(COMMANDS[name][0]).main
    sys.argv = [f"metronome {name}", *sys.argv[2:]]
    return command()


def usage() -> str:
    """Return the help text, one line per subcommand."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return (
        "\n".join(
            [
                "usage: metronome COMMAND ...",
                "",
                *lines,
                "",
                "metronome COMMAND --help shows its flags.",
            ]
        )
        + "\n"
    )


def console() -> int:
    """Entry point of the installed command: ``main`` with standard streams that do not fail."""
    return run_command(main)


if __name__ == "__main__":
    raise SystemExit(console())
