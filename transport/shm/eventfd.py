"""Eventfds: how one process wakes another."""

from __future__ import annotations

import os


def new_eventfd() -> int:
    """An eventfd that never blocks."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
