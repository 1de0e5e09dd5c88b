"""Registered host memory: laws of the registry, and the calls of the CUDA runtime."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from tiny_act import TINY, needs_gpu

from policies.act import registered_memory
from policies.act.policy import ActPolicy
from policies.act.registered_memory import (
    PORTABLE,
    READ_ONLY,
    CudaHostRegistrar,
    RegisteredMemory,
    process_registry,
)
from policies.checkpoint.untrained import random_weights
from tests.pinned_pages import PinningRegistrar, mapped_at
from transport.shm.segment import MappedSegment, Segment, create_anonymous

NBYTES = 4096


def at(address: int, nbytes: int = NBYTES) -> np.ndarray:
    """An array that does not keep its memory mapped."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def map_new(nbytes: int = NBYTES) -> MappedSegment:
    """A segment that this process may only read, as a server maps its client's."""
    segment = Segment.create(nbytes)
    segment.write(os.urandom(nbytes))
    mapping = segment.map(writable=False)
    segment.close()
    return mapping


@pytest.fixture
def registrar():
    registrar = PinningRegistrar()
    yield registrar
    assert registrar.mistakes == []
    registrar.close()


@pytest.fixture
def registry(registrar):
    return RegisteredMemory(registrar)


# laws


class RegistryLaws(RuleBasedStateMachine):
    """Two engines of one process register and release segments that a transport maps and unmaps.

    Nothing here but the registry keeps a closed segment mapped.
    """

    segments = Bundle("segments")

    def __init__(self):
        super().__init__()
        self.registrar = PinningRegistrar()
        self.registry = RegisteredMemory(self.registrar)
        self.users: dict[int, set[int]] = {}
        self.open: dict[int, tuple[MappedSegment, int]] = {}

    @rule(target=segments)
    def map(self):
        fd = create_anonymous("test", NBYTES)
        os.pwrite(fd, os.urandom(NBYTES), 0)
        mapping = MappedSegment(fd, NBYTES, writable=False)
        assert not self.users.get(mapping.address), "the address of registered memory was reused"
        self.open[mapping.address] = mapping, fd
        self.users[mapping.address] = set()
        return mapping.address

    @rule(address=segments)
    def unmap(self, address):
        if address in self.open:
            mapping, fd = self.open.pop(address)
            mapping.close()
            os.close(fd)

    @rule(address=segments)
    def write(self, address):
        if address in self.open:
            os.pwrite(self.open[address][1], os.urandom(NBYTES), 0)

    @rule(address=segments, user=st.integers(0, 1), refused=st.booleans())
    def register(self, address, user, refused):
        if address not in self.open or user in self.users[address]:
            return
        self.registrar.refusal = "no" if refused else ""
        done = self.registry.register(self.open[address][0].bytes)
        self.registrar.refusal = ""
        assert done == (not refused or bool(self.users[address]))
        if done:
            self.users[address].add(user)

    @rule(address=segments, user=st.integers(0, 1))
    def release(self, address, user):
        if user in self.users[address]:
            self.users[address].remove(user)
            self.registry.release(at(address))

    @rule(old=st.integers(0, 1))
    def swap(self, old):
        """An engine takes over what another has registered."""
        new = 1 - old
        for address, users in self.users.items():
            if old in users and new not in users and address in self.open:
                assert self.registry.register(self.open[address][0].bytes)
                users.add(new)
                self.release(address, old)

    @invariant()
    def only_used_memory_is_registered(self):
        assert self.registrar.pinned.keys() == {a for a, users in self.users.items() if users}

    @invariant()
    def the_device_reads_what_is_there(self):
        for address, (mapping, _) in self.open.items():
            image = mapping.bytes[100:900].reshape(20, 40)
            assert self.registry.covers(image) == bool(self.users[address])
            if self.users[address]:
                assert self.registrar.read(address + 100, 800) == image.tobytes()

    def teardown(self):
        for address, users in self.users.items():
            for user in list(users):
                self.release(address, user)
        assert self.registrar.pinned == {}
        for address in list(self.open):
            self.unmap(address)
        assert not [a for a in self.users if (m := mapped_at(a)) and "memfd:test" in m.name]


TestRegistryLaws = RegistryLaws.TestCase
TestRegistryLaws.settings = settings(max_examples=60, stateful_step_count=20)


