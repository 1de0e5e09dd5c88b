"""An ILStudio gateway in a thread of the test's process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from policies.types import PolicyContract
from runtime.gateway.config import GatewayCommand
from runtime.gateway.ilstudio.gateway import IlstudioGateway
from runtime.options.observation_keys import ObservationKeys
from tests.gateway.served import served


@contextlib.contextmanager
def ilstudio_gateway(
    server: str,
    contract: PolicyContract,
    keys: ObservationKeys | None = None,
    **options: Any,
) -> Iterator[IlstudioGateway]:
    """A gateway to the server at ``server``, served until the end of the block."""
    command = GatewayCommand("ilstudio", server=server, port=0, **options)
    gateway = IlstudioGateway(command, keys or ObservationKeys(), None, contract)
    with served(gateway):
        yield gateway
