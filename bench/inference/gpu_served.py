"""Steps with a server on the GPU and a client over shared memory; needs pyzmq and posix_ipc.

Run by ``bench.inference.gpu`` as part ``served``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.inference.nets import checkpoint_of
from bench.inference.steps import Say, StepFailed, StepFunction, main

if TYPE_CHECKING:
    from types import ModuleType

NEEDED = {"zmq": "pyzmq", "posix_ipc": "posix_ipc", "numba": "numba"}
REQUESTS, PACE_HZ, SWAPS = 1000, 50.0, 5
READY_WITHIN_S = 120.0


def paced(_say: Say, arguments: Sequence[str]) -> Mapping[str, Any]:
    """Requests at ``PACE_HZ``, and the inference in them. Arguments: network, device."""
    served = _served()
    from runtime.client import PolicyClient
    from runtime.server.server_process import ServerProcess

    net, device = arguments
    with (
        checkpoint_of(net) as folder,
        ServerProcess(("-m", str(folder), "--device", device), ready_within_s=READY_WITHIN_S) as s,
        PolicyClient(s.address, transport="shm") as client,
    ):
        info = client.info
        found = served.paced(client, REQUESTS, PACE_HZ)
    around_s = found.request_s - found.infer_s
    rows = {
        "request_s": _percentiles(found.request_s),
        "infer_s": _percentiles(found.infer_s),
        "request less inference, s": _percentiles(around_s),
        "late_s": _percentiles(found.late_s),
    }
    for name, row in rows.items():
        figures = ", ".join(f"{each} {1e3 * s:.3f}" for each, s in row.items() if "/" not in each)
        print(f"  {name:28}{figures} ms, p99 / p50 {row['p99 / p50']:.2f}", flush=True)
    said = {"engine": info.engine, "precision": info.precision, "pace_hz": PACE_HZ}
    return {**said, "count": REQUESTS, **rows}


def swaps(_say: Say, arguments: Sequence[str]) -> Mapping[str, Any]:
    """Hot swaps under requests, and the longest time without an answer. Arguments: as ``paced``."""
    served = _served()
    from runtime.server.server_process import ServerProcess

    net, device = arguments
    with (
        checkpoint_of(net) as folder,
        ServerProcess(("-m", str(folder), "--device", device), ready_within_s=READY_WITHIN_S) as s,
    ):
        found = served.swaps(s, str(folder), count=SWAPS, pace_hz=PACE_HZ)
    record = asdict(found)
    print(f"  {record}", flush=True)
    return {**record, "ok_so_far": found.failed == 0 and len(found.took_s) == SWAPS}


def lost_device(_say: Say, arguments: Sequence[str]) -> Mapping[str, Any]:
    """A device that is lost in the middle of a request. Arguments: device."""
    served = _served()
    from runtime.server.server_process import ServerProcess

    [device] = arguments
    source = f"python:bench.lost_device:{device}"
    with ServerProcess(("-m", source), ready_within_s=READY_WITHIN_S) as server:
        found = served.lose_device(server)
    record = asdict(found)
    print(f"  {record}", flush=True)
    return {**record, "goal_s": served.ENDS_WITHIN_S, "ok_so_far": found.as_expected}


def missing() -> str:
    """Return which packages are missing, in words; empty where none is."""
    absent = []
    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            absent.append(f"{package} ({error})")
    return f"not installed: {', '.join(absent)}" if absent else ""


def _served() -> ModuleType:
    if words := missing():
        raise StepFailed(words)
    return importlib.import_module("bench.served")


def _percentiles(samples_s: NDArray[np.float64]) -> dict[str, float]:
    found = {f"p{each:g}": float(np.percentile(samples_s, each)) for each in (50, 99, 99.9)}
    return {**found, "max": float(samples_s.max()), "p99 / p50": found["p99"] / found["p50"]}


STEPS: Mapping[str, StepFunction] = {"paced": paced, "swaps": swaps, "lost_device": lost_device}

if __name__ == "__main__":
    raise SystemExit(main(STEPS, sys.argv[1:]))
