"""``python -m runtime.gateway``: see ``runtime.gateway.cli``."""

from policies.standard_streams import run_command
from runtime.gateway.cli import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
