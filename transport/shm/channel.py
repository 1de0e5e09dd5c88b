"""A channel over two shared-memory rings, two eventfds and a socket.

The rings carry the messages, an eventfd per direction ends the peer's sleep, and the AF_UNIX
socket says goodbye: with a reason when a side closes, by hanging up when it dies.

A bell is rung only for a peer that has said it sleeps (``transport.shm.ring`` has the protocol), so
in a tight exchange, where both sides watch for a moment before they sleep, a message costs no
system call at all. A writer may ring before it writes (``Loan.announce``), and a reader that was
woken and finds nothing watches for what is about to come: so it wakes up while the payload is
copied, not after. Whether the peer has died is asked of the socket, which is a system call, at most
every millisecond by a caller that never waits; a peer that closed says so in memory.
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
from transport.schema import Schema
from transport.shm.adaptive_spin import DEFAULT_SPIN_US, AdaptiveSpin
from transport.shm.ring import RingReader, RingWriter
from transport.shm.segment import Parts
from transport.shm.segment_layout import SegmentLayout

_LOOK_EVERY_NS = 1_000_000
"""How often ``poll`` and ``loan`` ask the socket whether the peer lives."""


class ShmChannel(BaseChannel):
    """One side.

    Args:
        parts: The channel's from now on.
        spin_us: How long ``recv`` may watch before it sleeps; see ``AdaptiveSpin``.
        on_close: Called before the descriptors are closed.

    Attributes:
        timeouts: Sleeps that ended by the clock, neither by the bell nor by the peer's end.
    """

    transport = "shm"

    def __init__(
        self,
        send_schema: Schema,
        recv_schema: Schema,
        epoch: bytes,
        parts: Parts,
        *,
        spin_us: float = DEFAULT_SPIN_US,
        on_close: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(send_schema, recv_schema)
        self._parts, self._held = parts, [parts]
        self._waiting = False
        own, peer = parts.own, parts.peer
        self._writer = RingWriter(own, peer, epoch, send_schema, SegmentLayout.of(send_schema))
        self._reader = RingReader(own, peer, epoch, recv_schema, SegmentLayout.of(recv_schema))
        self._on_close = on_close
        self._broken = False
        self._adaptive = AdaptiveSpin(spin_us)
        self._look_at_ns = 0
        self.timeouts = 0
        self._poller = select.poll()
        self._poller.register(parts.own_bell, select.POLLIN)
        self._poller.register(parts.link, select.POLLIN)

    @property
    def eventfd(self) -> int:
        """The eventfd that a peer rings for whoever has fallen asleep."""
        return self._parts.own_bell

    @property
    def link(self) -> socket.socket:
        """Readable when the peer has said goodbye or died; ``look_for_peer`` then knows."""
        return self._parts.link

    @property
    def unread(self) -> bool:
        return self._closed is None and not self._broken and self._reader.unread

    def watch(self, rounds: int) -> bool:
        """As ``unread``, but look so many times, some tens of nanoseconds apart."""
        return self._reader.spin(rounds)

    def fall_asleep(self) -> bool:
        """Ask for the bell from now on; False when something came first: then do not sleep."""
        return self._reader.fall_asleep()

    def wake_up(self) -> None:
        """The bell is not needed any more; what it rang until now is taken."""
        self._reader.wake_up()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._parts.own_bell)

    def look_for_peer(self) -> str | None:
        """``gone``, after a look."""
        self._look_at_ns = 0
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
        if self._writer.reader_sleeps:
            self._ring()
        return True

    def announce_loan(self) -> None:
        if self._writer.reader_asleep:
            self._ring()

    def _ring(self) -> None:
        # A full counter is still a signal.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._parts.peer_bell, 1)

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
        now_ns = time.monotonic_ns()
        if now_ns < self._look_at_ns and not self._reader.closed:
            return
        self._look_at_ns = now_ns + _LOOK_EVERY_NS
        try:
            said = self._parts.link.recv(MAX_BODY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        reason = said.decode("utf-8", "replace")
        self.gone = reason or "the peer is gone: it died, or closed without a word"

    def _spin(self) -> bool:
        return self._adaptive.watch(self._reader.spin)

    def _wait(self, timeout_s: float) -> None:
        self._waiting = True
        try:
            if self._broken or not self._reader.fall_asleep():
                return
            happened = self._poller.poll(math.ceil(timeout_s * 1000))
            self.wake_up()
            if not happened:
                self.timeouts += 1
            elif happened[0][0] == self._parts.own_bell and not self._reader.unread:
                self._adaptive.expect(self._reader.spin)
            self._look_at_ns = 0
        finally:
            self._waiting = False
            if self._closed is not None:
                self._let_go()

    def _waited(self, duration_ns: int) -> None:
        self._adaptive.waited(duration_ns)

    def _close(self, reason: str) -> None:
        self._on_close(reason)
        said = f"the peer closed: {reason}" if reason else "the peer closed"
        with contextlib.suppress(OSError):
            self._parts.link.send(said.encode()[:MAX_BODY_BYTES])
        # After the reason: whoever sees the flag finds it.
        self._writer.close()
        self._reader.close()
        if self._waiting:
            # In another thread, against the rule of one: it gets an error, not unmapped memory.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._parts.own_bell, 1)
        else:
            self._let_go()

    def _let_go(self) -> None:
        while self._held:
            self._held.pop().close()

    def _give_up(self, error: ProtocolError) -> None:
        """A peer whose counters are impossible is not to be read any further."""
        self._broken = True
        self.gone = f"the peer broke the protocol: {error}"
