"""Bookkeeping of a client's requests: those in flight, and counts of their outcomes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from policies.types import ActionChunk
from runtime.protocol import messages
from transport.channel import Kind, Message


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """Counts since the client was made.

    Attributes:
        requests: Observations sent.
        replies: Chunks returned to the caller.
        failures: Requests that failed with an error.
        superseded: Observations replaced by a newer one, here or at the server.
        dropped_late: Replies to requests that had been cancelled or had timed out.
        sessions: Sessions opened; more than one after a reconnect.
    """

    requests: int = 0
    replies: int = 0
    failures: int = 0
    superseded: int = 0
    dropped_late: int = 0
    sessions: int = 0


@dataclass(slots=True)
class PendingRequest:
    """One request without a reply; times are ns of this process's monotonic clock.

    Attributes:
        began_ns: When ``submit`` began.
        packed_ns: When the observation was written into the message.
        budget_ns: How long the caller waits for the reply, a duration; 0 for no limit.
        published_ns: When the message was sent; 0 before.
        wanted: False once the request is cancelled.
    """

    id: int
    began_ns: int
    packed_ns: int
    budget_ns: int
    published_ns: int = 0
    wanted: bool = True


class PendingRequests:
    """The requests in flight, and at most one that waits to be sent.

    Args:
        bound: How many wanted requests may be in flight at a time.

    Attributes:
        counts: By the names of ``ClientStatistics``.
        waiting: The request whose observation is written and not yet published.
        policy_id: The id of the policy that computed the last chunk; 0 before the first.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._in_flight: dict[int, PendingRequest] = {}
        self._last_id = 0
        self.counts = dict.fromkeys(ClientStatistics.__slots__, 0)
        self.waiting: PendingRequest | None = None
        self.policy_id = 0

    def next_id(self) -> int:
        """A new request id. Ids increase, also across sessions."""
        self._last_id += 1
        return self._last_id

    def start(self, began_ns: int, budget_ns: int) -> PendingRequest:
        """Make a new request the waiting one; its observation was packed just now.

        Args:
            began_ns: When ``submit`` began.
            budget_ns: How long the caller waits for the reply; 0 for no limit.
        """
        self.waiting = PendingRequest(self.next_id(), began_ns, time.monotonic_ns(), budget_ns)
        return self.waiting

    @property
    def may_publish(self) -> bool:
        """Whether a request waits and fewer than ``max_in_flight`` are in flight.

        Only wanted requests count: a reply that was cancelled, or that a server lost, must not
        delay later requests. The ring's slots bound the others.
        """
        if self.waiting is None:
            return False
        in_flight = self._in_flight
        return (
            len(in_flight) < self._max_in_flight
            or sum(r.wanted for r in in_flight.values()) < self._max_in_flight
        )

    def mark_published(self, request: PendingRequest) -> None:
        """Record that the waiting request has been sent."""
        request.published_ns = time.monotonic_ns()
        self._in_flight[request.id] = request
        self.waiting = None
        self.counts["requests"] += 1

    def supersede_waiting(self) -> None:
        """Drop the waiting request and count it as superseded."""
        if self.waiting is not None:
            self.waiting = None
            self.counts["superseded"] += 1

    def cancel(self) -> None:
        """Drop the waiting request; mark the requests in flight as not wanted."""
        self.supersede_waiting()
        for request in self._in_flight.values():
            request.wanted = False

    def clear(self) -> None:
        """Forget every request: the session has ended."""
        self.waiting = None
        self._in_flight.clear()

    def complete(self, message: Message) -> PendingRequest | None:
        """Record a reply; return its request if that is wanted and the reply has a chunk.

        Raises:
            PolicyError: The wanted request failed with this error.
        """
        request_id = message.request_id
        request = self._in_flight.pop(request_id, None)
        # Replies come in order: an earlier unwanted request gets none any more.
        for earlier in [i for i, r in self._in_flight.items() if i < request_id and not r.wanted]:
            del self._in_flight[earlier]
        if request is None or not request.wanted:
            self.counts["dropped_late"] += 1
            return None
        if message.kind is Kind.DATA:
            return request
        if message.kind is Kind.SUPERSEDED:
            self.counts["superseded"] += 1
            return None
        self.counts["failures"] += 1
        raise messages.decode_error(message.body)

    def count_reply(self, policy_id: int) -> None:
        """Count a chunk that is returned to the caller, and remember the id of its policy."""
        self.counts["replies"] += 1
        self.policy_id = policy_id

    def statistics(self) -> ClientStatistics:
        """The counts as a frozen value."""
        return ClientStatistics(**self.counts)


def with_stages(chunk: ActionChunk, request: PendingRequest, received_ns: int) -> ActionChunk:
    """``chunk`` with the client's stages added; all stages add up to the request's duration.

    Time that neither side spent is transport time: ``publish`` towards the server, ``reply`` the
    rest. Publishing wakes the server, which may start before the call returns; that overlap counts
    as the server's time, not twice.
    """
    server_stages: Mapping[str, int] = chunk.stages_ns
    transport_ns = received_ns - request.packed_ns - sum(server_stages.values())
    publish_ns = min(request.published_ns - request.packed_ns, transport_ns)
    stages = {
        "pack": request.packed_ns - request.began_ns,
        "publish": publish_ns,
        **server_stages,
        "reply": transport_ns - publish_ns,
        "unpack": time.monotonic_ns() - received_ns,
    }
    return ActionChunk(
        chunk.actions,
        chunk.obs_timestep,
        chunk.t_capture_ns,
        chunk.first_action_offset,
        chunk.ctrl_space,
        chunk.ctrl_type,
        chunk.gripper_continuous,
        stages,
    )
