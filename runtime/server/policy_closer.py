"""Closes replaced policies in the background."""

from __future__ import annotations

import logging
import queue
import threading

from policies.types import Policy
from runtime.server.loaded_model import close_policy

logger = logging.getLogger(__name__)


class PolicyCloser:
    """Closes policies in a thread of its own, in the order in which they are given.

    Freeing a GPU's memory waits for the device, and a third-party ``close`` may take any time. The
    serving thread does neither. The thread starts with the first policy, so a server whose model is
    never replaced has none.
    """

    def __init__(self) -> None:
        self._policies: queue.SimpleQueue[Policy | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, policy: Policy) -> None:
        """Close ``policy`` soon; log whatever its ``close`` raises. Only for the serving thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="policy closer", daemon=True)
            self._thread.start()
        self._policies.put(policy)

    def close(self, timeout_s: float) -> None:
        """Wait until all policies are closed, at most ``timeout_s``. Idempotent."""
        if self._thread is None:
            return
        self._policies.put(None)
        self._thread.join(timeout_s)
        if timeout_s > 0 and self._thread.is_alive():
            logger.warning("a replaced policy is still being closed after %g s", timeout_s)
        self._thread = None

    def _run(self) -> None:
        while (policy := self._policies.get()) is not None:
            close_policy(policy)
            del policy  # the next ``get`` may wait for long
