"""Serves a gateway in a thread of the test's process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from runtime.gateway.renewing_gateway import Gateway


@contextlib.contextmanager
def served(gateway: Gateway) -> Iterator[None]:
    """Until the end of the block; then it is closed."""
    thread = threading.Thread(target=gateway.serve)
    thread.start()
    try:
        yield
    finally:
        gateway.stop()
        thread.join()
        gateway.close()
