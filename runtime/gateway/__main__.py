"""``python -m runtime.gateway``: see ``runtime.gateway.cli``."""

from policies.standard_streams import run_command
from runtime.gateway.start_signals import end_at_once


def main() -> int:
    """Run the command; its modules are imported only now, when a signal ends it properly."""
    from runtime.gateway.cli import main

    return main()


if __name__ == "__main__":
    end_at_once()
    raise SystemExit(run_command(main))
