"""Nothing may be left behind, by any test of this folder."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_forks import ForkServer, orphans


def descriptors() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = os.readlink(entry)  # noqa: PTH115  a Path would resolve it
        except FileNotFoundError:
            continue  # the listing's own
    return found


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Forks children that run what these modules have."""
    fork_server = ForkServer("transport_sides", "transport_streams", "transport_policies")
    yield fork_server
    fork_server.close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails a test that leaves a segment, a descriptor or a thread."""
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    if descriptors().keys() - fds:
        gc.collect()  # what only a cycle, or a failed test's frame, holds on to is not a leak
    left = {fd: what for fd, what in descriptors().items() if fd not in fds}
    assert not left, f"descriptors left: {left}"
    assert not orphans()
    assert set(threading.enumerate()) <= threads
