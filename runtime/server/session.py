"""What a server keeps of one session: its policy, what waits, and what became of the rest."""

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
from transport.server.sessions import ServerSession

WINDOW = 1000
"""Answers that the figures are of."""
OUTCOMES = ("answered", "failed", "superseded", "late")


@dataclass(slots=True, eq=False)
class SessionState:
    """The server's side of a session.

    Attributes:
        session: Whose; the transport's.
        policy: Its own, or the one all share.
        own: Whether it is its own, to be closed with the session.
        read: What turns its messages into observations.
        demand: What it said it wants.
        exact: Its answers must be bit-equal wherever they are computed.
        pace: How often it may ask; None for any.
        trace_key: For flows across processes.
        generation: Of the model that ``policy`` is of.
        counts: By ``OUTCOMES``.
        heard_ns: When it last sent something.
    """

    session: ServerSession
    policy: Policy
    own: bool
    read: image_codec.Read
    demand: Demand
    exact: bool
    pace: TokenBucket | None = None
    trace_key: int = 0
    generation: int = 0
    began_ns: int = field(default_factory=time.monotonic_ns)
    heard_ns: int = field(default_factory=time.monotonic_ns)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    batches: Counter[int] = field(default_factory=Counter)
    latency_ns: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def budget_ns(self) -> int:
        deadline_ms = self.demand.deadline_ms
        return round(deadline_ms * 1e6) if deadline_ms < 1e9 else NEVER

    def request(self, message: Message, *, alone: bool) -> QueuedRequest:
        """What came just now. Its budget is as the message says; 0 for none."""
        now = self.heard_ns = time.monotonic_ns()
        deadline_ns = now + message.budget_ns if message.budget_ns else NEVER
        due_ns = NEVER if self.budget_ns == NEVER else now + self.budget_ns
        return QueuedRequest(self.session.id, now, deadline_ns, alone, message, due_ns)

    def answered(self, request: QueuedRequest, batch: int) -> None:
        """Count an answer that has just been sent."""
        now = time.monotonic_ns()
        self.counts["answered"] += 1
        self.batches[batch] += 1
        self.latency_ns.append((now, now - request.arrived_ns))

    def status(self) -> dict[str, Any]:
        """For those who look; JSON values."""
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
            "idle_s": round((now - self.heard_ns) / 1e9, 1),
            "rate_hz": round(float((times > now - 5_000_000_000).sum()) / 5, 2),
            "latency_ms": {"p50": round(float(p50), 3), "p99": round(float(p99), 3)},
            "batches": {str(size): count for size, count in sorted(self.batches.items())},
            **self.counts,
        }
