"""One policy, reached in every way there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from policies.checkpoint.load import load_policy
from policies.types import Policy
from runtime.client import PolicyClient
from runtime.server.server_process import ServerProcess


@contextmanager
def ways(model: str) -> Iterator[dict[str, Policy]]:
    """The same policy three times: here, and in one other process over either transport."""
    with ExitStack() as stack:
        local = stack.enter_context(closing(load_policy(model)))
        server = stack.enter_context(ServerProcess(["-m", model]))
        served = {
            name: stack.enter_context(PolicyClient(server.address, transport=name))
            for name in ("shm", "zmq")
        }
        yield {"in process": local, **served}
