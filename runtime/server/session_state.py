"""The server's state of one session: its policy, declared demand, counts and latencies."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.types import Policy
from runtime.protocol import image_codec
from runtime.server.admission import Demand
from runtime.server.rate_limiter import TokenBucket
from runtime.server.scheduler import NEVER, QueuedRequest
from transport.channel import Message
from transport.server.listener_records import ServerSession

WINDOW = 1000
"""Latencies remembered per session."""
OUTCOMES = ("answered", "failed", "superseded", "late")


@dataclass(slots=True, eq=False)
class SessionState:
    """The server's state of one session; times are ns of the monotonic clock.

    Attributes:
        session: The transport's session.
        policy: The session's own fork, or the policy that all sessions share.
        owns_policy: Whether ``policy`` is its own fork, closed with the session.
        read: Reads its messages into observations.
        demand: What the client declared.
        exact: Its replies must be bit-equal to replies that are computed alone.
        rate_limiter: Limits its requests per second; None for no limit.
        trace_key: Identifies its requests in the traces of both processes.
        generation: The generation of the model that ``policy`` belongs to.
        began_ns: When it was opened.
        last_message_ns: When its last message arrived.
        counts: Requests by ``OUTCOMES``.
        batches: Replies by the number of observations computed together.
        latency_ns: (time of the reply, duration since the request's arrival) of the last replies.
    """

    session: ServerSession
    policy: Policy
    owns_policy: bool
    read: image_codec.ObservationReader
    demand: Demand
    exact: bool
    rate_limiter: TokenBucket | None = None
    trace_key: int = 0
    generation: int = 0
    began_ns: int = field(default_factory=time.monotonic_ns)
    last_message_ns: int = field(default_factory=time.monotonic_ns)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    batches: Counter[int] = field(default_factory=Counter)
    latency_ns: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def budget_ns(self) -> int:
        """How soon after a request the client needs the reply, ns; ``NEVER`` if not declared."""
        deadline_ms = self.demand.deadline_ms
        return round(deadline_ms * 1e6) if deadline_ms < 1e9 else NEVER

    def request(self, message: Message, *, alone: bool) -> QueuedRequest:
        """Make a request of a message that has just arrived, and note its arrival.

        Args:
            alone: As ``QueuedRequest.alone``.
        """
        now = self.last_message_ns = time.monotonic_ns()
        deadline_ns = now + message.budget_ns if message.budget_ns else NEVER
        due_ns = NEVER if self.budget_ns == NEVER else now + self.budget_ns
        return QueuedRequest(self.session.id, now, deadline_ns, alone, message, due_ns)

    def count_reply(self, request: QueuedRequest, batch: int) -> None:
        """Count a reply that has just been sent, computed with ``batch`` observations in all."""
        now = time.monotonic_ns()
        self.counts["answered"] += 1
        self.batches[batch] += 1
        self.latency_ns.append((now, now - request.arrived_ns))

    def status(self) -> dict[str, Any]:
        """Declarations, counts and latencies, as JSON values."""
        now = time.monotonic_ns()
        recent = list(self.latency_ns)
        times = np.array([at for at, _ in recent], np.int64)
        spans = np.array([span for _, span in recent], np.float64) / 1e6
        p50, p99 = np.percentile(spans, (50, 99)) if len(spans) else (0.0, 0.0)
        return {
            "kind": self.demand.kind,
            "declared_rate_hz": self.demand.rate_hz or None,
            "declared_deadline_ms": None if self.budget_ns == NEVER else self.demand.deadline_ms,
            "age_s": round((now - self.began_ns) / 1e9, 1),
            "idle_s": round((now - self.last_message_ns) / 1e9, 1),
            "rate_hz": round(float((times > now - 5_000_000_000).sum()) / 5, 2),
            "latency_ms": {"p50": round(float(p50), 3), "p99": round(float(p99), 3)},
            "batches": {str(size): count for size, count in sorted(self.batches.items())},
            **self.counts,
        }
