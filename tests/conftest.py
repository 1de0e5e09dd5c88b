"""For every test: nothing of ours is left behind, and no example is judged by its duration."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("metronome", deadline=None, print_blob=True)
settings.load_profile("metronome")

SHM = Path("/dev/shm")


def _segments() -> set[str]:
    """Names that nobody alive but this process stands for: a living server's are its own business.

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
    os.environ["METRONOME_CACHE"] = str(tmp_path_factory.getbasetemp() / "engines")


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fails a test that leaks a shared-memory segment, a thread or a child process."""
    segments, threads = _segments(), set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - threads if not t.daemon]
    assert not left, f"threads left running: {left}"
    children = multiprocessing.active_children()
    assert not children, f"child processes left running: {children}"
    assert not _segments() - segments, "segments left in /dev/shm"
