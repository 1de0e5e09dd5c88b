"""One way for some ticks on one core: ``Blocks`` runs each in a process of its own.

A block is a fork of a process that has imported everything already, so that blocks are equal and
short ones are possible. Without privileges means: as another user, with no capability left.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.pacing.peers import PEERS
from bench.pacing.ways import Way
from runtime.control.clock import MonotonicClock
from runtime.control.control_loop import ControlLoop
from runtime.control.realtime import UNPRIVILEGED, Realtime, RealtimeOptions, no_garbage_collection

NOBODY = 65534
SETTLE_S = 0.2
"""Ticks not counted: what starts up (locking memory, the first page faults) is no lateness."""


@dataclass(frozen=True)
class Block:
    """What one block measured.

    Attributes:
        lateness_us: (n,) when the step had returned − its deadline.
        drift_ticks: Ticks that the pace lost over all of them; see ``drift_ticks``.
        missed_ticks: Skipped by a loop that skips.
        refused: What real-time options could not be had.
    """

    lateness_us: NDArray[np.float64]
    drift_ticks: float = 0.0
    missed_ticks: int = 0
    refused: str = ""


def run_block(way: Way, hz: int, seconds: float, core: int) -> Block:
    """Run ``way`` alone for ``seconds`` at ``hz`` ticks per second on ``core``."""
    if way.kind == "cyclictest":
        return _cyclictest(way, hz, seconds, core)
    return _forked(way, hz, seconds, core)


def _forked(way: Way, hz: int, seconds: float, core: int) -> Block:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with open(writing, "wb") as pipe:  # noqa: PTH123 - a descriptor
                np.savez(pipe, **_measure(way, hz, seconds, core))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:  # noqa: PTH123
            said = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a block of {way} ended with status {status}")
    with np.load(io.BytesIO(said)) as file:
        return Block(
            file["lateness_us"],
            float(file["drift_ticks"]),
            int(file["missed_ticks"]),
            str(file["refused"]),
        )


def _measure(way: Way, hz: int, seconds: float, core: int) -> dict[str, object]:
    """In the child: become what the way is, and keep time."""
    os.sched_setaffinity(0, {core})
    if not way.priority and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    settle, ticks = round(SETTLE_S * hz), round(seconds * hz)

    began_ns = np.zeros(settle + ticks, np.int64)

    def step(tick: int) -> None:
        """Takes the time only: it is the pacing that is compared."""
        began_ns[tick] = time.monotonic_ns()

    missed, refused = 0, ""
    if way.kind == "ours":
        options = RealtimeOptions(way.priority) if way.priority else UNPRIVILEGED
        with Realtime(options) as realtime, no_garbage_collection():
            loop = ControlLoop(MonotonicClock(way.spin_ns), 1 / hz)
            loop.run(step, settle + ticks)
        lateness_us = loop.lateness_ns()[settle:] / 1e3
        missed, refused = loop.statistics().missed_ticks, ", ".join(realtime.refused)
    else:
        lateness_s = np.zeros(settle + ticks)
        PEERS[way.kind](step, settle + ticks, 1 / hz, lateness_s)
        lateness_us = lateness_s[settle:] * 1e6
    return {
        "lateness_us": lateness_us,
        "drift_ticks": drift_ticks(began_ns, hz),
        "missed_ticks": missed,
        "refused": refused,
    }


def drift_ticks(began_ns: NDArray[np.int64], hz: int) -> float:
    """Return how many ticks the pace lost: a slope over all of them, which one late tick is not.

    Args:
        began_ns: (n,) when each tick's step began; 0 for a tick that was skipped.
        hz: Ticks per second.
    """
    (ticks,) = np.nonzero(began_ns)
    behind = (began_ns[ticks] - began_ns[ticks[0]]) * hz / 1e9 - ticks
    return float(np.polyfit(ticks, behind, 1)[0]) * began_ns.size


_SAMPLE = re.compile(rb"^ *0: *(\d+): *(-?\d+)", re.MULTILINE)


def _cyclictest(way: Way, hz: int, seconds: float, core: int) -> Block:
    """The same wait in C: absolute clock_nanosleep, then the clock; every sample, in ns.

    Raises:
        RuntimeError: It gave other than what it was asked for; carries what it said.
    """
    settle, ticks = round(SETTLE_S * hz), round(seconds * hz)
    policy = ["-p", str(way.priority)] if way.priority else ["--policy=other"]
    command = ["cyclictest", "-t", "1", "-a", str(core), "-i", str(1_000_000 // hz), *policy]
    said = subprocess.run(
        [*command, "-m", "-l", str(settle + ticks), "-v", "-N"], capture_output=True, check=False
    )
    samples = np.array([int(ns) for _, ns in _SAMPLE.findall(said.stdout)], np.float64)
    if samples.size < 0.99 * (settle + ticks):
        with contextlib.suppress(UnicodeDecodeError):
            raise RuntimeError(
                f"cyclictest: got {samples.size} samples, expected {settle + ticks}: "
                f"{said.stderr.decode()[-500:]}"
            )
    return Block(samples[settle:] / 1e3)
