"""The accounting of requests: each is answered, passed over, failed, late or still under way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.errors import InferenceError
from policies.types import STAGES, ActionChunk
from runtime.client.requests import PendingRequests, with_stages
from runtime.protocol.messages import SERVER_STAGES, encode_error
from transport.channel import Kind

BOUND = 2


class Answer:
    def __init__(self, kind: Kind, request_id: int) -> None:
        self.kind, self.request_id = kind, request_id
        self.body = encode_error(InferenceError("broken")) if kind is Kind.ERROR else b""


class Accounting(RuleBasedStateMachine):
    """Against a naive list: (id, wanted) of what was published and not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = PendingRequests(BOUND)
        self.asked: list[tuple[int, bool]] = []
        self.begun = self.cancelled = 0
        self.given = self.late = self.failed = self.passed = 0

    @rule()
    def ask(self) -> None:
        self.requests.supersede()
        request = self.requests.begin(0, 0)
        self.begun += 1
        assert self.requests.waiting is request

    @precondition(lambda self: self.requests.may_publish)
    @rule()
    def publish(self) -> None:
        request = self.requests.waiting
        self.asked.append((request.id, True))
        self.requests.published(request)
        assert self.requests.waiting is None

    @rule()
    def cancel(self) -> None:
        self.requests.cancel()
        self.asked = [(number, False) for number, _ in self.asked]

    @precondition(lambda self: self.asked)
    @rule(kind=st.sampled_from([Kind.DATA, Kind.ERROR, Kind.SUPERSEDED]), data=st.data())
    def hear(self, kind: Kind, data) -> None:
        number, wanted = data.draw(st.sampled_from(self.asked))
        answer = Answer(kind, number)
        if wanted and kind is Kind.ERROR:
            with pytest.raises(InferenceError, match="broken"):
                self.requests.settle(answer)
            self.failed += 1
        else:
            request = self.requests.settle(answer)
            assert (request is not None) == (wanted and kind is Kind.DATA)
            self.given += request is not None
            self.passed += wanted and kind is Kind.SUPERSEDED
            self.late += not wanted
        self.asked = [(n, w) for n, w in self.asked if n != number and (w or n > number)]

    @rule()
    def hear_of_nothing(self) -> None:
        assert self.requests.settle(Answer(Kind.DATA, 10**9)) is None
        self.late += 1
        self.asked = [(n, w) for n, w in self.asked if w]

    @rule()
    def lose_the_session(self) -> None:
        if self.requests.waiting is not None:
            self.begun -= 1
        self.requests.forget()
        self.asked = []

    @invariant()
    def the_bound_holds(self) -> None:
        wanted = sum(wanted for _, wanted in self.asked)
        assert wanted <= BOUND
        waits = self.requests.waiting is not None
        assert self.requests.may_publish == (waits and wanted < BOUND)

    @invariant()
    def nothing_is_lost_without_a_word(self) -> None:
        counts = self.requests.statistics()
        waits = self.requests.waiting is not None
        assert (counts.failures, counts.dropped_late) == (self.failed, self.late)
        assert counts.requests + counts.superseded - self.passed + waits == self.begun


TestAccounting = Accounting.TestCase


def test_ids_rise_across_sessions() -> None:
    requests = PendingRequests(1)
    first = requests.begin(0, 0).id
    requests.forget()
    assert requests.begin(0, 0).id > first


def test_the_stages_add_up_even_where_the_server_was_faster_than_the_call() -> None:
    requests = PendingRequests(1)
    request = requests.begin(100, 0)
    request.packed_ns, request.published_ns = 150, 900
    theirs = dict(zip(SERVER_STAGES, (10, 20, 300, 40), strict=True))
    chunk = ActionChunk(np.zeros((1, 1), np.float32), stages_ns=theirs)
    stages = with_stages(chunk, request, received_ns=1000).stages_ns
    assert list(stages) == list(STAGES)
    assert sum(stages.values()) - stages["unpack"] == 1000 - 100
    assert min(stages.values()) >= 0
    assert stages["publish"] == 480
