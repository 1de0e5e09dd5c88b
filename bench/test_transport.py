"""Every way to hand over an observation and get a chunk back, side by side, in this run.

Public interfaces, Python on both sides, every byte touched on both sides and verified to be the
same; one process per core. ``docs/transport.md`` says what is measured and why so; the tables and
the budgets are printed at the end, the figures land in ``bench/results/``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest

from bench.contest import Contest, contest
from bench.contestant import HOMES, payloads_of
from bench.paced import busy_core, cpu_seconds, paced, realtime, throttle
from bench.records import Records

pytestmark = pytest.mark.timeout(600)

SPEECH = {"64B": "64 B", "1": "1 image", "2": "2 images", "4": "4 images"}
NAMES = {
    payload: tuple(
        name
        for name in HOMES
        if payload in payloads_of(name) and (payload == "64B" or not name.startswith("ring"))
    )
    for payload in SPEECH
}
COLLECTOR_OFF = ("floor", "ring", "ring fused", "shm spin", "shm default", "shm block", "zmq")
COLLECTOR_OFF += ("zmq loaned", "policy shm", "iceoryx2", "pyzmq tcp", "pyzmq tcp owned")
PACED = ("shm default", "shm block", "policy shm", "zmq", "policy zmq", "pyzmq tcp", "pipe")
PACED += ("pickle tcp", "websocket", "grpc", "iceoryx2", "zenoh shm")
BLOCKS, BLOCK, BLOCK_S = 10, 150, 0.12
PEDANTIC_ROUNDS, PEDANTIC_S = 100, 0.3
STEADY_HZ, STEADY_COUNT = 50, 10_000
IDLE_S = 5.0


@pytest.fixture(
    scope="module",
    params=[(payload, gc_on) for payload in SPEECH for gc_on in (True, False)],
    ids=lambda param: f"{SPEECH[param[0]].replace(' ', '-')}-gc-{'on' if param[1] else 'off'}",
)
def opened(request: pytest.FixtureRequest, records: Records) -> Iterator[Contest]:
    payload, gc_on = request.param
    group = SPEECH[payload] + ("" if gc_on else ", collector off")
    names = [name for name in NAMES[payload] if gc_on or name in COLLECTOR_OFF]
    with contest(names, payload, gc_on=gc_on) as running:
        running.group = group
        records.absent |= {f"{group}/{name}": why for name, why in running.absent.items()}
        yield running


@pytest.mark.parametrize("name", HOMES)
def test_exchange(opened: Contest, name: str, benchmark) -> None:
    """Each by itself, for pytest-benchmark's table and history."""
    if name in opened.absent:
        pytest.skip(f"absent: {opened.absent[name]}")
    if name not in opened.pairs:
        pytest.skip("not in this line-up")
    benchmark.group = opened.group
    with opened.turn(name) as exchange:
        began_s = time.perf_counter()
        exchange()
        each_s = time.perf_counter() - began_s
        rounds = max(5, min(PEDANTIC_ROUNDS, round(PEDANTIC_S / each_s)))
        benchmark.pedantic(exchange, rounds=rounds, iterations=1)


def test_side_by_side(opened: Contest, records: Records) -> None:
    """In turns: what ratios are taken from."""
    samples = opened.rounds(blocks=BLOCKS, block=BLOCK, block_s=BLOCK_S)
    records.absent |= {f"{opened.group}/{name}": why for name, why in opened.absent.items()}
    records.add(opened.group, samples)
    records.save("transport", opened.group)
    ours = {name for name in NAMES[opened.payload.name] if HOMES[name].startswith("bench.ours")}
    assert not ours & opened.absent.keys(), "what is ours must not be stuck"


@pytest.mark.parametrize(
    ("rate_hz", "count", "busy"),
    [(50, 100, False), (500, 500, False), (50, 100, True)],
    ids=["50-Hz", "500-Hz", "50-Hz-other-core-busy"],
)
def test_paced(rate_hz: int, count: int, busy: bool, records: Records) -> None:
    """One image, open-loop arrivals, in two turns each."""
    group = f"1 image at {rate_hz} Hz" + (", the server's core busy" if busy else "")
    with contest(PACED, "1") as running, busy_core() if busy else nullcontext():
        samples: dict[str, list[np.ndarray]] = {name: [] for name in running.pairs}
        for _ in range(2):
            for name, turns in samples.items():
                with running.turn(name) as exchange:
                    turns.append(paced(exchange, rate_hz, count))
        records.absent |= {f"{group}/{name}": why for name, why in running.absent.items()}
        records.add(group, {name: np.concatenate(turns) for name, turns in samples.items()})
        records.save("transport", group)


def test_idle_server(records: Records) -> None:
    """Processor time of a policy server whose sessions say nothing."""
    names = ("policy shm 7 idle", "policy zmq")
    measured = []
    with contest(names, "1") as running:
        for name, pair in running.pairs.items():
            before = cpu_seconds(pair.server.pid)
            time.sleep(IDLE_S)
            share = (cpu_seconds(pair.server.pid) - before) / IDLE_S
            records.values[f"{name}: idle, % of a core"] = 100 * share
            measured.append(name)
    assert measured == list(names)
    records.save("transport", "idle")


@pytest.mark.timeout(900)
def test_steady_50_hz(pytestconfig: pytest.Config, records: Records) -> None:
    """The tail that a control loop feels, under SCHED_FIFO: 200 s, with ``--long``."""
    if not pytestconfig.getoption("--long"):
        pytest.skip("takes 200 s: --long")
    group = f"steady {STEADY_HZ} Hz"
    with contest(("shm default",), "1") as running:
        pair = running.pairs["shm default"]
        limit_s = 2 * STEADY_COUNT / STEADY_HZ
        turn = running.turn("shm default", limit_s=limit_s)
        with turn as exchange, realtime(pair.server):
            latencies = paced(exchange, STEADY_HZ, STEADY_COUNT)
    records.facts[group] = {"scheduler": "SCHED_FIFO", **throttle()}
    records.add(group, {"shm default": latencies})
    records.save("transport", group)