@given(
    cuts=st.sets(st.integers(0, 60), min_size=2, max_size=8).map(sorted),
    begin=st.integers(0, 59),
    length=st.integers(1, 20),
)
def test_covered_is_what_lies_within_one_registered_range(cuts, begin, length):
    registry = RegisteredMemory(SimpleNamespace(register=lambda *_: None))
    memory = np.zeros(80, np.uint8)
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    for first, last in ranges:
        assert registry.register(memory[first:last])
    inside = any(first <= begin and begin + length <= last for first, last in ranges)
    assert registry.covers(memory[begin : begin + length]) == inside


def test_an_array_with_gaps_is_not_covered(registry):
    mapping = map_new()
    assert registry.register(mapping.bytes)
    assert registry.covers(mapping.bytes.reshape(64, 64))
    assert not registry.covers(mapping.bytes.reshape(64, 64)[:, :32])
    registry.release(mapping.bytes)
    mapping.close()


def test_registered_memory_outlives_its_mapping_and_its_address_is_not_reused(registry):
    mapping = map_new()
    address = mapping.address
    mapping.close()
    others = [map_new() for _ in range(20)]
    assert address in [other.address for other in others], "a freed address is used again"
    mapping = next(other for other in others if other.address == address)
    others.remove(mapping)
    assert registry.register(mapping.bytes)
    inode = mapped_at(address).inode
    mapping.close()
    mapping.close()
    assert mapped_at(address).inode == inode
    others += [map_new() for _ in range(20)]
    assert address not in [other.address for other in others]
    registry.release(at(address))
    mapped = mapped_at(address)
    assert mapped is None or mapped.inode != inode
    for other in others:
        other.close()


def test_overlapping_memory_is_refused(registry, registrar, caplog):
    mapping = map_new()
    assert registry.register(mapping.bytes)
    assert not registry.register(mapping.bytes[:100])
    assert not registry.register(mapping.bytes[100:])
    assert "overlap memory that is registered" in caplog.text
    assert registrar.registrations == 1
    registry.release(mapping.bytes)
    mapping.close()


def test_a_failure_is_one_warning_and_not_an_error(registry, registrar, caplog):
    caplog.set_level(logging.DEBUG)
    mapping, registrar.refusal = map_new(), "the limit of locked memory"
    assert not registry.register(mapping.bytes)
    assert not registry.register(mapping.bytes)
    assert not registry.covers(mapping.bytes)
    assert [r.levelname for r in caplog.records] == ["WARNING", "DEBUG"]
    assert "copied once more on their way to the device: the limit of locked" in caplog.text
    registrar.refusal = ""
    assert registry.register(mapping.bytes)
    registry.release(mapping.bytes)
    mapping.close()


def test_memory_that_cannot_be_unregistered_stays_mapped_and_unused(registry, registrar, caplog):
    mapping = map_new()
    address, inode = mapping.address, mapped_at(mapping.address).inode
    assert registry.register(mapping.bytes)
    registrar.refusal = "the device is lost"
    registry.release(mapping.bytes)
    assert "4096 bytes of memory stay mapped: the device is lost" in caplog.text
    registrar.refusal = ""
    assert not registry.covers(mapping.bytes)
    assert not registry.register(mapping.bytes)
    mapping.close()
    assert mapped_at(address).inode == inode


def test_memory_is_not_covered_any_more_when_it_is_unregistered(registry, registrar, monkeypatch):
    mapping, covered = map_new(), []
    assert registry.register(mapping.bytes)
    unregister = registrar.unregister

    def ask(address):
        covered.append(registry.covers(mapping.bytes))
        unregister(address)

    monkeypatch.setattr(registrar, "unregister", ask)
    registry.release(mapping.bytes)
    assert covered == [False]
    mapping.close()


def test_memory_that_is_not_registered_cannot_be_released(registry):
    mapping = map_new()
    with pytest.raises(ValueError, match=r"4096 bytes at 0x[0-9a-f]+ are not registered"):
        registry.release(mapping.bytes)
    assert registry.register(mapping.bytes)
    with pytest.raises(ValueError, match=r"100 bytes at 0x[0-9a-f]+ are not registered"):
        registry.release(mapping.bytes[:100])
    registry.release(mapping.bytes)
    with pytest.raises(ValueError, match="not registered"):
        registry.release(mapping.bytes)
    mapping.close()


@pytest.mark.parametrize("memory", [np.zeros(8, np.uint8)[::2], np.zeros(0, np.uint8)])
def test_only_contiguous_memory_can_be_registered(registry, memory):
    with pytest.raises(ValueError, match="expected contiguous"):
        registry.register(memory)


