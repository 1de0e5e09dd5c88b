"""``python -m runtime.eval_real``: evaluate a policy on a robot."""

from policies.standard_streams import run_command
from runtime.eval_real.cli import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
