"""A client's side of one open session: observations out, chunks in."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.client.connection import OpenSession
from runtime.client.requests import PendingRequests, with_stages
from runtime.protocol import messages
from runtime.trace import recorder as trace
from transport.channel import Kind, Loan, Message
from transport.errors import PeerGone, TransportError, WouldBlock

logger = logging.getLogger(__name__)


class ClientSession:
    """Writes observations, publishes them within the bound, and reads what is answered.

    Methods raise ``PeerGone`` where the server is gone, and ``WouldBlock`` where it has not looked
    at any of the last requests.

    Args:
        opened: Closed with this one.
        contract: Of the policy.
        requests: The client's; forgotten at the end of the session.
        trace_key: By which the server knows this session's requests.

    Attributes:
        channel, pictures, deterministic, reason: As of ``opened``.
    """

    def __init__(
        self,
        opened: OpenSession,
        contract: PolicyContract,
        requests: PendingRequests,
        trace_key: int,
    ) -> None:
        self.channel, self.pictures = opened.channel, opened.pictures
        self.deterministic, self.reason = opened.deterministic, opened.reason
        self._contract, self._requests, self._trace_key = contract, requests, trace_key
        self._loan: Loan | None = None  # the waiting request's, or rendered into
        self._reset_due = False

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Arrays by camera that the next ``submit`` need not copy. What waited is superseded."""
        self._requests.supersede()
        self._drop_loan()  # taken anew, which finds out whether the server is still there
        return self.pictures.canvas(self._take_loan().arrays)

    def submit(self, obs: MetaObs, budget_ns: int) -> int:
        """Write ``obs`` as the request that waits, and publish it if the bound allows; its id.

        Raises:
            ContractMismatch: Not an observation of this session's kind.
        """
        began_ns = time.monotonic_ns()
        self._requests.supersede()
        loan = self._take_loan()
        if self.pictures.copied:
            loan.announce()
        self.pictures.write(obs, loan.arrays)
        request = self._requests.begin(began_ns, budget_ns)
        if trace.on:
            flow = trace.flow(self._trace_key, request.id)
            trace.add("pack", began_ns, request.packed_ns, request.id, flow=flow)
        self._publish_waiting()
        return request.id

    def poll(self) -> ActionChunk | None:
        """The next chunk that is wanted, or None; never blocks.

        Raises:
            PolicyError: What a request failed with.
        """
        while (message := self.channel.poll()) is not None:
            chunk = self._take(message)
            if chunk is not None:
                return chunk
        return None

    def receive(self, timeout_s: float) -> tuple[int, ActionChunk | None]:
        """Wait for an answer: whose it is, and its chunk where that is wanted.

        Raises:
            TransportTimeout: None came.
            PolicyError: What the request failed with.
        """
        message = self.channel.recv(timeout_s)
        return message.request_id, self._take(message)

    def reset(self) -> None:
        """Tell the server to forget the episode: now, or before the next observation."""
        self._drop_loan()
        self._reset_due = True
        with contextlib.suppress(WouldBlock):
            self._send_reset()

    def close(self) -> None:
        """End it. Idempotent."""
        self._drop_loan()
        self._requests.forget()
        try:
            self.channel.close()
        except TransportError as error:
            logger.debug("closing the channel: %s", error)

    def _take_loan(self) -> Loan:
        if self._loan is None:
            self._send_reset()
            self._loan = self.channel.loan()
        return self._loan

    def _send_reset(self) -> None:
        if self._reset_due:
            self.channel.send_body(Kind.RESET, self._requests.next_id())
            self._reset_due = False

    def _publish_waiting(self) -> None:
        """Publish the waiting observation if the bound allows."""
        request, loan = self._requests.waiting, self._loan
        if request is None or loan is None or not self._requests.may_publish:
            return
        self._loan = None
        began_ns = time.monotonic_ns() if trace.on else 0
        loan.publish(request.id, budget_ns=request.budget_ns)
        self._requests.published(request)
        if trace.on:
            trace.published(began_ns, trace.flow(self._trace_key, request.id))

    def _take(self, message: Message) -> ActionChunk | None:
        """Account for an answer; its chunk, or None when there is none to give out."""
        received_ns = time.monotonic_ns()
        with message:
            try:
                request = self._requests.settle(message)
                if request is None:
                    return None
                chunk = messages.read_chunk(message.arrays, self._contract)
                self._requests.answered(messages.policy_id(message.arrays))
                chunk = with_stages(chunk, request, received_ns)
                if trace.on:
                    flow = trace.flow(self._trace_key, request.id)
                    trace.answered(chunk.stages_ns, request.began_ns, received_ns, flow)
                return chunk
            finally:
                if self._requests.waiting is not None:
                    with contextlib.suppress(PeerGone, WouldBlock):  # the next call will say so
                        self._publish_waiting()

    def _drop_loan(self) -> None:
        if self._loan is not None:
            self._loan.cancel()
            self._loan = None
