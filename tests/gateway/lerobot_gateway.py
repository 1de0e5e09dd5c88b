"""The gateway of LeRobot's protocol, in a thread of the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from policies.types import PolicyContract
from runtime.gateway.config import GatewayCommand
from runtime.gateway.lerobot.gateway import LerobotGateway
from runtime.options.observation_keys import ObservationKeys
from runtime.server import PolicyServer
from tests.gateway.served import served
from tests.runtime.toy_policy import CONTRACT


@contextmanager
def gateway_of(
    server: PolicyServer,
    keys: ObservationKeys | None = None,
    contract: PolicyContract = CONTRACT,
    **options: Any,
) -> Iterator[LerobotGateway]:
    command = GatewayCommand("lerobot", f"{server.host}:{server.port}", port=0, **options)
    gateway = LerobotGateway(command, keys or ObservationKeys(), None, contract)
    with served(gateway):
        yield gateway
