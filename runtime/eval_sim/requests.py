"""Requests of an episode whose world does not wait: who answers them, and how late.

``Requests`` is the part of ``AsyncPolicy`` that such an episode needs. ``ImmediateRequests`` makes
it of a policy that answers at once. ``DelayedRequests`` wraps either and delays the answers.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from policies.types import ActionChunk, MetaObs, Policy
from runtime.control.clock import Clock
from runtime.errors import RuntimeFault
from runtime.eval_sim.latency_dial import LatencyDraws

MAX_IN_FLIGHT = 2
"""Requests without an answer at a time: as many as a ``PolicyClient`` has by default."""


class Requests(Protocol):
    """The requests of one episode."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Send ``obs`` and wait for its chunk."""
        ...

    def submit(self, obs: MetaObs) -> object:
        """Send ``obs``, or keep it to be sent; never waits for the answer."""
        ...

    def poll(self) -> ActionChunk | None:
        """Return the next chunk that has arrived, or None."""
        ...


class ImmediateRequests:
    """Requests that ``policy`` answers while they are submitted, before time goes on.

    Args:
        policy: In this process or served; not closed from here.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._chunks: deque[ActionChunk] = deque()

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``. Raises ``RuntimeFault`` if it is for another tick."""
        chunk = self._policy.infer(obs)
        require_tick(chunk, obs.timestep)
        return chunk

    def submit(self, obs: MetaObs) -> None:
        """Compute the chunk for ``obs``; the next ``poll`` returns it. Raises as ``infer``."""
        self._chunks.append(self.infer(obs))

    def poll(self) -> ActionChunk | None:
        """Return the next chunk, or None."""
        return self._chunks.popleft() if self._chunks else None


class DelayedRequests:
    """Requests whose answers come late, or never, as ``draws`` says.

    As over a network:

    * Answers keep the order of their requests: an early one waits for the one before it.
    * At most ``MAX_IN_FLIGHT`` are without an answer. Beyond that only the newest observation
      waits, and is sent when an answer comes.
    * Nobody is told that an observation was lost.

    The delay begins when an answer has arrived. It is seen only when it is polled: of the stage
    ``reply``, the last ``poll_ns`` at most are taken as the time that it waited for that.

    Args:
        requests: Answer without the delay.
        draws: The episode's latencies and losses.
        clock: Its time; ``infer`` waits on it.
        poll_ns: Time from one ``poll`` to the next; 0 if answers are there at once.
    """

    def __init__(
        self, requests: Requests, draws: LatencyDraws, clock: Clock, poll_ns: int = 0
    ) -> None:
        self._requests, self._draws, self._clock = requests, draws, clock
        self._poll_ns = poll_ns
        self._latency_ns: dict[int, int] = {}  # by the tick of a request that is being answered
        self._arriving: deque[tuple[int, ActionChunk]] = deque()  # (when it is there, chunk)
        self._waiting: tuple[MetaObs, int] | None = None

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Send ``obs`` until it is not lost, and wait for its chunk."""
        while (latency_ns := self._draws.draw_ns()) is None:
            pass
        chunk = self._requests.infer(obs)
        self._clock.wait_until_ns(self._clock.now_ns() + latency_ns)
        return chunk

    def submit(self, obs: MetaObs) -> None:
        """Send ``obs``, or keep it to be sent, or lose it."""
        latency_ns = self._draws.draw_ns()
        if latency_ns is None:
            return
        self._waiting = (obs, latency_ns)
        self._send_waiting()

    def poll(self) -> ActionChunk | None:
        """Return the next chunk whose latency is over, or None."""
        now_ns = self._clock.now_ns()
        while (chunk := self._requests.poll()) is not None:
            latency_ns = self._latency_ns[chunk.obs_timestep]
            # A request before this one that has no answer by now gets none: they keep their order.
            self._latency_ns = {
                tick: ns for tick, ns in self._latency_ns.items() if tick > chunk.obs_timestep
            }
            arrived_ns = now_ns - min(self._poll_ns, chunk.stages_ns.get("reply", 0))
            last_ns = self._arriving[-1][0] if self._arriving else now_ns
            self._arriving.append((max(last_ns, arrived_ns + latency_ns), chunk))
        if not self._arriving or self._arriving[0][0] > now_ns:
            return None
        _, chunk = self._arriving.popleft()
        self._send_waiting()
        return chunk

    def _send_waiting(self) -> None:
        in_flight = len(self._latency_ns) + len(self._arriving)
        if self._waiting is None or in_flight >= MAX_IN_FLIGHT:
            return
        obs, latency_ns = self._waiting
        self._requests.submit(obs)
        self._waiting = None
        self._latency_ns[obs.timestep] = latency_ns


def require_tick(chunk: ActionChunk, tick: int) -> None:
    """Raise ``RuntimeFault`` if ``chunk`` is for the observation of another tick than ``tick``."""
    if chunk.obs_timestep != tick:
        raise RuntimeFault(
            f"obs_timestep: got a chunk for tick {chunk.obs_timestep}, expected {tick}: "
            "the policy must copy obs.timestep"
        )
