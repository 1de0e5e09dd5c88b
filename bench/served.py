"""A server at a robot's pace: its requests, hot swaps under them, a device that is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bench.lost_device import TRIGGER
from policies.errors import PolicyError
from runtime.client import PolicyClient
from runtime.errors import RuntimeFault
from runtime.server.server_process import ServerProcess
from runtime.server.warmup import synthetic_observation
from runtime.tools import ctl

WARMUP = 50
ENDS_WITHIN_S = 2.0
"""Goal: a server whose device is lost has ended after so long."""
WAITED_S = 10.0
SWAP_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Requests:
    """Of each request, seconds.

    Attributes:
        request_s: From the call to the chunk.
        infer_s: Of the inference in it.
        late_s: By how much it was sent later than it was due.
    """

    request_s: NDArray[np.float64]
    infer_s: NDArray[np.float64]
    late_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Swaps:
    """Requests at a rate while policies are swapped.

    Attributes:
        took_s: Of each swap.
        calm_gap_s, worst_gap_s: Longest time between two answers, before the first swap and from
            then on.
        failed: Requests that ended in an error.
    """

    took_s: list[float]
    calm_gap_s: float
    worst_gap_s: float
    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class Lost:
    """What came of a request that cost the server its device.

    Attributes:
        status: Exit status of the server; None where it lives on.
        ended_s: From the request to the end of the server's process.
        error: What the client got.
        told_s: From the request to that.
    """

    status: int | None
    ended_s: float
    error: str
    told_s: float

    @property
    def as_expected(self) -> bool:
        """Whether the server ended in time with an error, and the client got one too."""
        return bool(self.status) and self.ended_s <= ENDS_WITHIN_S and bool(self.error)


def paced(client: PolicyClient, count: int, pace_hz: float) -> Requests:
    """``count`` requests at absolute deadlines, after some that are not counted."""
    obs = synthetic_observation(client.contract)
    for _ in range(WARMUP):
        client.infer(obs)
    period_ns = round(1e9 / pace_hz)
    request_s, infer_s, late_s = (np.empty(count) for _ in range(3))
    start_ns = time.monotonic_ns() + period_ns
    for number in range(count):
        due_ns = start_ns + number * period_ns
        sleep_until(due_ns)
        began_ns = time.monotonic_ns()
        chunk = client.infer(obs)
        request_s[number] = (time.monotonic_ns() - began_ns) / 1e9
        infer_s[number] = chunk.stages_ns["infer"] / 1e9
        late_s[number] = (began_ns - due_ns) / 1e9
    return Requests(request_s, infer_s, late_s)


def swaps(
    server: ServerProcess, checkpoint: str, *, count: int, pace_hz: float, calm_s: float = 3.0
) -> Swaps:
    """Have ``count`` checkpoints loaded into a server, one after the other, under requests.

    Raises:
        RuntimeError: A checkpoint was not loaded.
    """
    took_s: list[float] = []
    errors: list[BaseException] = []
    began, over = threading.Event(), threading.Event()

    def load() -> None:
        try:
            with ctl.dial(server.address, "", "") as dialer:
                time.sleep(calm_s)
                began.set()
                for _ in range(count):
                    state = ctl.load(dialer, checkpoint, SWAP_WITHIN_S)
                    if state["state"] != "serving":
                        raise RuntimeError(f"a hot swap failed: {state}")
                    took_s.append(state["took_s"])
                time.sleep(1.0)
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    answered_s: dict[bool, list[float]] = {False: [], True: []}
    failed, requests = 0, 0
    with PolicyClient(server.address, transport="shm") as client:
        obs = synthetic_observation(client.contract)
        for _ in range(WARMUP):
            client.infer(obs)
        thread = threading.Thread(target=load, name="hot swaps")
        thread.start()
        try:
            due_ns, period_ns = time.monotonic_ns(), round(1e9 / pace_hz)
            while not over.is_set():
                due_ns = max(due_ns + period_ns, time.monotonic_ns())
                sleep_until(due_ns)
                requests += 1
                try:
                    client.infer(obs, timeout_s=30.0)
                except (PolicyError, RuntimeFault):
                    failed += 1
                    continue
                answered_s[began.is_set()].append(time.monotonic())
        finally:
            thread.join()
    if errors:
        raise RuntimeError(f"hot swap: {errors[0]}") from errors[0]
    meanwhile_s = answered_s[False][-1:] + answered_s[True]
    return Swaps(took_s, _longest(answered_s[False]), _longest(meanwhile_s), requests, failed)


def lose_device(server: ServerProcess) -> Lost:
    """Send a server of ``bench.lost_device`` the observation that costs it its device."""
    with PolicyClient(server.address, transport="shm") as client:
        obs = synthetic_observation(client.contract)
        client.infer(obs)
        bad = replace(obs, state=np.full_like(obs.state, TRIGGER))
        error, began_s = "", time.monotonic()
        try:
            client.infer(bad, timeout_s=WAITED_S)
        except (PolicyError, RuntimeFault) as caught:
            error = f"{type(caught).__name__}: {caught}"
        told_s = time.monotonic() - began_s
        while server.alive and time.monotonic() - began_s < WAITED_S:
            time.sleep(0.005)
        return Lost(server.returncode, time.monotonic() - began_s, error, told_s)


def sleep_until(due_ns: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
    while (left_ns := due_ns - clock()) > 0:
        time.sleep(left_ns / 1e9)


def _longest(times_s: list[float]) -> float:
    return float(np.diff(times_s).max()) if len(times_s) > 1 else float("nan")
