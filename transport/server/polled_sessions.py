"""The shared-memory sessions that a server polls, instead of waiting for their eventfds.

Each session over shared memory is in one of two states:

* Waiting: its client writes to an eventfd, which is in the epoll. It costs nothing until then.
* Polled: its client publishes without a system call, and the server polls the memory.

A signal on the eventfd makes a session polled. A server that is about to block makes all of them
waiting. So a thousand idle sessions cost a busy one nothing, and a busy session needs no signals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transport.server.listener_records import ServerSession

if TYPE_CHECKING:
    from transport.shm.channel import ShmChannel


class PolledSessions:
    """The polled sessions of one listener."""

    def __init__(self) -> None:
        self._sessions: dict[int, tuple[ServerSession, ShmChannel]] = {}
        self._signalled = False

    def __bool__(self) -> bool:
        return bool(self._sessions)

    def add(self, session: ServerSession, channel: ShmChannel) -> None:
        """Poll ``session`` from now on; its client need not signal."""
        channel.finish_wait()
        self._sessions[session.id] = session, channel

    def add_signalled(self, session: ServerSession, channel: ShmChannel) -> None:
        """``add`` after a signal from the client: it has sent, or is about to send."""
        self.add(session, channel)
        self._signalled = True

    def take_signalled(self) -> bool:
        """Whether a client has signalled since the last call of this method."""
        signalled, self._signalled = self._signalled, False
        return signalled

    def discard(self, session: ServerSession) -> None:
        """Stop polling ``session``. Idempotent."""
        self._sessions.pop(session.id, None)

    def ready(self) -> list[ServerSession]:
        """The polled sessions with unread messages, and those whose client is gone."""
        return [
            session
            for session, channel in self._sessions.values()
            if channel.unread or channel.gone_reason is not None
        ]

    def spin(self, rounds: int) -> bool:
        """Poll all sessions for ``rounds`` rounds in total; whether one has an unread message."""
        each = max(1, rounds // max(1, len(self._sessions)))
        return any(channel.spin(each) for _, channel in self._sessions.values())

    def stop_polling(self) -> bool:
        """Have all clients signal; False if a message arrived first: then do not block."""
        for session, channel in list(self._sessions.values()):
            if not channel.prepare_to_wait():
                channel.finish_wait()
                return False
            del self._sessions[session.id]
        return True
