"""``python -m tests.gateway.stub_gateway``: the gateway command with a protocol of one line.

Each connection gets the gateway's process id, and is closed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from policies.types import PolicyContract
from runtime.gateway import cli
from runtime.gateway.config import GatewayCommand
from runtime.gateway.observation_map import ObservationMap
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys


class StubGateway:
    def __init__(
        self,
        command: GatewayCommand,
        keys: ObservationKeys,
        api_keys: ApiKeys | None,
        contract: PolicyContract,
    ) -> None:
        ObservationMap(contract, keys, image_keys=lambda name: (name,), state_keys=("state",))
        self._listener = socket.create_server((command.host, command.port))
        self.port = self._listener.getsockname()[1]

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.sendall(f"{os.getpid()}\n".encode())

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


if __name__ == "__main__":
    cli.GATEWAYS["openpi"] = ("tests.gateway.stub_gateway", "StubGateway")
    cli.GATEWAYS["groot"] = ("a_package_that_nobody_installed", "StubGateway")
    sys.exit(cli.main())
