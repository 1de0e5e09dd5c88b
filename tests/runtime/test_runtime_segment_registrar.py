"""Sessions' segments are registered for the device off the serving thread, and let go of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from policies.act.registered_memory import RegisteredMemory
from policies.types import ActionChunk, MetaObs
from runtime.errors import ServerLost
from runtime.server import PolicyServer, policy_server
from runtime.server.segment_registrar import SegmentRegistrar
from tests.pinned_pages import PinningRegistrar, mappings
from tests.runtime.batch_policy import BatchPolicy
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import ToyPolicy, observation

PATIENCE_S = 20.0


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def segments() -> list[int]:
    """Addresses at which this process has segments mapped."""
    return [mapped.begin for mapped in mappings() if "/metronome-" in mapped.name]


def covered(registry: RegisteredMemory) -> int:
    """Number of registered segments."""
    return len(registry._ranges[0])


def registrar_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "segments"]


class GpuPolicy(BatchPolicy):
    """Reads images as a device does, where they are registered."""

    def __init__(self, registrar: PinningRegistrar, registry: RegisteredMemory) -> None:
        super().__init__()
        self._registrar, self.registered_memory = registrar, registry
        self.direct: list[bool] = []
        self.threads: set[int] = set()

    def infer_batch(self, observations):
        self.threads.add(threading.get_ident())
        for obs in observations:
            image = obs.images["top"]
            self.direct.append(self.registered_memory.covers(image))
            if self.direct[-1]:
                read = self._registrar.read(image.ctypes.data, image.nbytes)
                assert read == image.tobytes()
        return super().infer_batch(observations)


@pytest.fixture
def registrar() -> Iterator[PinningRegistrar]:
    """Nothing may be left of any test's segments, descriptors or thread."""
    maps, threads = segments(), registrar_threads()
    registrar = PinningRegistrar()
    yield registrar
    until(lambda: registrar_threads() == threads)
    assert registrar.mistakes == []
    assert registrar.pinned == {}
    assert segments() == maps


@pytest.fixture
def registry(registrar: PinningRegistrar) -> RegisteredMemory:
    return RegisteredMemory(registrar)


@pytest.fixture
def policy(registrar: PinningRegistrar, registry: RegisteredMemory) -> GpuPolicy:
    return GpuPolicy(registrar, registry)


def swap(server: PolicyServer, policy) -> None:
    server.call_in_serving_thread(lambda: server.swap(policy))


def test_segment_is_registered_off_the_serving_thread_until_the_session_ends(
    policy: GpuPolicy, registrar: PinningRegistrar, registry: RegisteredMemory
) -> None:
    with serving(policy) as server:
        with connect(server, "shm") as client:
            client.infer(observation(shade=1))
            until(lambda: covered(registry) == 1)
            for shade in range(2, 12):  # all places of the ring
                client.infer(observation(shade=shade))
            assert policy.direct[1:] == [True] * 10
        until(lambda: not registrar.pinned)
        until(lambda: not segments())
        assert registrar.registrations == 1
        assert len(registrar.threads) == len(policy.threads) == 1
        assert not registrar.threads & policy.threads
        assert len(registrar_threads()) == 1


def test_twenty_sessions_leave_nothing(
    policy: GpuPolicy, registrar: PinningRegistrar, registry: RegisteredMemory
) -> None:
    with serving(policy) as server:
        with connect(server, "shm") as client:
            client.infer(observation())
        until(lambda: not segments())
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        for shade in range(20):
            with connect(server, "shm") as client:
                client.infer(observation(shade=shade))
                until(lambda: covered(registry) == 1)
                client.infer(observation(shade=100 + shade))
            until(lambda: not registrar.pinned)
        until(lambda: not segments())
        until(lambda: len(list(Path("/proc/self/fd").iterdir())) == descriptors)
        assert policy.direct.count(True) >= 20
        assert len(registrar_threads()) == 1


def test_refused_registration_is_served_all_the_same(
    policy: GpuPolicy, registrar: PinningRegistrar, caplog: pytest.LogCaptureFixture
) -> None:
    registrar.refusal = "no pages may be pinned"
    with serving(policy) as server:
        for _ in range(2):
            with connect(server, "shm") as client:
                client.infer(observation())
                assert registrar.entered.acquire(timeout=PATIENCE_S)
                client.infer(observation())
    assert policy.direct == [False] * 4
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "images are copied once more on their way to the device: no pages may be pinned"
    ]


