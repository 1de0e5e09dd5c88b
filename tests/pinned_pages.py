"""A stand-in for ``cudaHostRegister``: pins pages, and does not notice when they are unmapped."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mapped:
    """A line of /proc/self/maps."""

    begin: int
    end: int
    permissions: str
    inode: int
    name: str


def mappings() -> list[Mapped]:
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, permissions, _, _, inode, *name = line.split(maxsplit=5)
        begin, end = (int(number, 16) for number in span.split("-"))
        found.append(Mapped(begin, end, permissions, int(inode), "".join(name)))
    return found


def mapped_at(address: int) -> Mapped | None:
    return next((m for m in mappings() if m.begin <= address < m.end), None)


def descriptor_of(inode: int) -> int:
    """A new descriptor of a mapped file."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if entry.stat().st_ino == inode:
                return os.dup(int(entry.name))
        except OSError:
            continue  # the listing's own
    raise AssertionError("the memory is no file's")


class PinningRegistrar:
    """``HostRegistrar`` for mapped files. The device reads the pages that were there at the time of
    the registration, whatever is at that address now.

    Attributes:
        mistakes: What CUDA forbids: a second registration of an address, or unregistering one that
            is not registered or not mapped any more.
        refusal: The reason why it refuses; none where it is empty.
        threads: The threads of all calls.
        gate: Held during a call of ``register``; a test may hold it, too.
    """

    def __init__(self) -> None:
        self.pinned: dict[int, tuple[int, int, int]] = {}  # address: nbytes, inode, descriptor
        self.mistakes: list[str] = []
        self.refusal = ""
        self.threads: set[int] = set()
        self.registrations = 0
        self.entered, self.gate = threading.Semaphore(0), threading.Lock()

    def register(self, address: int, nbytes: int) -> None:
        self.threads.add(threading.get_ident())
        self.entered.release()
        with self.gate:
            if self.refusal:
                raise RuntimeError(self.refusal)
            for begin, (length, _, _) in self.pinned.items():
                if begin < address + nbytes and address < begin + length:
                    self._mistake(f"{address:#x} is already registered")
            mapped = mapped_at(address)
            assert mapped is not None
            fd = descriptor_of(mapped.inode)
            self.pinned[address] = nbytes, mapped.inode, fd
            self.registrations += 1

    def unregister(self, address: int) -> None:
        self.threads.add(threading.get_ident())
        if address not in self.pinned:
            self._mistake(f"{address:#x} is not registered")
        mapped = mapped_at(address)
        _, inode, fd = self.pinned[address]
        if mapped is None or mapped.inode != inode:
            self._mistake(f"{address:#x} was unmapped while it was registered")
        if self.refusal:
            raise RuntimeError(self.refusal)
        os.close(fd)
        del self.pinned[address]

    def read(self, address: int, nbytes: int) -> bytes:
        """What the device reads there."""
        for begin, (length, _, fd) in self.pinned.items():
            if begin <= address and address + nbytes <= begin + length:
                return os.pread(fd, nbytes, address - begin)
        raise AssertionError(f"{address:#x} is not registered")

    def close(self) -> None:
        for _, _, fd in self.pinned.values():
            os.close(fd)
        self.pinned.clear()

    def _mistake(self, what: str) -> None:
        self.mistakes.append(what)
        raise AssertionError(what)
