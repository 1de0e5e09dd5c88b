"""What glibc does with the memory of pictures that come and go over a network.

ZMQ allocates every frame it receives and frees it when it was read. By itself glibc gives memory of
that size back to the kernel, and the next frame faults it in again, page by page: with pictures of
0.9 MB a tenth of a round trip. Told to keep it, a process holds at most ``KEEP_BYTES`` more.

This is a setting of the whole process, so only a command's ``main`` may ask for it. No module of
this package does: a ``PolicyClient`` or ``PolicyServer`` in somebody's program leaves malloc alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

KEEP_BYTES = 128 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP = 32 * 2**20
"""The most that glibc takes for it; larger blocks are mapped and unmapped each time."""


@functools.cache
def keep_freed_memory() -> None:
    """Once per process. Does nothing where the C library is another one."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, KEEP_BYTES)
