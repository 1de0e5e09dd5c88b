"""A server's wait for all sessions: which sessions it returns, and when."""

from __future__ import annotations

import threading
import time

import pytest
from contracts.channel import PATIENCE_S
from contracts.frames import OBSERVATION
from transport_rig import make_listener, pumped

import transport.server.listener
from transport.dialer import Dialer
from transport.handshake_messages import NO_EPOCH, PROTOCOL_VERSION, Opcode, Peer


def test_wake_is_not_lost_between_two_polls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks once more whenever some time has passed: here, always."""
    monkeypatch.setattr(transport.server.listener, "_POLL_EVERY_S", 0.0)
    with make_listener() as listener:
        ended = threading.Event()

        def wait() -> None:
            listener.wait(None)
            ended.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        listener.wake()
        assert ended.wait(PATIENCE_S)
        waiting.join()


def test_wake_after_close_does_nothing() -> None:
    """A signal handler does not know whether the server has just ended."""
    with make_listener() as listener:
        pass
    listener.wake()


def test_session_is_returned_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    with (
        make_listener() as listener,
        Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S) as dialer,
        pumped(listener, lambda session: seen.append(session.id)),
    ):
        channel, _ = dialer.open(OBSERVATION, client="says nothing", transport="zmq")
        until = time.monotonic() + PATIENCE_S
        while not seen and time.monotonic() < until:
            time.sleep(0)
        assert seen == [1]
        assert [hello.client for hello in listener.hellos] == ["says nothing"]
        channel.close()


def test_control_messages_do_not_block_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many have arrived, after some time it looks at everything else again."""
    monkeypatch.setattr(transport.server.listener, "_CONTROL_BUDGET_S", 0.0)
    monkeypatch.setattr(transport.server.listener, "_POLL_EVERY_S", 0.0)
    with make_listener() as listener:
        message = b"nobody", PROTOCOL_VERSION, int(Opcode.DESCRIBE), NO_EPOCH, b"", Peer()
        listener._control.extend([message] * 3)
        for left in (2, 1, 0, 0):
            listener.wait(0.0)
            assert len(listener._control) == left
