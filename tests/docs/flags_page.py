"""``python -m tests.docs.flags_page`` writes ``docs/flags.md`` from the configurations' fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from policies.flag_builder import flags_of
from runtime.eval_real import replay
from runtime.eval_real.run_config import EvalRealConfig
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.gateway.config import GatewayCommand
from runtime.server.config import ServeCommand
from runtime.tools import compare, ctl, keys, latency, top, train
from runtime.trace import merge

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
HEAD = """# Flags

Every flag of every command, with its default in parentheses. The names, ranges, choices and
defaults are those of the commands themselves: `python -m tests.docs.flags_page` writes this page
from the fields of their configurations, and a test compares the two.
"""
COMMANDS: dict[str, type[Any]] = {
    "The policy server": ServeCommand,
    "Evaluation in simulation": EvalSimConfig,
    "Evaluation on a robot": EvalRealConfig,
    "`gateway`: clients of another system": GatewayCommand,
    "Training": train.TrainCommand,
    "`top`: a server's sessions": top.TopCommand,
    "`ctl`: which server is asked": ctl.ServerAccess,
    "`ctl load`": ctl.LoadCommand,
    "`keys new`": keys.NewCommand,
    "`keys allow`": keys.AllowCommand,
    "`keys show`": keys.ShowCommand,
    "`replay`": replay.ReplayCommand,
    "`compare`": compare.CompareCommand,
    "`latency`": latency.LatencyCommand,
    "`trace`": merge.MergeCommand,
}
BESIDE = {
    "Evaluation in simulation": "`--env.KEY VALUE` overrides `KEY` of the environment's "
    "configuration.",
    "Evaluation on a robot": "`--robot.KEY VALUE` overrides `KEY` of the robot's configuration.",
    "Training": "`--KEY VALUE` overrides `KEY` of the recipe.",
}


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for title, command in COMMANDS.items():
        parts.append(f"\n## {title}\n\n| Flag | Value | What |\n|---|---|---|\n")
        for flag in flags_of(command):
            if flag.flag.hidden:
                continue
            value = "" if flag.limit is None else getattr(flag.limit, "choices", flag.limit)
            shown = ", ".join(value) if isinstance(value, tuple) else str(value)
            names = ", ".join(f"`{name}`" for name in flag.names)
            parts.append(f"| {names} | {shown} | {flag.help} |\n")
        if title in BESIDE:
            parts.append(f"\n{BESIDE[title]}\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
