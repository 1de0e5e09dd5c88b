"""SIGINT and SIGTERM while a gateway starts: they end it with status 0, as they do later."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

STOPPED = 0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once() -> None:
    """End the process at the first signal, from now on.

    Not with an exception: raised in the import of a compiled module it becomes an ``ImportError``.
    A gateway that starts has nothing to close; the server notices that its session is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(STOPPED))


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """``end_at_once`` during a ``with`` block, which may set other handlers; then as before."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    end_at_once()
    try:
        yield
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
