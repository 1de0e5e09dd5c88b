"""A channel over two shared-memory rings, two eventfds and a socket.

The rings carry the messages. One eventfd per direction wakes a sleeping peer. The AF_UNIX socket
reports the end of the session: a side that closes sends its reason, and the kernel closes the
socket of a side that dies.

An eventfd is written only for a peer whose flag says that it sleeps (``transport.shm.ring`` has the
protocol). In a tight exchange, where both sides spin before they sleep, a message needs no system
call. A writer may signal before it writes (``Loan.announce``), and a reader that was woken without
a message spins for it, so it wakes up while the payload is copied and not after. A caller that
never waits checks the socket for a dead peer at most once per millisecond, because that is a system
call. A peer that closed sets a flag in memory.
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

import numpy as np
from numpy.typing import NDArray

from transport.base_channel import BaseChannel, ReceivedMessage
from transport.channel import MAX_BODY_BYTES, ChannelStatistics, Kind
from transport.errors import ProtocolError
from transport.schema import Schema
from transport.shm.adaptive_spin import DEFAULT_SPIN_US, AdaptiveSpin
from transport.shm.ring import RingReader, RingWriter
from transport.shm.segment import ShmResources
from transport.shm.segment_layout import SegmentLayout

_CHECK_PEER_EVERY_NS = 1_000_000
"""How often ``poll`` and ``loan`` check the socket for a dead peer."""


class ShmChannel(BaseChannel):
    """One side of a session over shared memory.

    Args:
        resources: The channel closes them.
        spin_us: How long ``recv`` may spin before it sleeps, in µs; see ``AdaptiveSpin``.
        on_close: Called before the descriptors are closed.

    Attributes:
        timeouts: Sleeps that ended by their timeout, without a signal or the peer's end.
    """

    transport = "shm"

    def __init__(
        self,
        send_schema: Schema,
        recv_schema: Schema,
        epoch: bytes,
        resources: ShmResources,
        *,
        spin_us: float = DEFAULT_SPIN_US,
        on_close: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(send_schema, recv_schema)
        self._resources, self._open_resources = resources, [resources]
        self._waiting = False
        own, peer = resources.own, resources.peer
        self._writer = RingWriter(own, peer, epoch, send_schema, SegmentLayout.of(send_schema))
        self._reader = RingReader(own, peer, epoch, recv_schema, SegmentLayout.of(recv_schema))
        self._on_close = on_close
        self._broken = False
        self._adaptive = AdaptiveSpin(spin_us)
        self._check_peer_at_ns = 0
        self.timeouts = 0
        self._poller = select.poll()
        self._poller.register(resources.own_eventfd, select.POLLIN)
        self._poller.register(resources.unix_socket, select.POLLIN)

    @property
    def eventfd(self) -> int:
        """The eventfd that the peer writes to wake this side."""
        return self._resources.own_eventfd

    @property
    def unix_socket(self) -> socket.socket:
        """Readable when the peer has closed or died; ``check_peer`` then returns the reason."""
        return self._resources.unix_socket

    @property
    def unread(self) -> bool:
        """See ``BaseChannel.unread``."""
        return self._closed is None and not self._broken and self._reader.unread

    @property
    def peer_memory(self) -> NDArray[np.uint8] | None:
        """See ``BaseChannel.peer_memory``: the peer's segment."""
        return self._resources.peer.bytes if self._open_resources else None

    def spin(self, rounds: int) -> bool:
        """As ``unread``, but poll for that many rounds of some tens of nanoseconds."""
        return self._reader.spin(rounds)

    def prepare_to_wait(self) -> bool:
        """Have the peer signal from now on; False if a message arrived first: then do not sleep."""
        return self._reader.prepare_to_wait()

    def finish_wait(self) -> None:
        """Stop the peer's signals, and clear those that have arrived."""
        self._reader.finish_wait()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._resources.own_eventfd)

    def check_peer(self) -> str | None:
        """Check at once whether the peer has closed or died; the reason, or None."""
        self._check_peer_at_ns = 0
        if self._closed is None and self.gone_reason is None:
            self._check_peer()
        return self.gone_reason

    def statistics(self) -> ChannelStatistics:
        """See ``Channel.statistics``."""
        self.dropped_epoch = self._reader.dropped_epoch
        self.dropped_malformed = self._reader.dropped_malformed
        return super().statistics()

    def _claim(self) -> dict[str, NDArray[Any]] | None:
        try:
            return self._writer.claim()
        except ProtocolError as error:
            self._stop_on_violation(error)
            self._require_peer()
            raise

    def _publish(self, kind: Kind, request_id: int, budget_ns: int, body: bytes | None) -> bool:
        try:
            if not self._writer.publish(kind, request_id, budget_ns, body):
                return False
        except ProtocolError as error:
            self._stop_on_violation(error)
            self._require_peer()
        if self._writer.must_signal_reader:
            self._signal_peer()
        return True

    def announce_loan(self) -> None:
        """Signal a reader that sleeps: a message is about to follow."""
        if self._writer.reader_asleep:
            self._signal_peer()

    def _signal_peer(self) -> None:
        # A full counter is still a signal.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._resources.peer_eventfd, 1)

    def _take(self) -> ReceivedMessage | None:
        if self._broken:
            return None
        try:
            return self._reader.take()
        except ProtocolError as error:
            self._stop_on_violation(error)
            return None

    def _release(self, sequence: int) -> None:
        self._reader.release(sequence)

    def _check_peer(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns < self._check_peer_at_ns and not self._reader.closed:
            return
        self._check_peer_at_ns = now_ns + _CHECK_PEER_EVERY_NS
        try:
            received = self._resources.unix_socket.recv(MAX_BODY_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = b""
        reason = received.decode("utf-8", "replace")
        self.gone_reason = reason or "the peer is gone: it died, or closed without a reason"

    def _spin(self) -> bool:
        return self._adaptive.spin(self._reader.spin)

    def _wait(self, timeout_s: float) -> None:
        self._waiting = True
        try:
            if self._broken or not self._reader.prepare_to_wait():
                return
            ready = self._poller.poll(math.ceil(timeout_s * 1000))
            self.finish_wait()
            if not ready:
                self.timeouts += 1
            elif ready[0][0] == self._resources.own_eventfd and not self._reader.unread:
                self._adaptive.spin_after_signal(self._reader.spin)
            self._check_peer_at_ns = 0
        finally:
            self._waiting = False
            if self._closed is not None:
                self._release_resources()

    def _record_wait(self, duration_ns: int) -> None:
        self._adaptive.record_wait(duration_ns)

    def _close(self, reason: str) -> None:
        self._on_close(reason)
        message = f"the peer closed: {reason}" if reason else "the peer closed"
        with contextlib.suppress(OSError):
            self._resources.unix_socket.send(message.encode()[:MAX_BODY_BYTES])
        # After the reason, so that a peer that sees the flag can read it.
        self._writer.close()
        self._reader.close()
        if self._waiting:
            # ``recv`` waits in another thread, which is not allowed: it gets an error, and no
            # access to unmapped memory.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._resources.own_eventfd, 1)
        else:
            self._release_resources()

    def _release_resources(self) -> None:
        while self._open_resources:
            self._open_resources.pop().close()

    def _stop_on_violation(self, error: ProtocolError) -> None:
        """Stop reading from a peer whose counters are impossible."""
        self._broken = True
        self.gone_reason = f"the peer broke the protocol: {error}"
