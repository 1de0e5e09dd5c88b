"""A listener and a session on it, for the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from contracts.channel import PATIENCE_S, Pair
from contracts.frames import CHUNK, OBSERVATION

from transport.dialer import Dialer
from transport.handshake_messages import Welcome
from transport.server.listener import Listener
from transport.server.listener_records import ServerSession


def make_listener(**changes: Any) -> Listener:
    settings: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "describe": lambda: {"serves": "tests"},
        "accept": lambda hello: Welcome(CHUNK, {"limit": 2}),
    }
    return Listener(**{**settings, **changes})


@contextmanager
def pumped(
    listener: Listener, serve: Callable[[ServerSession], None] = lambda session: None
) -> Iterator[None]:
    """Run the listener in a thread; call ``serve`` with every session that ``wait`` returns."""
    stop = threading.Event()
    faults: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                for session in listener.wait(None):
                    serve(session)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        listener.wake()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if faults:
        raise faults[0]


@contextmanager
def connected(transport: str) -> Iterator[Pair]:
    """Both ends of a session after a real handshake; the listener no longer runs."""
    with ExitStack() as stack:
        listener = stack.enter_context(make_listener())
        dialer = stack.enter_context(Dialer("127.0.0.1", listener.port, timeout_s=PATIENCE_S))
        with pumped(listener):
            client, welcome = dialer.open(OBSERVATION, client="test", transport=transport)
        stack.callback(client.close)
        assert welcome.schema == CHUNK
        (session,) = listener.sessions.values()
        stack.callback(session.channel.close)
        assert client.transport == session.channel.transport == transport
        yield Pair(client, session.channel)
