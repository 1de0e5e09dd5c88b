"""``python -m runtime.trace``: merge trace files."""

from policies.standard_streams import run_command
from runtime.trace.merge import main

if __name__ == "__main__":
    raise SystemExit(run_command(main))
