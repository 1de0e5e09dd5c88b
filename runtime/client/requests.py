"""The requests of one session that are under way, and what became of the others."""

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
        requests: Observations published.
        replies: Chunks given out.
        failures: Requests answered with an error.
        superseded: Observations passed over for a newer one, here or at the server.
        dropped_late: Answers that nobody wanted any more.
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
    """One observation on its way to an answer; times of this process's monotonic clock."""

    id: int
    began_ns: int
    packed_ns: int
    budget_ns: int
    published_ns: int = 0
    wanted: bool = True


class PendingRequests:
    """What was asked and not yet answered, with one that waits until it may be asked.

    Args:
        bound: How many wanted requests may be unanswered at a time.

    Attributes:
        counts: By the names of ``ClientStatistics``.
        waiting: The request whose observation is written and not published.
        policy_id: Of the policy that gave the last chunk; 0 before the first.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._asked: dict[int, PendingRequest] = {}
        self._last_id = 0
        self.counts = dict.fromkeys(ClientStatistics.__slots__, 0)
        self.waiting: PendingRequest | None = None
        self.policy_id = 0

    def next_id(self) -> int:
        """Ids rise, also across sessions."""
        self._last_id += 1
        return self._last_id

    def begin(self, began_ns: int, budget_ns: int) -> PendingRequest:
        """The waiting request from now on; it began then, and was packed just now."""
        self.waiting = PendingRequest(self.next_id(), began_ns, time.monotonic_ns(), budget_ns)
        return self.waiting

    @property
    def may_publish(self) -> bool:
        """Whether a request waits and the bound allows it.

        Only requests that are still wanted count: an answer that was given up, or that a server
        lost, must not hold up the ones after it. The ring bounds them all the same.
        """
        if self.waiting is None:
            return False
        asked = self._asked
        return len(asked) < self._bound or sum(r.wanted for r in asked.values()) < self._bound

    def published(self, request: PendingRequest) -> None:
        """The waiting request is on its way."""
        request.published_ns = time.monotonic_ns()
        self._asked[request.id] = request
        self.waiting = None
        self.counts["requests"] += 1

    def supersede(self) -> None:
        """Nobody will ask for the observation that waits."""
        if self.waiting is not None:
            self.waiting = None
            self.counts["superseded"] += 1

    def cancel(self) -> None:
        """Nobody wants what was asked for."""
        self.supersede()
        for request in self._asked.values():
            request.wanted = False

    def forget(self) -> None:
        """The session is over: nothing will be answered."""
        self.waiting = None
        self._asked.clear()

    def settle(self, message: Message) -> PendingRequest | None:
        """Account for an answer; its request, if that is still wanted and this is its chunk.

        Raises:
            PolicyError: What a wanted request failed with.
        """
        number = message.request_id
        request = self._asked.pop(number, None)
        # Answers come in order: what was asked before and is not wanted needs none any more.
        for earlier in [i for i, r in self._asked.items() if i < number and not r.wanted]:
            del self._asked[earlier]
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

    def answered(self, policy_id: int) -> None:
        """A chunk that this policy gave is given out."""
        self.counts["replies"] += 1
        self.policy_id = policy_id

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(**self.counts)


def with_stages(chunk: ActionChunk, request: PendingRequest, received_ns: int) -> ActionChunk:
    """``chunk`` with this side's stages; all of them add up to the request.

    What is neither ours nor the server's is the wire's, both ways: ``publish`` on the way out,
    ``reply`` the rest. Publishing wakes the server, which may be at work before our call returns;
    that overlap is the server's time, not counted twice.
    """
    theirs: Mapping[str, int] = chunk.stages_ns
    wire_ns = received_ns - request.packed_ns - sum(theirs.values())
    publish_ns = min(request.published_ns - request.packed_ns, wire_ns)
    stages = {
        "pack": request.packed_ns - request.began_ns,
        "publish": publish_ns,
        **theirs,
        "reply": wire_ns - publish_ns,
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
