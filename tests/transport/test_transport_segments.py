"""Segments: reserved before they are mapped, private, and never left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from transport.errors import ProtocolError, TransportUnavailable
from transport.shm import segment
from transport.shm.segment import (
    FOLDER,
    MappedSegment,
    Segment,
    create_all,
    create_anonymous,
    sweep,
)

pytestmark = pytest.mark.alone
"""Other tests make segments, and their servers sweep."""


def path_of(segment: Segment) -> Path:
    return FOLDER / segment.name.lstrip("/")


def test_a_segment_is_private_random_and_reserved() -> None:
    first, second = create_all([4096, 100_000])
    try:
        assert first.name != second.name
        status = path_of(second).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        # Blocks, not only a length: a touch can no longer fail for want of memory.
        assert status.st_size == 100_000 <= status.st_blocks * 512
    finally:
        first.close()
        second.close()
    assert not path_of(first).exists()
    assert not path_of(second).exists()


def test_both_sides_see_one_memory() -> None:
    segment = Segment.create(8192)
    segment.write(b"before", 10)
    own = segment.map(writable=True)
    other = Segment.open(segment.name, 8192, writable=False)
    seen = other.map(writable=False)
    other.close()
    assert path_of(segment).exists(), "only its owner unlinks it"
    segment.close()
    own.bytes[100] = 7
    assert seen.bytes[100] == 7
    assert bytes(seen.buffer[10:16]) == b"before"
    own.close()
    seen.close()
    seen.close()


def test_views_outlive_a_closed_mapping() -> None:
    segment = Segment.create(4096)
    mapping = segment.map(writable=True)
    segment.close()
    mapping.bytes[5] = 9
    view = mapping.bytes[4:8]
    mapping.close()
    assert view[1] == 9


@pytest.mark.parametrize(
    "name", ["", "/etc", "metronome-" + "0" * 32, "/metronome-" + "g" * 32, "/metronome-/../x"]
)
def test_foreign_name_is_not_opened(name: str) -> None:
    with pytest.raises(ProtocolError, match="segment name"):
        Segment.open(name, 4096, writable=False)


def test_a_segment_of_another_length_is_refused() -> None:
    segment = Segment.create(4096)
    with pytest.raises(ProtocolError, match="got 4096 bytes, expected 8192"):
        Segment.open(segment.name, 8192, writable=False)
    segment.close()


def test_an_anonymous_segment_is_zeros_reserved_and_not_inherited() -> None:
    fd = create_anonymous("test", 100_000)
    try:
        status = os.fstat(fd)
        assert status.st_size == 100_000 <= status.st_blocks * 512
        assert not os.get_inheritable(fd)
        mapping = MappedSegment(fd, 100_000, writable=False)
        assert not mapping.bytes.any()
        mapping.close()
    finally:
        os.close(fd)


def test_an_anonymous_segment_that_does_not_fit_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segment.os, "posix_fallocate", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space left"):
        create_anonymous("test", 4096)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("nbytes", [4096, 16384])
def test_a_descriptor_of_another_length_is_not_mapped(nbytes: int) -> None:
    fd = create_anonymous("test", 8192)
    try:
        with pytest.raises(ProtocolError, match=f"segment: got 8192 bytes, expected {nbytes}"):
            MappedSegment(fd, nbytes, writable=False)
    finally:
        os.close(fd)


def test_missing_segment_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        Segment.open("/metronome-" + "0" * 32, 4096, writable=False)


def test_lack_of_memory_leaves_nothing_and_reports_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    reserve = os.posix_fallocate

    def one_fits(fd: int, offset: int, length: int) -> None:
        made.append(length)
        if len(made) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(fd, offset, length)

    monkeypatch.setattr(segment.os, "posix_fallocate", one_fits)
    before = set(FOLDER.glob("metronome-*"))
    with pytest.raises(TransportUnavailable, match=r"/dev/shm is full: 28\.0 MiB wanted, .* there"):
        create_all([14 * 2**20, 14 * 2**20])
    assert set(FOLDER.glob("metronome-*")) <= before


def test_sweep_removes_only_names_without_an_owner() -> None:
    held = Segment.create(4096)
    dead = FOLDER / ("metronome-" + "d" * 32)
    foreign = [FOLDER / "metronome-notes", FOLDER / ("other-" + "d" * 32)]
    for path in (dead, *foreign):
        path.write_bytes(b"x")
    try:
        assert dead.name in sweep()
        assert not dead.exists()
        assert path_of(held).exists()
        assert all(path.exists() for path in foreign)
    finally:
        for path in foreign:
            path.unlink()
        held.close()


def test_a_sweep_between_creation_and_lock_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The creator finds its name gone, or the lock taken, and makes another."""
    lock, times = fcntl.flock, 0
    swept: list[str] = []

    def slow_lock(fd: int, operation: int) -> None:
        nonlocal times
        times += 1
        if times == 1:
            swept.extend(sweep())
        lock(fd, operation)

    monkeypatch.setattr(segment.fcntl, "flock", slow_lock)
    created = Segment.create(4096)
    assert swept
    assert path_of(created).exists()
    assert path_of(created).name not in swept
    created.close()


def test_mapping_is_populated_and_locked_where_allowed() -> None:
    """No page of it is missing before the first frame, and none beyond the limit is an error."""
    segment = Segment.create(64 * 4096)
    try:
        with limited_to(resource.RLIMIT_MEMLOCK, 0):
            mapping = segment.map(writable=True)
            assert mapping.locked == (os.geteuid() == 0)
            assert resident_kib(mapping.address) == 256
            mapping.close()
        mapping = segment.map(writable=False)
        assert resident_kib(mapping.address) == 256
        mapping.close()
    finally:
        segment.close()


@contextmanager
def limited_to(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def resident_kib(address: int) -> int:
    """Of the mapping that begins there."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            break
    for line in lines:
        if line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError(f"nothing is mapped at {address:x}")
