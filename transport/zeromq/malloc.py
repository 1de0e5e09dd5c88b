"""A setting of glibc's malloc that keeps the memory of received frames in the process.

ZMQ allocates every frame it receives and frees it after it was read. By default glibc returns
blocks of that size to the kernel, and the next frame faults the pages in again. With images of 0.9
MB this costs a tenth of a round trip. With the setting, a process keeps at most ``KEEP_BYTES``
more.

The setting applies to the whole process, so only a command's ``main`` may call it. No module of
this package does: a ``PolicyClient`` or ``PolicyServer`` in a user's program does not change
malloc.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

KEEP_BYTES = 128 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP = 32 * 2**20
"""The largest threshold that glibc accepts; larger blocks are always mapped and unmapped."""


@functools.cache
def keep_freed_memory() -> None:
    """Have malloc keep freed memory, once per process. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, KEEP_BYTES)
