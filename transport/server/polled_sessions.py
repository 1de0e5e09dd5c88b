"""A server's shared-memory sessions that are looked at, because their clients do not ring.

Each session over shared memory is in one of two states. Asleep: its client rings a bell, which is
in the epoll, and costs nothing until it does. Polled: its client publishes without a system call,
and the server looks. A bell wakes a session; only a server that is about to block puts them all to
sleep. So a thousand idle sessions cost a busy one nothing, and a busy one costs itself no bell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transport.server.sessions import ServerSession

if TYPE_CHECKING:
    from transport.shm.channel import ShmChannel


class PolledSessions:
    """Those that are."""

    def __init__(self) -> None:
        self._sessions: dict[int, tuple[ServerSession, ShmChannel]] = {}
        self._rung = False

    def __bool__(self) -> bool:
        return bool(self._sessions)

    def wake(self, session: ServerSession, channel: ShmChannel) -> None:
        channel.wake_up()
        self._sessions[session.id] = session, channel

    def ring(self, session: ServerSession, channel: ShmChannel) -> None:
        """``wake``, because its client rang: for what is there, or is about to come."""
        self.wake(session, channel)
        self._rung = True

    def take_rung(self) -> bool:
        """Whether a client has rung since the last call."""
        rung, self._rung = self._rung, False
        return rung

    def discard(self, session: ServerSession) -> None:
        """Idempotent."""
        self._sessions.pop(session.id, None)

    def telling(self) -> list[ServerSession]:
        """Those with something to read, or whose channel has found its peer gone."""
        return [
            session
            for session, channel in self._sessions.values()
            if channel.unread or channel.gone is not None
        ]

    def look(self, rounds: int) -> bool:
        """Watch them all, so many rounds in sum; whether one has something to read."""
        each = max(1, rounds // max(1, len(self._sessions)))
        return any(channel.watch(each) for _, channel in self._sessions.values())

    def fall_asleep(self) -> bool:
        """Have all of them ring; False when something came first: then do not block."""
        for session, channel in list(self._sessions.values()):
            if not channel.fall_asleep():
                channel.wake_up()
                return False
            del self._sessions[session.id]
        return True
