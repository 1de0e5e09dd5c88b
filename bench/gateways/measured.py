"""What the benchmarks of the gateways share: a gateway of its own process, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from transport.child_process import ChildProcess

READY_WITHIN_S, CLOSE_S = 60.0, 5.0


def gateway_address(stack: ExitStack, protocol: str, server: str) -> str:
    """The address of a gateway to ``server``, in its own process until ``stack`` ends."""
    flags = [protocol, "--server", server, "--port", "0", "--stop_with_stdin"]
    child = ChildProcess("runtime.gateway", flags, name="the gateway", events_flag="--ready_fd")
    stack.callback(child.close, CLOSE_S)
    return str(child.wait_ready(READY_WITHIN_S)["address"])


def report(samples_us: Mapping[str, np.ndarray], bound: float) -> bool:
    """Print percentiles and the ratio of ours, the first, to theirs; whether it is in the bound."""
    for name, spans in samples_us.items():
        p50, p99 = np.percentile(spans, (50, 99))
        print(f"{name:16} p50 {p50:9.0f} µs  p99 {p99:9.0f} µs  of {len(spans)}")
    (our_name, ours), (their_name, theirs) = samples_us.items()
    added_us = float(np.median(ours) - np.median(theirs))
    ratio = float(np.median(ours) / np.median(theirs))
    print(f"{our_name} ÷ {their_name} {ratio:.4f}, bound {bound}; {added_us:+.0f} µs")
    return ratio <= bound
