"""For every test: nothing of ours is left behind, and no example is judged by its duration."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("metronome", deadline=None, print_blob=True)
settings.load_profile("metronome")

SHM = Path("/dev/shm")
# Two files that every worker of pytest-xdist can lock; what is in them does not matter.
QUEUE, MACHINE = Path(__file__), Path(__file__).parents[1] / "pyproject.toml"
OTHERS_S = 2.0
"""How long another worker's segment may be nobody's."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Under pytest-xdist, runs a test marked ``alone`` while no other worker runs a test.

    The lock is outside pytest-timeout's clock, so waiting for it costs a test no time of its own.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with QUEUE.open() as queue, MACHINE.open() as machine:
        fcntl.flock(queue, fcntl.LOCK_EX)  # so that a test that waits to be alone is the next
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:  # explicitly: forked children hold these files open too
            fcntl.flock(machine, fcntl.LOCK_UN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``alone`` come last, when the other workers have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def _segments() -> set[str]:
    """Names that nobody alive but this process stands for: a living process's are its own business,
    be it a server or another worker of these tests.

    A segment's creator holds a lock on it until its name is gone.
    """
    mine = {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}
    found = set()
    for path in SHM.glob("metronome-*") if SHM.is_dir() else ():
        try:
            with path.open("rb") as segment:
                fcntl.flock(segment, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found.add(path.name)
        except BlockingIOError:
            if str(path) in mine:
                found.add(path.name)
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(autouse=True, scope="session")
def _own_engine_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled engines are kept for one run of the tests, and not in the user's folder."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    os.environ["METRONOME_CACHE"] = str(folder / "engines")


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fails a test that leaks a shared-memory segment, a thread or a child process."""
    segments, threads = _segments(), set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - threads if not t.daemon]
    assert not left, f"threads left running: {left}"
    children = multiprocessing.active_children()
    assert not children, f"child processes left running: {children}"
    # What another worker made just now is not locked yet, and what its dead leave is soon swept.
    deadline_s = time.monotonic() + OTHERS_S
    while _segments() - segments and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not _segments() - segments, "segments left in /dev/shm"
