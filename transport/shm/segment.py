"""Shared-memory segments that do not leak when a process dies.

A segment of ``create_anonymous`` never has a name: processes inherit its descriptor or receive it
over a socket. A ``Segment`` has a name only during a handshake. Its creator holds ``flock`` on it
for that time. So the creator of a segment with one of our names and a free lock is dead, and
``sweep`` removes the name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc
from numpy.typing import NDArray

from transport.errors import ProtocolError, TransportUnavailable

PREFIX = "metronome-"
FOLDER = Path("/dev/shm")  # noqa: S108  where Linux keeps POSIX shared memory; only listed here
_NAME = re.compile(rf"/{PREFIX}[0-9a-f]{{32}}")
_MIB = 2**20


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class MappedSegment:
    """A mapped segment. Its pages are present and, where the system allows it, locked in memory.

    Args:
        fd: The segment's descriptor, which the caller closes.

    Raises:
        ProtocolError: The segment is not ``nbytes`` long.

    Attributes:
        address: Of the first byte, page-aligned.
        bytes: (nbytes,) uint8 view; read-only unless ``writable``.
        locked: Whether it cannot be swapped out (RLIMIT_MEMLOCK, or CAP_IPC_LOCK).
    """

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        _check_length(fd, nbytes, "segment")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Populated now, so that the first messages do not cost a page fault per 4 KiB.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._map: mmap.mmap | None = mmap.mmap(fd, nbytes, flags=flags, prot=protection)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address: int = self.bytes.ctypes.data
        self.nbytes = nbytes
        self.locked: bool = _libc.mlock(self.address, nbytes) == 0

    @property
    def buffer(self) -> Any:
        """The whole segment as a buffer, for views."""
        return self._map

    def close(self) -> None:
        """Unmap, or leave that to the last view that still exists. Idempotent."""
        memory, self._map = self._map, None
        self.bytes = np.empty(0, np.uint8)
        if memory is not None:
            with contextlib.suppress(BufferError):
                memory.close()


@dataclass(frozen=True, slots=True)
class ShmResources:
    """The memory and descriptors of one side of a shared-memory session.

    Attributes:
        own, peer: The segment that this side writes, and the other side's.
        own_eventfd, peer_eventfd: The eventfd that this side waits on, and the other side's.
        unix_socket: The connected AF_UNIX socket (SOCK_SEQPACKET, non-blocking).
    """

    own: MappedSegment
    peer: MappedSegment
    own_eventfd: int
    peer_eventfd: int
    unix_socket: socket.socket

    def close(self) -> None:
        """Release everything. Call this once."""
        self.unix_socket.close()
        os.close(self.own_eventfd)
        os.close(self.peer_eventfd)
        self.own.close()
        self.peer.close()


class Segment:
    """A shared-memory segment that still has a name."""

    def __init__(self, name: str, fd: int, nbytes: int, *, owner: bool) -> None:
        self.name, self.nbytes = name, nbytes
        self._fd, self._owner = fd, owner

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Create a segment with a random name and mode 0600; lock it and reserve its memory.

        Raises:
            OSError: ENOSPC if it does not fit, or another error of the system.
        """
        while True:
            name = f"/{PREFIX}{secrets.token_hex(16)}"
            fd = _open(name, posix_ipc.O_CREX, read_only=False)
            segment = cls(name, fd, nbytes, owner=True)
            try:
                if not segment._lock():
                    segment.close()
                    continue
                _reserve(fd, nbytes)
            except BaseException:
                segment.close()
                raise
            return segment

    @classmethod
    def open(cls, name: str, nbytes: int, *, writable: bool) -> Segment:
        """Open a segment that a peer created.

        Raises:
            ProtocolError: The name is not one of ours, or the segment has another length.
            OSError: It does not exist, or this user may not open it.
        """
        if not _NAME.fullmatch(name):
            raise ProtocolError(f"segment name: got {name[:80]!r}, expected {_NAME.pattern}")
        fd = _open(name, 0, read_only=not writable)
        segment = cls(name, fd, nbytes, owner=False)
        try:
            _check_length(fd, nbytes, f"segment {name}")
        except ProtocolError:
            segment.close()
            raise
        return segment

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write ``data`` at byte ``offset``, before the peer maps the segment."""
        if os.pwrite(self._fd, data, offset) != len(data):
            raise OSError(errno.EIO, f"short write to {self.name}")

    def map(self, *, writable: bool) -> MappedSegment:
        """Map the whole segment."""
        return MappedSegment(self._fd, self.nbytes, writable=writable)

    def close(self) -> None:
        """Unlink the name if this side created it, then unlock. Mappings stay. Idempotent."""
        if self._fd < 0:
            return
        if self._owner:
            with contextlib.suppress(posix_ipc.ExistentialError, OSError):
                posix_ipc.unlink_shared_memory(self.name)
        os.close(self._fd)
        self._fd = -1

    def _lock(self) -> bool:
        """Lock it; False if a sweeper has taken the lock or the name meanwhile."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return os.fstat(self._fd).st_nlink > 0


def create_anonymous(label: str, nbytes: int) -> int:
    """Create a nameless segment of zeros with reserved memory; return its descriptor.

    Args:
        label: Its name in ``/proc``.

    Raises:
        OSError: There is not enough memory.
    """
    fd = os.memfd_create(label, os.MFD_CLOEXEC)
    try:
        _reserve(fd, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_all(sizes: Sequence[int]) -> list[Segment]:
    """Create segments of these sizes in bytes, or none.

    Raises:
        TransportUnavailable: With the reason, for the peer and the log.
    """
    segments: list[Segment] = []
    try:
        for nbytes in sizes:
            segments.append(Segment.create(nbytes))
    except OSError as error:
        for segment in segments:
            segment.close()
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            reason = f"{FOLDER} is full: {_mib(sum(sizes))} wanted, {_free()} there"
        else:
            reason = f"no shared memory: {error.strerror or error}"
        raise TransportUnavailable(reason) from error
    return segments


def sweep() -> list[str]:
    """Remove the names of segments whose creators are dead; return the removed names."""
    removed = []
    names = sorted(FOLDER.glob(f"{PREFIX}*")) if FOLDER.is_dir() else []
    for path in names:
        if not _NAME.fullmatch(f"/{path.name}"):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # removed meanwhile, or owned by another user
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path.name)
        except OSError:
            continue  # its creator is alive, or has just unlinked it
        finally:
            os.close(fd)
    return removed


def _reserve(fd: int, nbytes: int) -> None:
    # ftruncate would succeed on a full tmpfs, and the first access would raise SIGBUS.
    os.posix_fallocate(fd, 0, nbytes)


def _check_length(fd: int, nbytes: int, what: str) -> None:
    length = os.fstat(fd).st_size
    if length != nbytes:
        raise ProtocolError(f"{what}: got {length} bytes, expected {nbytes}")


def _open(name: str, flags: int, *, read_only: bool) -> int:
    """Open with posix_ipc, whose errors are raised as OSError with an errno."""
    try:
        memory = posix_ipc.SharedMemory(name, flags, mode=0o600, read_only=read_only)
    except posix_ipc.ExistentialError as error:
        number = errno.EEXIST if flags else errno.ENOENT
        raise OSError(number, os.strerror(number), name) from error
    except posix_ipc.PermissionsError as error:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), name) from error
    fd: int = memory.fd
    os.set_inheritable(fd, False)
    return fd


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:.1f} MiB"


def _free() -> str:
    status = os.statvfs(FOLDER)
    return _mib(status.f_bavail * status.f_frsize)
