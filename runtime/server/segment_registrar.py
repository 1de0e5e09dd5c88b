"""Registers the segments of sessions for direct reading by a device, in a thread of its own.

A policy on a GPU may have an attribute ``registered_memory``. Images in memory that is registered
there go to the GPU without a copy in between. Pinning the pages of a segment takes milliseconds, so
the serving thread only queues it. Until a segment is registered its images are copied.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


class MemoryRegistry(Protocol):
    """A policy's ``registered_memory``. It must outlive the policy, and is used in one thread."""

    def register(self, memory: NDArray[np.uint8]) -> bool:
        """Register a read-only mapping; whether that succeeded. Failures are not an error."""
        ...

    def release(self, memory: NDArray[np.uint8]) -> None:
        """Undo a successful ``register``."""
        ...


class SegmentRegistrar:
    """Keeps the segments of sessions registered. The thread is started by the first one.

    The methods are for the serving thread. For each session the calls take effect in their order.
    """

    def __init__(self) -> None:
        self._current: dict[int, _Registration] = {}
        self._queue: queue.SimpleQueue[_Registration | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def register(
        self,
        session_id: int,
        memory: NDArray[np.uint8] | None,
        registry: MemoryRegistry | None,
    ) -> None:
        """Keep a session's memory registered in ``registry`` from now on, and nowhere else.

        Call it at the session's start and after each replacement of its policy.

        Args:
            memory: What the client writes; None if there is no such mapping.
            registry: Of the session's policy; None if that needs none.
        """
        current = self._current.get(session_id)
        if current is not None and current.registry is registry:
            return
        self.release(session_id)
        if registry is not None and memory is not None:
            new = self._current[session_id] = _Registration(session_id, memory, registry)
            self._post(new)

    def release(self, session_id: int) -> None:
        """End a session's registration, and let go of its memory. Idempotent.

        No inference on the session's images may be in progress.
        """
        registration = self._current.pop(session_id, None)
        if registration is not None:
            registration.wanted = False
            self._post(registration)

    def close(self, timeout_s: float) -> None:
        """Release all segments; wait for that, at most ``timeout_s``: a driver may hang.

        Idempotent.
        """
        for session_id in list(self._current):
            self.release(session_id)
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(timeout_s)
            if timeout_s > 0 and thread.is_alive():
                logger.warning("releasing registered memory takes more than %g s", timeout_s)

    def _post(self, registration: _Registration) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="segments", daemon=True)
            self._thread.start()
        self._queue.put(registration)

    def _run(self) -> None:
        while (registration := self._queue.get()) is not None:
            registration.apply()


class _Registration:
    """The registration of one segment with one registry. Only ``apply`` runs in the other thread.

    Attributes:
        wanted: Whether the session still needs it.
    """

    __slots__ = ("_memory", "_registered", "_session_id", "registry", "wanted")

    def __init__(
        self, session_id: int, memory: NDArray[np.uint8], registry: MemoryRegistry
    ) -> None:
        self.registry, self.wanted = registry, True
        self._session_id = session_id
        self._memory: NDArray[np.uint8] | None = memory
        self._registered = False

    def apply(self) -> None:
        """Register or release, as is wanted now. Called once after each change of ``wanted``."""
        memory: Any = self._memory
        try:
            if self.wanted:
                self._registered = self.registry.register(memory)
                return
            self._memory = None
            if self._registered:
                self._registered = False
                self.registry.release(memory)
        except Exception:
            # Third-party code; without registration the images are copied. The text and not the
            # exception: a log record that is kept must not keep the memory.
            logger.error(
                "session %d: registering memory failed\n%s",
                self._session_id,
                traceback.format_exc(),
            )
