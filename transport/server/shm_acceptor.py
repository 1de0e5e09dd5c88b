"""The AF_UNIX socket where clients prove that they mapped their segments."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable

from transport.handshake_messages import EPOCH_BYTES
from transport.server.event_loop import EventLoop
from transport.shm.segment import PREFIX
from transport.shm.segment_offer import PROOF_BYTES

PATIENCE_S = 2.0
"""Who connects has this long to prove itself."""
MAX_WAITING = 64
RECESS_S = 0.5
"""After a client could not be let in for want of descriptors."""
_CREDENTIALS = struct.Struct("3i")
_log = logging.getLogger(__name__)


class ShmAcceptor:
    """Listens under a random abstract name, which only this network namespace can reach.

    Args:
        admit: Called with epoch, nonces and the connected socket of a client of this user. It
            answers and keeps the socket, or returns why not.
    """

    def __init__(
        self, event_loop: EventLoop, admit: Callable[[bytes, bytes, socket.socket], str | None]
    ) -> None:
        self.name = f"{PREFIX}{secrets.token_hex(16)}"
        self._event_loop, self._admit = event_loop, admit
        self._waiting: dict[int, tuple[socket.socket, float]] = {}
        self._reopen_at: float | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(MAX_WAITING)
        event_loop.watch(self._socket.fileno(), self._knock)

    @property
    def deadline(self) -> float | None:
        """Monotonic time at which ``expire`` has something to do."""
        times = [deadline for _, deadline in self._waiting.values()]
        if self._reopen_at is not None:
            times.append(self._reopen_at)
        return min(times, default=None)

    def expire(self, now: float) -> None:
        if self._reopen_at is not None and now >= self._reopen_at:
            self._reopen_at = None
            self._event_loop.watch(self._socket.fileno(), self._knock)
        for fd, (_, deadline) in list(self._waiting.items()):
            if now >= deadline:
                self._dismiss(fd, "too late")

    def close(self) -> None:
        """Idempotent."""
        for fd in list(self._waiting):
            self._dismiss(fd, "the server is closing")
        self._event_loop.forget(self._socket.fileno())
        self._socket.close()

    def _knock(self) -> None:
        """Everybody who has: a server that was busy must not let the proofs of some expire."""
        for _ in range(MAX_WAITING):
            if not self._let_in():
                return

    def _let_in(self) -> bool:
        """The next one; whether there was somebody."""
        try:
            link, _ = self._socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            # Out of descriptors, say. It stays readable: look away, or the wait would spin.
            _log.warning("a local client could not be let in: %s", error)
            self._event_loop.forget(self._socket.fileno())
            self._reopen_at = time.monotonic() + RECESS_S
            return False
        link.setblocking(False)
        fd = link.fileno()
        self._waiting[fd] = link, time.monotonic() + PATIENCE_S
        self._event_loop.watch(fd, lambda: self._read(fd))
        if len(self._waiting) > MAX_WAITING:
            self._dismiss(next(iter(self._waiting)), "too many wait")
        # The proof mostly comes with the connection; a busy server must not let it expire.
        self._read(fd)
        return True

    def _read(self, fd: int) -> None:
        link, _ = self._waiting[fd]
        try:
            proof = link.recv(PROOF_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            proof = b""
        if len(proof) != PROOF_BYTES:
            self._dismiss(fd, "not a proof")
            return
        if _uid(link) != os.geteuid():
            self._dismiss(fd, "another user")
            return
        refusal = self._admit(proof[:EPOCH_BYTES], proof[EPOCH_BYTES:], link)
        if refusal is not None:
            self._dismiss(fd, refusal)
            return
        del self._waiting[fd]
        self._event_loop.forget(fd)

    def _dismiss(self, fd: int, why: str) -> None:
        link, _ = self._waiting.pop(fd)
        self._event_loop.forget(fd)
        with contextlib.suppress(OSError):
            link.send(why.encode())
        link.close()


def _uid(link: socket.socket) -> int:
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(raw)[1]
    return uid
