"""Round trips of one observation and one chunk between two processes, everything in Python.

Both sides touch every byte: the client copies its pictures in, the server copies them out, the
client copies the chunk. What is compared alternates in blocks within one run, so a ratio means
something on a machine where a number does not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq
from echo import observation_schema

from transport.auto import Dialer

ECHO = Path(__file__).with_name("echo.py")
BLOCKS, ROUNDS, WARMUP = 10, 100, 50
WAYS = ("shm", "zmq", "bare pyzmq")
CAMERAS = (1, 4)


@contextmanager
def echo(kind: str) -> Iterator[int]:
    """The other process; its port."""
    process = subprocess.Popen([sys.executable, ECHO, kind], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()  # it owns nothing that would outlive it
        process.wait()
        process.stdout.close()


def make_observation(cameras: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    observation = {
        name: generator.integers(0, 256, spec.shape).astype(spec.dtype)
        for name, spec in observation_schema(cameras).specs.items()
    }
    return observation


@contextmanager
def metronome(transport: str, cameras: int) -> Iterator[Callable[[], None]]:
    """One round trip over a session of ours."""
    observation = make_observation(cameras)
    chunk = np.empty((100, 14), np.float32)
    with echo("metronome") as port, Dialer("127.0.0.1", port) as dialer:
        channel, _ = dialer.open(observation_schema(cameras), client="bench", transport=transport)
        with channel:

            def round_trip() -> None:
                channel.send(observation, 1)
                with channel.recv(10.0) as message:
                    np.copyto(chunk, message.arrays["actions"])

            yield round_trip


@contextmanager
def bare(cameras: int) -> Iterator[Callable[[], None]]:
    """The same bytes through a plain REQ socket, without copies where pyzmq can avoid them."""
    source = make_observation(cameras)
    staged = {name: np.empty_like(array) for name, array in source.items()}
    chunk = np.empty((100, 14), np.float32)
    with echo("zmq") as port, zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(f"tcp://127.0.0.1:{port}")

        def round_trip() -> None:
            for name, array in source.items():
                np.copyto(staged[name], array)
            socket.send_multipart(list(staged.values()), copy=False)
            answer = socket.recv(copy=False)
            np.copyto(chunk, np.frombuffer(answer, np.float32).reshape(100, 14))

        yield round_trip


def way(name: str, cameras: int):
    return bare(cameras) if name == "bare pyzmq" else metronome(name, cameras)


def row(name: str, samples_us: np.ndarray) -> str:
    p50, p99, p999 = np.percentile(samples_us, [50, 99, 99.9])
    return f"{name:12}{p50:10.0f}{p99:10.0f}{p999:10.0f}{samples_us.max():10.0f}{samples_us.size:9}"


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("cameras", CAMERAS)
def test_round_trip(benchmark, name: str, cameras: int) -> None:
    """Each way by itself, for pytest-benchmark's own table and history."""
    with way(name, cameras) as round_trip:
        benchmark.pedantic(round_trip, rounds=BLOCKS * ROUNDS, warmup_rounds=WARMUP)


@pytest.mark.parametrize("cameras", CAMERAS)
def test_round_trips_side_by_side(benchmark, capsys, cameras: int) -> None:
    """All ways in alternating blocks; prints p50, p99, p99.9 and max in µs."""
    samples: dict[str, list[float]] = {name: [] for name in WAYS}
    with ExitStack() as stack:
        trips = {name: stack.enter_context(way(name, cameras)) for name in WAYS}

        def block() -> None:
            for name, trip in trips.items():
                for number in range(WARMUP + ROUNDS):
                    began_ns = time.perf_counter_ns()
                    trip()
                    if number >= WARMUP:
                        samples[name].append((time.perf_counter_ns() - began_ns) / 1000)

        benchmark.pedantic(block, rounds=BLOCKS)
    arrays = {name: np.array(values) for name, values in samples.items()}
    with capsys.disabled():
        print(f"\nround trip, {cameras} x 480x640x3, µs")
        print(f"{'':12}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'count':>9}")
        for name, values in arrays.items():
            print(row(name, values))
        ratio = np.median(arrays["bare pyzmq"]) / np.median(arrays["shm"])
        print(f"shm is {ratio:.1f} times as fast as bare pyzmq over TCP (medians, this run)")
