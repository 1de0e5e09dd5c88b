"""``python -m tests.gateway.stub_server``: the server's command, whose gateways are stubs."""

from __future__ import annotations

import sys

from runtime.server import cli, gateway_processes

if __name__ == "__main__":
    gateway_processes.MODULE = "tests.gateway.stub_gateway"
    sys.exit(cli.main())
