"""The AF_UNIX socket where clients prove that they mapped the offered segments."""

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

PROOF_TIMEOUT_S = 2.0
"""From a connection to its proof."""
MAX_UNPROVEN = 64
ACCEPT_RETRY_S = 0.5
"""Pause after a connection could not be accepted for lack of descriptors."""
_CREDENTIALS = struct.Struct("3i")
_log = logging.getLogger(__name__)


class ShmAcceptor:
    """Listens under a random abstract name, which only this network namespace can reach.

    Args:
        accept_proof: Called with epoch, nonces and the connected socket of a client of the same
            user. It answers and keeps the socket, or returns the reason for a refusal.
    """

    def __init__(
        self,
        event_loop: EventLoop,
        accept_proof: Callable[[bytes, bytes, socket.socket], str | None],
    ) -> None:
        self.name = f"{PREFIX}{secrets.token_hex(16)}"
        self._event_loop, self._accept_proof = event_loop, accept_proof
        self._unproven: dict[int, tuple[socket.socket, float]] = {}
        self._reopen_at: float | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(MAX_UNPROVEN)
        event_loop.register(self._socket.fileno(), self._accept_all)

    @property
    def deadline(self) -> float | None:
        """Monotonic time at which ``expire`` must be called; None if it need not be."""
        times = [deadline for _, deadline in self._unproven.values()]
        if self._reopen_at is not None:
            times.append(self._reopen_at)
        return min(times, default=None)

    def expire(self, now: float) -> None:
        """Reject the connections whose time is over, and listen again after a pause."""
        if self._reopen_at is not None and now >= self._reopen_at:
            self._reopen_at = None
            self._event_loop.register(self._socket.fileno(), self._accept_all)
        for fd, (_, deadline) in list(self._unproven.items()):
            if now >= deadline:
                self._reject(fd, "too late")

    def close(self) -> None:
        """Close the socket and all connections that have not sent their proof. Idempotent."""
        for fd in list(self._unproven):
            self._reject(fd, "the server is closing")
        self._event_loop.unregister(self._socket.fileno())
        self._socket.close()

    def _accept_all(self) -> None:
        """Accept all waiting connections, so that no proof expires because the server was busy."""
        for _ in range(MAX_UNPROVEN):
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Accept the next connection; False if there is none."""
        try:
            unix_socket, _ = self._socket.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            # Out of descriptors, for example. The socket stays readable, so waiting on it would
            # spin.
            _log.warning("a local connection could not be accepted: %s", error)
            self._event_loop.unregister(self._socket.fileno())
            self._reopen_at = time.monotonic() + ACCEPT_RETRY_S
            return False
        unix_socket.setblocking(False)
        fd = unix_socket.fileno()
        self._unproven[fd] = unix_socket, time.monotonic() + PROOF_TIMEOUT_S
        self._event_loop.register(fd, lambda: self._read(fd))
        if len(self._unproven) > MAX_UNPROVEN:
            self._reject(next(iter(self._unproven)), "too many wait")
        # The proof mostly arrives with the connection; reading it now keeps it from expiring.
        self._read(fd)
        return True

    def _read(self, fd: int) -> None:
        unix_socket, _ = self._unproven[fd]
        try:
            proof = unix_socket.recv(PROOF_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            proof = b""
        if len(proof) != PROOF_BYTES:
            self._reject(fd, "not a proof")
            return
        if _uid(unix_socket) != os.geteuid():
            self._reject(fd, "another user")
            return
        refusal = self._accept_proof(proof[:EPOCH_BYTES], proof[EPOCH_BYTES:], unix_socket)
        if refusal is not None:
            self._reject(fd, refusal)
            return
        del self._unproven[fd]
        self._event_loop.unregister(fd)

    def _reject(self, fd: int, why: str) -> None:
        unix_socket, _ = self._unproven.pop(fd)
        self._event_loop.unregister(fd)
        with contextlib.suppress(OSError):
            unix_socket.send(why.encode())
        unix_socket.close()


def _uid(unix_socket: socket.socket) -> int:
    raw = unix_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(raw)[1]
    return uid
