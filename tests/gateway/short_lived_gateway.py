"""``python -m tests.gateway.short_lived_gateway``: a gateway that is ready, and crashes at once."""

from __future__ import annotations

import sys

from transport.child_process import write_event

if __name__ == "__main__":
    write_event(int(sys.argv[sys.argv.index("--ready_fd") + 1]), "ready", address="127.0.0.1:9")
    sys.exit("a crash")