def test_registry_that_fails_costs_its_session_nothing(
    registrar: PinningRegistrar, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        asked = threading.Semaphore(0)

        def register(self, memory: np.ndarray) -> bool:
            self.asked.release()
            raise LookupError("a bug in the registry")

    policy = BatchPolicy()
    policy.registered_memory = Broken()
    with serving(policy) as server:
        for _ in range(2):
            with connect(server, "shm") as client:
                client.infer(observation())
                assert Broken.asked.acquire(timeout=PATIENCE_S)
                client.infer(observation())
    assert caplog.text.count("LookupError: a bug in the registry") == 2


def test_session_that_ends_before_its_turn_is_not_registered(
    policy: GpuPolicy, registrar: PinningRegistrar
) -> None:
    with serving(policy) as server:
        with registrar.gate:
            with connect(server, "shm") as first:
                first.infer(observation())
                assert registrar.entered.acquire(timeout=PATIENCE_S)
                with connect(server, "shm") as second:
                    second.infer(observation())
            until(lambda: server.statistics().sessions == 0)
        until(lambda: not segments())
        assert registrar.registrations == 1  # the first had begun, and was undone
        assert policy.direct == [False] * 2


def test_open_sessions_follow_a_replacement(
    policy: GpuPolicy, registrar: PinningRegistrar, registry: RegisteredMemory
) -> None:
    on_cpu, next_on_gpu = BatchPolicy(), GpuPolicy(registrar, registry)
    with serving(on_cpu) as server, connect(server, "shm") as one, connect(server, "shm") as two:
        for client in (one, two):
            client.infer(observation())
        assert not registrar_threads()

        swap(server, policy)
        until(lambda: covered(registry) == 2)
        for client in (one, two):
            client.infer(observation(shade=7))
        assert policy.direct[-2:] == [True] * 2

        swap(server, next_on_gpu)  # the same registry: nothing is registered twice
        for client in (one, two):
            client.infer(observation(shade=8))
        assert next_on_gpu.direct == [True] * 2
        assert registrar.registrations == 2

        swap(server, BatchPolicy())
        until(lambda: not registrar.pinned)
        for client in (one, two):
            client.infer(observation(shade=9))
        assert len(segments()) == 8  # of both sides, here in one process


def test_replacement_with_a_registry_of_its_own_gets_the_memory_after_the_old_one(
    policy: GpuPolicy, registrar: PinningRegistrar, registry: RegisteredMemory
) -> None:
    others = RegisteredMemory(registrar)
    other = GpuPolicy(registrar, others)
    with serving(policy) as server, connect(server, "shm") as client:
        client.infer(observation())
        until(lambda: covered(registry) == 1)
        swap(server, other)
        until(lambda: covered(others) == 1)
        assert covered(registry) == 0
        client.infer(observation(shade=3))
        assert other.direct == [True]


def test_episode_keeps_its_registry_until_reset(
    registrar: PinningRegistrar, registry: RegisteredMemory
) -> None:
    class Stateful(ToyPolicy):
        registered_memory = registry

        def infer(self, obs: MetaObs) -> ActionChunk:
            assert registry.covers(obs.images["top"])
            return super().infer(obs)

        def fork(self) -> Stateful:
            return Stateful()

    with serving(ToyPolicy()) as server, connect(server, "shm") as client:
        client.infer(observation())
        swap(server, Stateful())
        client.infer(observation())
        assert not registrar_threads()
        client.reset()
        until(lambda: covered(registry) == 1)
        client.infer(observation())
        swap(server, ToyPolicy())
        client.infer(observation())
        client.reset()
        until(lambda: not registrar.pinned)
        client.infer(observation())


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_without_memory_to_register_there_is_no_thread(
    policy: GpuPolicy, registrar: PinningRegistrar, transport: str
) -> None:
    served = BatchPolicy() if transport == "shm" else policy
    with serving(served) as server, connect(server, transport) as client:
        client.infer(observation())
        assert not registrar_threads()
    assert registrar.registrations == 0


def test_server_that_closes_releases_the_segments_of_open_sessions(
    policy: GpuPolicy, registrar: PinningRegistrar, registry: RegisteredMemory
) -> None:
    with serving(policy) as server:
        client = connect(server, "shm")
        client.infer(observation())
        until(lambda: covered(registry) == 1)
    assert not registrar.pinned
    assert not registrar_threads()
    server.close()
    client.close()


def test_driver_that_hangs_does_not_keep_the_server_from_closing(
    policy: GpuPolicy,
    registrar: PinningRegistrar,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(policy_server, "CLOSE_S", 0.05)
    with registrar.gate:
        with serving(policy) as server:
            client = connect(server, "shm")
            client.infer(observation())
            assert registrar.entered.acquire(timeout=PATIENCE_S)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 4
        assert "releasing registered memory takes more than 0.05 s" in caplog.text
        with pytest.raises(ServerLost, match="the test is over"):
            client.infer(observation())
        client.close()


def test_calls_take_effect_in_their_order(registrar: PinningRegistrar) -> None:
    calls: list[str] = []

    class Recorder:
        def register(self, memory: np.ndarray) -> bool:
            time.sleep(0.001)
            calls.append(f"register {memory[0]}")
            return True

        def release(self, memory: np.ndarray) -> None:
            calls.append(f"release {memory[0]}")

    segments = SegmentRegistrar()
    recorder = Recorder()
    rng = np.random.default_rng(0)
    for _ in range(300):
        number = int(rng.integers(4))
        if rng.integers(2):
            segments.register(number, np.full(1, number, np.uint8), recorder)
        else:
            segments.release(number)
        if rng.integers(4) == 0:
            time.sleep(0.0005)
    segments.close(PATIENCE_S)
    segments.close(PATIENCE_S)
    assert "register 0" in calls
    for number in range(4):
        own = [call.split()[0] for call in calls if call.endswith(f" {number}")]
        assert own == ["register", "release"] * (len(own) // 2)
