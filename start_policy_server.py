"""Serve a policy: ``python start_policy_server.py --help``."""

from policies.standard_streams import run_command
from runtime.server.cli import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
