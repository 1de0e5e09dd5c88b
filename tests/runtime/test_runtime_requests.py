"""Bookkeeping of requests: each one ends in a reply, an error, or is superseded or dropped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.errors import InferenceError
from policies.types import STAGES, ActionChunk
from runtime.client.pending_requests import PendingRequests, with_stages
from runtime.protocol.messages import SERVER_STAGES, encode_error
from transport.channel import Kind

MAX_IN_FLIGHT = 2


class Reply:
    def __init__(self, kind: Kind, request_id: int) -> None:
        self.kind, self.request_id = kind, request_id
        self.body = encode_error(InferenceError("broken")) if kind is Kind.ERROR else b""


class Accounting(RuleBasedStateMachine):
    """Compared with a plain list: (id, wanted) of the requests in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = PendingRequests(MAX_IN_FLIGHT)
        self.in_flight: list[tuple[int, bool]] = []
        self.begun = self.cancelled = 0
        self.replies = self.late = self.failed = self.superseded = 0

    @rule()
    def submit(self) -> None:
        self.requests.supersede_waiting()
        request = self.requests.start(0, 0)
        self.begun += 1
        assert self.requests.waiting is request

    @precondition(lambda self: self.requests.may_publish)
    @rule()
    def publish(self) -> None:
        request = self.requests.waiting
        self.in_flight.append((request.id, True))
        self.requests.mark_published(request)
        assert self.requests.waiting is None

    @rule()
    def cancel(self) -> None:
        self.requests.cancel()
        self.in_flight = [(number, False) for number, _ in self.in_flight]

    @precondition(lambda self: self.in_flight)
    @rule(kind=st.sampled_from([Kind.DATA, Kind.ERROR, Kind.SUPERSEDED]), data=st.data())
    def receive(self, kind: Kind, data) -> None:
        number, wanted = data.draw(st.sampled_from(self.in_flight))
        reply = Reply(kind, number)
        if wanted and kind is Kind.ERROR:
            with pytest.raises(InferenceError, match="broken"):
                self.requests.complete(reply)
            self.failed += 1
        else:
            request = self.requests.complete(reply)
            assert (request is not None) == (wanted and kind is Kind.DATA)
            self.replies += request is not None
            self.superseded += wanted and kind is Kind.SUPERSEDED
            self.late += not wanted
        self.in_flight = [(n, w) for n, w in self.in_flight if n != number and (w or n > number)]

    @rule()
    def receive_an_unknown_id(self) -> None:
        assert self.requests.complete(Reply(Kind.DATA, 10**9)) is None
        self.late += 1
        self.in_flight = [(n, w) for n, w in self.in_flight if w]

    @rule()
    def lose_the_session(self) -> None:
        if self.requests.waiting is not None:
            self.begun -= 1
        self.requests.clear()
        self.in_flight = []

    @invariant()
    def max_in_flight_holds(self) -> None:
        wanted = sum(wanted for _, wanted in self.in_flight)
        assert wanted <= MAX_IN_FLIGHT
        waits = self.requests.waiting is not None
        assert self.requests.may_publish == (waits and wanted < MAX_IN_FLIGHT)

    @invariant()
    def every_request_is_counted(self) -> None:
        counts = self.requests.statistics()
        waits = self.requests.waiting is not None
        assert (counts.failures, counts.dropped_late) == (self.failed, self.late)
        assert counts.requests + counts.superseded - self.superseded + waits == self.begun


TestAccounting = Accounting.TestCase


def test_ids_increase_across_sessions() -> None:
    requests = PendingRequests(1)
    first = requests.start(0, 0).id
    requests.clear()
    assert requests.start(0, 0).id > first


def test_stages_add_up_if_the_server_starts_before_publish_returns() -> None:
    requests = PendingRequests(1)
    request = requests.start(100, 0)
    request.packed_ns, request.published_ns = 150, 900
    server_stages = dict(zip(SERVER_STAGES, (10, 20, 300, 40), strict=True))
    chunk = ActionChunk(np.zeros((1, 1), np.float32), stages_ns=server_stages)
    stages = with_stages(chunk, request, received_ns=1000).stages_ns
    assert list(stages) == list(STAGES)
    assert sum(stages.values()) - stages["unpack"] == 1000 - 100
    assert min(stages.values()) >= 0
    assert stages["publish"] == 480
