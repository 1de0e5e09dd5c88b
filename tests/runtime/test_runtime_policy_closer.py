"""A replaced policy is closed in a thread of its own, never in the serving thread."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import pytest

from runtime.server.model_reload import ModelReloader
from runtime.server.policy_closer import PolicyCloser
from tests.runtime.batch_policy import BatchPolicy
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import ToyPolicy, observation

PATIENCE_S = 20.0
CLOSER = "policy closer"


class SlowToClose(BatchPolicy):
    """``close`` takes until ``may_close`` is set; ``threads`` has the name of its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.closing, self.may_close = threading.Event(), threading.Event()
        self.threads: list[str] = []

    def close(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.closing.set()
        self.may_close.wait(PATIENCE_S)
        super().close()


@contextlib.contextmanager
def closing(policy: SlowToClose) -> Iterator[None]:
    """A block during which the policy is being closed."""
    assert policy.closing.wait(PATIENCE_S)
    try:
        assert policy.closed == 0
        yield
        assert policy.closed == 0
    finally:
        policy.may_close.set()


@pytest.mark.parametrize("by", ["swap", "a load"])
def test_requests_are_answered_while_the_old_policy_is_closed(by: str) -> None:
    old = SlowToClose()
    with serving(old) as server, connect(server) as client:
        client.infer(observation(1))
        if by == "swap":
            server.call_in_serving_thread(lambda: server.swap(BatchPolicy(shift=100)))
        else:
            reloader = ModelReloader(
                lambda name: BatchPolicy(shift=100),
                None,
                check=server.check_successor,
                swap=server.swap,
                call_in_serving_thread=server.call_in_serving_thread,
                report_device_lost=server.report_device_lost,
            )
            reloader.start("another")
        with closing(old):
            for _ in range(20):
                assert client.infer(observation(1), timeout_s=PATIENCE_S / 2).actions[0, 0] == 101
            if by == "a load":
                assert reloader.wait(PATIENCE_S).state == "serving"
    assert old.closed == 1
    assert old.threads == [CLOSER]


def test_forks_of_a_replaced_policy_are_closed_before_it_in_the_same_thread() -> None:
    closed: list[tuple[str, str]] = []

    class Named(ToyPolicy):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def fork(self) -> Named:
            return Named(f"fork of {self.name}")

        def close(self) -> None:
            closed.append((self.name, threading.current_thread().name))

    with serving(Named("old")) as server, connect(server) as one, connect(server) as two:
        for client in (one, two):
            client.infer(observation())
        server.call_in_serving_thread(lambda: server.swap(Named("new")))
        closed.clear()  # what ``swap`` made to find out whether the new one can be forked
        one.reset()
        assert one.infer(observation()).actions[0, 0] == 1
        assert two.infer(observation()).actions[0, 0] == 2
        assert ("old", CLOSER) not in closed
        two.close()
        one.infer(observation())
    # Two threads append; only the order within each of them is certain.
    assert [name for name, thread in closed if thread == CLOSER] == ["fork of old"] * 2 + ["old"]
    assert [name for name, thread in closed if thread != CLOSER] == ["fork of new"]


def test_a_policy_that_fails_to_close_is_logged_and_the_next_one_is_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(BatchPolicy):
        def close(self) -> None:
            raise RuntimeError("no way to close this")

    second = BatchPolicy()
    with serving(Failing()) as server:
        for policy in (second, BatchPolicy()):
            server.call_in_serving_thread(lambda: server.swap(policy))  # noqa: B023
    assert second.closed == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "a policy failed to close"
    assert "no way to close this" in str(record.exc_info)


def test_a_server_that_ends_waits_for_a_bounded_time(caplog: pytest.LogCaptureFixture) -> None:
    policy, closer = SlowToClose(), PolicyCloser()
    closer.close(5.0)
    closer.add(policy)
    with closing(policy):
        closer.close(0.05)
        closer.close(5.0)
    assert "a replaced policy is still being closed after 0.05 s" in caplog.text


def test_only_a_server_whose_model_was_replaced_has_a_closing_thread() -> None:
    before = set(threading.enumerate())

    def closers() -> list[threading.Thread]:
        return [one for one in set(threading.enumerate()) - before if one.name == CLOSER]

    with serving(ToyPolicy()) as server:
        for _ in range(2):
            with connect(server) as client:
                client.infer(observation())
        assert not closers()
        for _ in range(2):
            server.call_in_serving_thread(lambda: server.swap(ToyPolicy()))
            assert len(closers()) == 1
    assert not closers()