def test_asking_does_not_wait_for_a_registration(registry, registrar):
    first, second = map_new(), map_new()
    assert registry.register(first.bytes)
    with registrar.gate:
        thread = threading.Thread(target=registry.register, args=(second.bytes,))
        thread.start()
        for _ in range(2):
            assert registrar.entered.acquire(timeout=20)
        assert registry.covers(first.bytes)
        assert not registry.covers(second.bytes)
    thread.join()
    assert registry.covers(second.bytes)
    for mapping in (first, second):
        registry.release(mapping.bytes)
        mapping.close()


def test_all_engines_of_a_process_share_one_registry(monkeypatch):
    monkeypatch.setattr(registered_memory, "_process_registry", None)
    first = process_registry(torch.device("cuda", 0))
    assert process_registry(torch.device("cuda", 1)) is first


def test_a_policy_has_the_registry_of_its_engine(registry):
    policy = ActPolicy(random_weights(TINY), device="cpu", engine="torch")
    assert policy.registered_memory is None
    policy._engine = SimpleNamespace(registered_memory=registry)
    assert policy.registered_memory is registry


# the CUDA runtime


class Cudart:
    """``torch.cuda.cudart()`` of a device that may know read-only registrations."""

    def __init__(self, *, read_only: bool):
        self.read_only = read_only
        self.calls: list[tuple[int, str]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        permissions = mapped_at(address).permissions
        self.calls.append((flags, permissions))
        if flags & READ_ONLY:
            return 0 if self.read_only else 801
        return 0 if "w" in permissions else 1

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0 if address else 1


CUDA = torch.device("cuda", 0)


def test_a_device_that_knows_read_only_memory_gets_it_as_it_is():
    mapping, cudart = map_new(), Cudart(read_only=True)
    CudaHostRegistrar(CUDA, cudart).register(mapping.address, NBYTES)
    assert cudart.calls == [(READ_ONLY | PORTABLE, "r--s")]
    mapping.close()


def test_for_any_other_a_mapping_is_writable_while_it_is_registered():
    mapping, cudart = map_new(), Cudart(read_only=False)
    CudaHostRegistrar(CUDA, cudart).register(mapping.address, NBYTES)
    assert cudart.calls == [(READ_ONLY | PORTABLE, "r--s"), (PORTABLE, "rw-s")]
    assert mapped_at(mapping.address).permissions == "r--s"
    mapping.close()


def test_memory_that_is_writable_anyway_stays_so():
    segment, cudart = Segment.create(NBYTES), Cudart(read_only=False)
    mapping = segment.map(writable=True)
    segment.close()
    CudaHostRegistrar(CUDA, cudart).register(mapping.address, NBYTES)
    assert mapped_at(mapping.address).permissions == "rw-s"
    mapping.bytes[0] = 1
    mapping.close()


def test_a_mapping_that_may_not_become_writable_is_refused(caplog):
    segment = Segment.create(NBYTES)
    other = Segment.open(segment.name, NBYTES, writable=False)
    mapping = other.map(writable=False)
    other.close()
    segment.close()
    registry = RegisteredMemory(CudaHostRegistrar(CUDA, Cudart(read_only=False)))
    assert not registry.register(mapping.bytes)
    assert "mprotect of 4096 bytes: Permission denied" in caplog.text
    assert mapped_at(mapping.address).permissions == "r--s"
    mapping.close()


def test_errors_of_the_device_are_told_by_number():
    private = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    address = np.frombuffer(private, np.uint8).ctypes.data
    registrar = CudaHostRegistrar(CUDA, Cudart(read_only=False))
    with pytest.raises(RuntimeError, match="of 4096 bytes: error 1; read-only: error 801"):
        registrar.register(address, NBYTES)
    with pytest.raises(RuntimeError, match="cudaHostUnregister: error 1"):
        registrar.unregister(0)
    private.close()


@needs_gpu
def test_the_device_reads_a_registered_segment():
    registry = RegisteredMemory(CudaHostRegistrar(CUDA))
    for _ in range(3):
        mapping = map_new(1_000_000)
        # In another thread: a refusal on the way stays the last CUDA error of its thread.
        with ThreadPoolExecutor(1) as other:
            assert other.submit(registry.register, mapping.bytes).result()
        image = at(mapping.address, 1_000_000)[5000:905_000]
        assert torch.from_numpy(image).is_pinned()
        copy = torch.empty(image.size, dtype=torch.uint8, device=CUDA)
        copy.copy_(torch.from_numpy(image), non_blocking=True)
        torch.cuda.synchronize()
        assert copy.cpu().numpy().tobytes() == image.tobytes()
        assert mapped_at(mapping.address).permissions == "r--s"
        del image
        registry.release(mapping.bytes)
        mapping.close()
