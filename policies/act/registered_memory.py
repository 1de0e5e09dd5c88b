"""Host memory that a GPU reads directly, without a copy into pinned memory first.

CUDA pins the pages of a registered address range and keeps them for the device until the range is
unregistered. It does not notice when the range is unmapped. An address that is mapped again would
then still stand for the old pages, and the device would read old images without any error. So the
registry holds a view of the memory for as long as it is registered. A ``MappedSegment`` is unmapped
with its last view. Therefore registered memory cannot be unmapped, and its address cannot be
reused, whatever its owner does.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

PORTABLE, READ_ONLY = 0x01, 0x08
"""``cudaHostRegisterPortable``: for all devices. ``cudaHostRegisterReadOnly``: the device only
reads; CUDA requires it for memory that this process may not write, but not every device has it.
"""
MAPS = Path("/proc/self/maps")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HostRegistrar(Protocol):
    """Makes host memory directly readable for a device."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin ``nbytes`` bytes at ``address``, which begins a page. May take milliseconds.

        Raises:
            RuntimeError: The system or the device refuses it; nothing is registered.
        """
        ...

    def unregister(self, address: int) -> None:
        """Undo the ``register`` of ``address``, whose memory is still mapped.

        Raises:
            RuntimeError: The device failed; the memory may still be registered.
        """
        ...


class CudaHostRegistrar:
    """``HostRegistrar`` through ``cudaHostRegister``.

    A device without ``cudaHostRegisterReadOnly`` needs memory that this process may write, at the
    time of the call: the pages are pinned then. So the protection of a read-only shared mapping is
    lifted for the duration of the call. That is possible if its descriptor was opened for writing,
    as a server's are. Rejected: a second, writable mapping for the transfers; it would stay
    writable for as long as the session.

    A refusal remains the calling thread's last CUDA error, which torch reports at the thread's next
    kernel. So call it in a thread that runs none.

    Args:
        device: A CUDA device, whose context makes the calls.
        cudart: Has the functions of ``torch.cuda.cudart()``, which is used where this is None.
    """

    def __init__(self, device: torch.device, cudart: Any = None) -> None:
        self._device, self._given = device, cudart

    def register(self, address: int, nbytes: int) -> None:
        """As ``HostRegistrar``."""
        cudart = self._cudart()
        with self._current_device():
            refused = int(cudart.cudaHostRegister(address, nbytes, PORTABLE | READ_ONLY))
            if not refused:
                return
            with contextlib.ExitStack() as stack:
                if _is_read_only(address, nbytes):
                    stack.enter_context(_writable(address, nbytes))
                error = int(cudart.cudaHostRegister(address, nbytes, PORTABLE))
        if error:
            raise RuntimeError(
                f"cudaHostRegister of {nbytes} bytes: error {error}; read-only: error {refused}"
            )

    def unregister(self, address: int) -> None:
        """As ``HostRegistrar``."""
        with self._current_device():
            error = int(self._cudart().cudaHostUnregister(address))
        if error:
            raise RuntimeError(f"cudaHostUnregister: error {error}")

    def _cudart(self) -> Any:
        cuda: Any = torch.cuda  # hardly typed
        return cuda.cudart() if self._given is None else self._given

    def _current_device(self) -> contextlib.AbstractContextManager[Any]:
        # The calls would otherwise make a context on the first GPU, with memory of its own.
        return torch.cuda.device(self._device) if self._given is None else contextlib.nullcontext()


@dataclass(slots=True, eq=False)
class _Entry:
    """One registered range. ``users`` is 0 where unregistering it failed."""

    memory: NDArray[np.uint8]
    users: int = 1


class RegisteredMemory:
    """The registered host memory of a process, with a count of users for each range.

    ``covers`` never waits, and is for the thread that runs the policy. ``register`` and ``release``
    may take milliseconds, and are for any other thread.
    """

    def __init__(self, registrar: HostRegistrar) -> None:
        self._registrar = registrar
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        # Replaced as a whole, never changed, so that ``covers`` needs no lock.
        self._ranges: tuple[list[int], list[int]] = ([], [])
        self._warned = False

    def register(self, memory: NDArray[np.uint8]) -> bool:
        """Register ``memory``, or count one more user of it; whether it is registered now.

        A failure is logged, the first one as a warning. Each success needs one ``release``.

        Args:
            memory: A whole mapping: contiguous, from the beginning of a page. It stays mapped
                until it is released.

        Raises:
            ValueError: ``memory`` is not contiguous, or empty.
        """
        if not memory.flags.c_contiguous or not memory.nbytes:
            raise ValueError(f"memory: got {memory.shape} {memory.strides}, expected contiguous")
        address: int = memory.ctypes.data
        with self._lock:
            entry = self._entries.get(address)
            if entry is not None and entry.users and entry.memory.nbytes == memory.nbytes:
                entry.users += 1
                return True
            try:
                self._require_unregistered(address, memory.nbytes)
                self._registrar.register(address, memory.nbytes)
            except RuntimeError as error:
                logger.log(
                    logging.DEBUG if self._warned else logging.WARNING,
                    "images are copied once more on their way to the device: %s",
                    str(error),  # a record that is kept must not keep the memory
                )
                self._warned = True
                return False
            self._entries[address] = _Entry(memory)
            self._publish()
            return True

    def release(self, memory: NDArray[np.uint8]) -> None:
        """End one use of ``memory``; the last one unregisters it and lets go of it.

        No copy from it may be in progress.

        Raises:
            ValueError: ``memory`` is not registered.
        """
        address: int = memory.ctypes.data
        with self._lock:
            entry = self._entries.get(address)
            if entry is None or not entry.users or entry.memory.nbytes != memory.nbytes:
                raise ValueError(f"{memory.nbytes} bytes at {address:#x} are not registered")
            entry.users -= 1
            if entry.users:
                return
            self._publish()
            try:
                self._registrar.unregister(address)
            except RuntimeError as error:
                # The device may still have the pages, so the address must not be used again.
                logger.warning("%d bytes of memory stay mapped: %s", memory.nbytes, str(error))
                return
            del self._entries[address]

    def covers(self, array: NDArray[Any]) -> bool:
        """Whether ``array`` is contiguous and lies within registered memory.

        It stays there until the owner of the memory releases it. O(log n) for n ranges.
        """
        begins, ends = self._ranges
        if not begins or not array.flags.c_contiguous:
            return False
        address = array.ctypes.data
        index = bisect.bisect_right(begins, address) - 1
        return index >= 0 and address + array.nbytes <= ends[index]

    def _require_unregistered(self, address: int, nbytes: int) -> None:
        for begin, entry in self._entries.items():
            if begin < address + nbytes and address < begin + entry.memory.nbytes:
                state = "registered" if entry.users else "not usable: unregistering it failed"
                raise RuntimeError(f"{nbytes} bytes at {address:#x} overlap memory that is {state}")

    def _publish(self) -> None:
        ranges = sorted(
            (begin, begin + entry.memory.nbytes)
            for begin, entry in self._entries.items()
            if entry.users
        )
        self._ranges = ([begin for begin, _ in ranges], [end for _, end in ranges])


_process_lock = threading.Lock()
_process_registry: RegisteredMemory | None = None


def process_registry(device: torch.device) -> RegisteredMemory:
    """Return the one registry of this process, which all engines on CUDA devices share.

    A second registration of the same memory is an error in CUDA, and a new engine is made while the
    old one still serves.

    Args:
        device: Its context makes the calls, for all devices. The first call decides.
    """
    global _process_registry  # noqa: PLW0603  CUDA's own registrations belong to the process
    with _process_lock:
        if _process_registry is None:
            _process_registry = RegisteredMemory(CudaHostRegistrar(device))
        return _process_registry


def _is_read_only(address: int, nbytes: int) -> bool:
    """Whether the range lies in one shared mapping that this process may only read."""
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, permissions = line.split(maxsplit=2)[:2]
        begin, end = (int(number, 16) for number in span.split("-"))
        if begin <= address < end:
            return permissions == "r--s" and address + nbytes <= end
    return False


@contextlib.contextmanager
def _writable(address: int, nbytes: int) -> Iterator[None]:
    """Let this process write a read-only mapping during a ``with`` block. It stays readable."""
    _protect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        yield
    finally:
        try:
            _protect(address, nbytes, mmap.PROT_READ)
        except RuntimeError as error:  # by now the memory may be registered, and stays usable
            logger.warning("a peer's segment stays writable: %s", error)


def _protect(address: int, nbytes: int, protection: int) -> None:
    if _libc.mprotect(address, nbytes, protection):
        number = ctypes.get_errno()
        raise RuntimeError(f"mprotect of {nbytes} bytes: {os.strerror(number)}")
