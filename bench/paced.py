"""Exchanges at a rate, as a control loop asks: open-loop, so that a stall is not hidden.

Every exchange has a time at which it is due, whatever became of the one before, and its latency
counts from there. A closed loop would wait with the next question until a stall is over, and count
it once; here everything that fell due meanwhile pays for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.contestant import Exchange
from bench.process import ServerProcess, cores

_EARLY_NS = 200_000
"""The client wakes this long before and watches the clock: its own wake-up is not the peer's."""
RT_PRIORITY = 50


def paced(exchange: Exchange, rate_hz: float, count: int) -> NDArray[np.float64]:
    """Microseconds from when each of ``count`` exchanges was due to when its reply was there."""
    clock, latencies = time.perf_counter_ns, np.empty(count)
    period_ns = 1e9 / rate_hz
    start = clock() + round(period_ns)
    for number in range(count):
        due = start + round(number * period_ns)
        if (left := due - clock() - _EARLY_NS) > 0:
            time.sleep(left / 1e9)
        while clock() < due:
            pass
        exchange()
        latencies[number] = (clock() - due) / 1000
    return latencies


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that computes without end on the server's core, at normal priority."""
    code = (
        f"import os; os.sched_setaffinity(0, {{{cores()[1]}}}); print(flush=True)\nwhile True: pass"
    )
    hog = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert hog.stdout is not None
        hog.stdout.readline()
        yield
    finally:
        hog.kill()
        hog.wait()
        hog.stdout.close()


@contextmanager
def realtime(server: ServerProcess) -> Iterator[None]:
    """Client and server under SCHED_FIFO.

    Raises:
        PermissionError: Neither root nor CAP_SYS_NICE.
    """
    parameters = os.sched_param(RT_PRIORITY)
    os.sched_setscheduler(server.pid, os.SCHED_FIFO, parameters)
    os.sched_setscheduler(0, os.SCHED_FIFO, parameters)
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def throttle() -> dict[str, Any]:
    """How much of each period real-time processes may have: beyond it the kernel stops them."""
    folder = Path("/proc/sys/kernel")
    names = ("sched_rt_period_us", "sched_rt_runtime_us")
    return {name: int((folder / name).read_text()) for name in names}


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process so far, in nanoseconds' resolution."""
    spent_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        spent_ns += int((task / "schedstat").read_text().split()[0])
    return spent_ns / 1e9
