"""Atomic words: what is stored is what is read, and spinning lets others run."""

from __future__ import annotations

import threading

import numpy as np

from transport import atomics


def test_words_are_read_as_they_were_stored() -> None:
    words = np.zeros(3, np.int64)
    address = words.ctypes.data + 8
    for value in (0, 1, 2**63 - 1, -1):
        atomics.store_release(address, value)
        assert atomics.load_acquire(address) == words[1] == value
        assert atomics.spin(address, value - 1 if value > -(2**62) else 0, 10) == value
    assert atomics.spin(address, -1, 1000) == -1
    atomics.fence()
    assert words[0] == words[2] == 0


def test_a_spinning_reader_sees_another_threads_store() -> None:
    """Spinning holds no lock of the interpreter's: the storing thread gets to run."""
    words = np.zeros(1, np.int64)
    address = words.ctypes.data
    started = threading.Event()

    def store() -> None:
        started.wait()
        atomics.store_release(address, 5)

    thread = threading.Thread(target=store)
    thread.start()
    started.set()
    while atomics.spin(address, 0, 1000) == 0:
        pass
    thread.join()
    assert words[0] == 5
