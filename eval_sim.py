"""Evaluate a policy in simulation: ``python eval_sim.py --help``."""

from policies.standard_streams import run_command
from runtime.eval_sim.cli import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
