"""One epoll for all descriptors that a server waits on; ``wake`` ends the wait from outside."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

from transport.shm.eventfd import new_eventfd


class EventLoop:
    """Descriptors, each with a handler that is called when it is readable.

    Single-threaded, except for ``wake``.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._wake = new_eventfd()
        self._woken = False
        self.register(self._wake, self._on_wake)

    def register(self, fd: int, handler: Callable[[], None]) -> None:
        """Call ``handler`` in ``run_once`` whenever ``fd`` is readable."""
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def unregister(self, fd: int) -> None:
        """Stop waiting on ``fd``; call this before closing it. Idempotent."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def wake(self) -> None:
        """Make the current or next ``run_once`` return. For signal handlers and other threads.

        Does nothing after ``close``.
        """
        with contextlib.suppress(OSError, ValueError):  # ``ValueError``: it is closed
            os.eventfd_write(self._wake, 1)

    def run_once(self, timeout_s: float | None) -> bool:
        """Wait for readable descriptors and call their handlers; whether ``wake`` was called.

        Args:
            timeout_s: Longest wait in seconds; None for no limit.
        """
        for fd, _ in self._epoll.poll(-1 if timeout_s is None else max(0.0, timeout_s)):
            handler = self._handlers.get(fd)  # an earlier handler may have unregistered it
            if handler is not None:
                handler()
        woken, self._woken = self._woken, False
        return woken

    def close(self) -> None:
        """Close the epoll and the eventfd. Idempotent."""
        if not self._epoll.closed:
            self._epoll.close()
            self._handlers.clear()
            wake, self._wake = self._wake, -1  # first, because ``wake`` may come from a thread
            os.close(wake)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._woken = True
