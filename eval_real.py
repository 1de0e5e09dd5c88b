"""Evaluate a policy on a robot: ``python eval_real.py --help``."""

from policies.standard_streams import run_command
from runtime.eval_real.cli import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
