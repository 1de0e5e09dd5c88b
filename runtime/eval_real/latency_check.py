"""Compares the server's latency with what the checkpoint's execution was measured to hold for.

Done before anything moves, with observations of the right shapes that no robot made.
"""

from __future__ import annotations

import time

from policies.errors import PolicyError
from runtime.client.policy_client import PolicyClient
from runtime.control.strategy_selection import latency_warning
from runtime.errors import RequestTimeout
from runtime.eval_real.run_config import RunConfig
from runtime.latency_stats import Percentiles
from runtime.server.warmup import synthetic_observation

REQUESTS = 10
"""Requests measured, after one that opens the session."""


def latency_lines(config: RunConfig) -> list[str]:
    """Measure the latency of ``config``'s server; return the lines to print.

    None are returned, and nothing is measured, where the checkpoint states no latency for the
    execution that is used. A policy that refuses the observations is not measured either.

    Raises:
        ServerLost, TransportError: The server is gone, or refuses the session.
    """
    if config.max_latency_ms is None:
        return []
    options = config.connection.keywords()
    with PolicyClient(config.address, kind="robot", name="latency check", **options) as client:
        try:
            measured = measure_latency(client)
        except (PolicyError, RequestTimeout) as error:
            return [f"latency      not measured: {error}"]
    warning = latency_warning(config.execution, 1e3 * measured.p50)
    return [
        f"latency      {measured.in_ms()}",
        *([] if warning is None else [f"warning: {warning}"]),
    ]


def measure_latency(client: PolicyClient) -> Percentiles:
    """Return how long ``REQUESTS`` requests take, from an observation until its chunk is there.

    Raises:
        PolicyError, RequestTimeout, ServerLost: As ``PolicyClient.infer``.
    """
    obs = synthetic_observation(client.contract)
    client.infer(obs)
    durations_s = []
    for _ in range(REQUESTS):
        began_s = time.monotonic()
        client.infer(obs)
        durations_s.append(time.monotonic() - began_s)
    return Percentiles.of(durations_s)
