"""A channel over two shared-memory rings, two eventfds and a socket.

The rings carry the messages, an eventfd per direction ends the peer's sleep, and the AF_UNIX
socket says goodbye: with a reason when a side closes, by hanging up when it dies.

The eventfd is signalled after every publish, whether anybody sleeps or not: the write costs about
as much as the fence and the flag that would tell, and there is no window to get wrong.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from transport.base import BaseChannel, Record
from transport.channel import MAX_BODY_BYTES, ChannelStatistics, Kind
from transport.errors import ProtocolError
from transport.layout import Layout
from transport.ring import RingReader, RingWriter
from transport.schema import Schema
from transport.shm import Parts

SPIN_NS = 50_000
"""How long a receiver watches before it sleeps: more than a wake-up costs, and bounded."""
_ROUNDS = 200


class ShmChannel(BaseChannel):
    """One side.

    Args:
        parts: The channel's from now on.
        on_close: Called before the descriptors are closed.
    """

    transport = "shm"

    def __init__(
        self,
        send_schema: Schema,
        recv_schema: Schema,
        epoch: bytes,
        parts: Parts,
        *,
        on_close: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(send_schema, recv_schema)
        self._parts = parts
        own, peer = parts.own, parts.peer
        self._writer = RingWriter(own, peer, epoch, send_schema, Layout.of(send_schema))
        self._reader = RingReader(own, peer, epoch, recv_schema, Layout.of(recv_schema))
        self._on_close = on_close
        self._broken = False
        self._poller = select.poll()
        self._poller.register(parts.own_bell, select.POLLIN)
        self._poller.register(parts.link, select.POLLIN)

    @property
    def bell(self) -> int:
        """The eventfd that says there may be something to take; ``silence`` it before looking."""
        return self._parts.own_bell

    @property
    def link(self) -> socket.socket:
        """Readable when the peer has said goodbye or died; ``_look_for_peer`` then knows."""
        return self._parts.link

    @property
    def unread(self) -> bool:
        return self._closed is None and not self._broken and self._reader.unread

    def silence(self) -> None:
        """Take the signals so far. What is published later signals again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._parts.own_bell)

    def look_for_peer(self) -> str | None:
        """``gone``, after a look."""
        if self._closed is None and self.gone is None:
            self._look_for_peer()
        return self.gone

    def statistics(self) -> ChannelStatistics:
        self.dropped_epoch = self._reader.dropped_epoch
        self.dropped_malformed = self._reader.dropped_malformed
        return super().statistics()

    def _claim(self) -> dict[str, NDArray[Any]] | None:
        try:
            return self._writer.claim()
        except ProtocolError as error:
            self._give_up(error)
            self._require_peer()
            raise

    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        try:
            if not self._writer.publish(kind, request_id, budget_ns, body):
                return False
        except ProtocolError as error:
            self._give_up(error)
            self._require_peer()
        # A full counter is still a signal.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._parts.peer_bell, 1)
        return True

    def _take(self) -> Record | None:
        if self._broken:
            return None
        try:
            return self._reader.take()
        except ProtocolError as error:
            self._give_up(error)
            return None

    def _release(self, sequence: int) -> None:
        self._reader.release(sequence)

    def _look_for_peer(self) -> None:
        try:
            said = self._parts.link.recv(MAX_BODY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        reason = said.decode("utf-8", "replace")
        self.gone = reason or "the peer is gone: it died, or closed without a word"

    def _spin(self) -> bool:
        until = time.perf_counter_ns() + SPIN_NS
        while time.perf_counter_ns() < until:
            if self._reader.spin(_ROUNDS):
                return True
        return False

    def _wait(self, timeout_s: float) -> None:
        self._poller.poll(math.ceil(timeout_s * 1000))
        self.silence()

    def _close(self, reason: str) -> None:
        self._on_close(reason)
        said = f"the peer closed: {reason}" if reason else "the peer closed"
        with contextlib.suppress(OSError):
            self._parts.link.send(said.encode()[:MAX_BODY_BYTES])
        self._writer.close()
        self._reader.close()
        self._parts.close()

    def _give_up(self, error: ProtocolError) -> None:
        """A peer whose counters are impossible is not to be read any further."""
        self._broken = True
        self.gone = f"the peer broke the protocol: {error}"
