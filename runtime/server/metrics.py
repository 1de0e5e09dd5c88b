"""Prometheus metrics of a server, computed at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.server.session_state import OUTCOMES
from transport.address import format_address
from transport.errors import AddressInUse

STATUS_TIMEOUT_S = 2.0
"""How long a scrape waits for the serving thread, which may be inferring."""


class ServerCollector(Collector):
    """Converts ``PolicyServer.status`` into metrics at every scrape.

    Args:
        status: Returns the status; raises ``TimeoutError`` if the serving thread does not reply.
    """

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """No metrics, so that registration does not ask the server for its status."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of one scrape; only ``metronome_up`` = 0 if the status timed out."""
        up = GaugeMetricFamily("metronome_up", "Whether the serving thread answered")
        try:
            status = self._status()
        except TimeoutError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from _server_metrics(status)
        yield from _session_metrics(status["sessions"])


def _server_metrics(status: dict[str, Any]) -> Iterator[Metric]:
    policy, counts = status["policy"], status["counts"]
    yield _gauge("metronome_uptime_seconds", "Since the server was made", status["up_s"])
    names = ("checkpoint", "device", "engine", "precision")
    info = GaugeMetricFamily(
        "metronome_policy_id", "One more each time it is replaced", None, names
    )
    info.add_metric([str(policy[name]) for name in names], policy["id"])
    yield info
    requests = CounterMetricFamily(
        "metronome_requests", "By what became of them", None, ["outcome"]
    )
    # The count ``failed`` includes ``late`` and ``too_many``.
    failed = counts["failed"] - counts["late"] - counts["too_many"]
    for outcome in (*OUTCOMES, "too_many"):
        requests.add_metric([outcome], failed if outcome == "failed" else counts[outcome])
    yield requests
    for name, text in (
        ("resets", "Episodes begun"),
        ("refused", "Clients that were not let in"),
        ("batches", "Inferences of more than one observation"),
        ("swaps", "How often the policy was replaced"),
    ):
        yield CounterMetricFamily(f"metronome_{name}", text, counts[name])
    cost = GaugeMetricFamily(
        "metronome_inference_seconds", "Of the newest inferences", None, ["batch", "figure"]
    )
    for batch, figures in status["costs_ms"].items():
        for figure, value in figures.items():
            cost.add_metric([batch, figure], value / 1e3)
    yield cost


def _session_metrics(sessions: list[dict[str, Any]]) -> Iterator[Metric]:
    yield _gauge("metronome_sessions", "Open now", len(sessions))
    label_names = ["session", "client", "kind", "transport"]
    latency = GaugeMetricFamily(
        "metronome_session_latency_seconds",
        "From a request's arrival to its answer, of the last 1000",
        None,
        [*label_names, "quantile"],
    )
    rate = GaugeMetricFamily(
        "metronome_session_rate_hz", "Answers per second, of the last 5 s", None, label_names
    )
    requests = CounterMetricFamily(
        "metronome_session_requests", "By what became of them", None, [*label_names, "outcome"]
    )
    for session in sessions:
        labels = [str(session[name]) for name in ("id", "client", "kind", "transport")]
        rate.add_metric(labels, session["rate_hz"])
        for quantile, figure in (("0.5", "p50"), ("0.99", "p99")):
            latency.add_metric([*labels, quantile], session["latency_ms"][figure] / 1e3)
        for outcome in OUTCOMES:
            requests.add_metric([*labels, outcome], session[outcome])
    yield from (latency, rate, requests)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def serve_metrics(status: Callable[[], dict[str, Any]], host: str, port: int) -> Callable[[], None]:
    """Serve ``http://HOST:PORT/metrics``; return the function that stops it.

    Args:
        status: As for ``ServerCollector``; called in the HTTP server's threads.

    Raises:
        AddressInUse: The address cannot be listened on.
    """
    registry = CollectorRegistry()
    registry.register(ServerCollector(status))
    try:
        http, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise AddressInUse(
            f"--metrics_port: {format_address(host, port)}: {error.strerror}"
        ) from error

    def stop() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    return stop
