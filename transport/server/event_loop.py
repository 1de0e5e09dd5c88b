"""One epoll for everything a server waits on, and a way to end the wait from outside."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

from transport.shm.eventfd import new_eventfd


class EventLoop:
    """Descriptors and what to do when one is readable. Single-threaded, but for ``wake``."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._wake = new_eventfd()
        self._woken = False
        self.watch(self._wake, self._on_wake)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching; before ``fd`` is closed. Idempotent."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def wake(self) -> None:
        """Make the current or next ``run`` return at once. For signal handlers and threads."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.eventfd_write(self._wake, 1)

    def run(self, timeout_s: float | None) -> bool:
        """Wait for something readable and handle all that is; whether ``wake`` was called."""
        for fd, _ in self._epoll.poll(-1 if timeout_s is None else max(0.0, timeout_s)):
            handler = self._handlers.get(fd)  # an earlier handler may have forgotten it
            if handler is not None:
                handler()
        woken, self._woken = self._woken, False
        return woken

    def close(self) -> None:
        """Idempotent."""
        if not self._epoll.closed:
            self._epoll.close()
            self._handlers.clear()
            os.close(self._wake)
            self._wake = -1

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._woken = True
