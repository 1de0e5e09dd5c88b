"""A policy server in a thread of the test's process, and clients of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from policies.types import Policy
from runtime.client import PolicyClient
from runtime.server import PolicyServer


@contextlib.contextmanager
def serving(policy: Policy, **options: Any) -> Iterator[PolicyServer]:
    """A server of ``policy``, served in a thread until the end of the block."""
    with PolicyServer(policy, **options) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop("the test is over")
            thread.join()


def connect(server: PolicyServer, transport: str = "auto", **options: Any) -> PolicyClient:
    """A client of ``server``, with the options of ``PolicyClient``."""
    return PolicyClient(f"{server.host}:{server.port}", transport=transport, **options)
