"""A client's side of one open session: sends observations, receives chunks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.client.connection import OpenSession
from runtime.client.pending_requests import PendingRequests, with_stages
from runtime.protocol import messages
from runtime.trace import recorder as trace
from transport.channel import Kind, Loan, Message
from transport.errors import PeerGone, TransportError, WouldBlock

logger = logging.getLogger(__name__)


class ClientSession:
    """Writes observations, sends them while ``max_in_flight`` allows, and reads replies.

    Methods raise ``PeerGone`` if the server is gone, and ``WouldBlock`` if it has read none of the
    last requests.

    Args:
        opened: Closed with this session.
        contract: The policy's contract.
        requests: The client's bookkeeping; cleared when the session ends.
        trace_key: Identifies this session's requests in the traces of both processes.

    Attributes:
        channel, writer, deterministic, reason: As in ``opened``.
    """

    def __init__(
        self,
        opened: OpenSession,
        contract: PolicyContract,
        requests: PendingRequests,
        trace_key: int,
    ) -> None:
        self.channel, self.writer = opened.channel, opened.writer
        self.deterministic, self.reason = opened.deterministic, opened.reason
        self._contract, self._requests, self._trace_key = contract, requests, trace_key
        self._loan: Loan | None = None  # of the waiting request, or of ``loan_images``
        self._reset_body: bytes | None = None  # of a reset that is still to be sent

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Arrays by camera, uint8 (height, width, 3), that the next ``submit`` need not copy.

        A waiting request is superseded.
        """
        self._requests.supersede_waiting()
        self._drop_loan()  # a new loan finds out whether the server still runs
        return self.writer.render_targets(self._take_loan().arrays)

    def submit(self, obs: MetaObs, budget_ns: int) -> int:
        """Write ``obs`` as the waiting request, and send it if ``max_in_flight`` allows.

        Returns:
            The request id.

        Raises:
            ContractMismatch: The arrays of ``obs`` are not those of this session.
        """
        began_ns = time.monotonic_ns()
        self._requests.supersede_waiting()
        loan = self._take_loan()
        if self.writer.copies_only:
            loan.announce()
        self.writer.write(obs, loan.arrays)
        request = self._requests.start(began_ns, budget_ns)
        if trace.on:
            flow = trace.flow_id(self._trace_key, request.id)
            trace.add("pack", began_ns, request.packed_ns, request.id, flow=flow)
        self._publish_waiting()
        return request.id

    def poll(self) -> ActionChunk | None:
        """The next chunk of a wanted request, or None; never blocks.

        Raises:
            PolicyError: A wanted request failed with this error.
        """
        while (message := self.channel.poll()) is not None:
            chunk = self._receive_reply(message)
            if chunk is not None:
                return chunk
        return None

    def receive(self, timeout_s: float) -> tuple[int, ActionChunk | None]:
        """Wait for one reply; return its request id, and its chunk if the request is wanted.

        Raises:
            TransportTimeout: No reply came within ``timeout_s``.
            PolicyError: The request failed with this error.
        """
        message = self.channel.recv(timeout_s)
        return message.request_id, self._receive_reply(message)

    def reset(self, seed: int | None) -> None:
        """Tell the server to start a new episode: now, or before the next observation."""
        self._drop_loan()
        self._reset_body = messages.encode_reset(seed)
        with contextlib.suppress(WouldBlock):
            self._send_reset()

    def close(self) -> None:
        """End the session. Idempotent."""
        self._drop_loan()
        self._requests.clear()
        try:
            self.channel.close()
        except TransportError as error:
            logger.debug("closing the channel: %s", error)

    def _take_loan(self) -> Loan:
        if self._loan is None:
            self._send_reset()
            self._loan = self.channel.loan()
        else:
            self.channel.require_peer()  # as a new loan does
        return self._loan

    def _send_reset(self) -> None:
        if self._reset_body is not None:
            self.channel.send_body(Kind.RESET, self._requests.next_id(), self._reset_body)
            self._reset_body = None

    def _publish_waiting(self) -> None:
        """Send the waiting observation if ``max_in_flight`` allows."""
        request, loan = self._requests.waiting, self._loan
        if request is None or loan is None or not self._requests.may_publish:
            return
        self._loan = None
        began_ns = time.monotonic_ns() if trace.on else 0
        loan.publish(request.id, budget_ns=request.budget_ns)
        self._requests.mark_published(request)
        if trace.on:
            trace.add_send(began_ns, trace.flow_id(self._trace_key, request.id))

    def _receive_reply(self, message: Message) -> ActionChunk | None:
        """Record a reply; return its chunk, or None if the caller gets none."""
        received_ns = time.monotonic_ns()
        with message:
            try:
                request = self._requests.complete(message)
                if request is None:
                    return None
                chunk = messages.read_chunk(message.arrays, self._contract)
                self._requests.count_reply(messages.policy_id(message.arrays))
                chunk = with_stages(chunk, request, received_ns)
                if trace.on:
                    flow = trace.flow_id(self._trace_key, request.id)
                    trace.add_reply(chunk.stages_ns, request.began_ns, received_ns, flow)
                return chunk
            finally:
                if self._requests.waiting is not None:
                    with contextlib.suppress(PeerGone, WouldBlock):  # the next call raises it
                        self._publish_waiting()

    def _drop_loan(self) -> None:
        if self._loan is not None:
            self._loan.cancel()
            self._loan = None
