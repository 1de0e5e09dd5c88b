"""Eventfds, with which one process wakes another."""

from __future__ import annotations

import os


def new_eventfd() -> int:
    """Make a non-blocking eventfd that child processes do not inherit."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
