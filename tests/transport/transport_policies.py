"""Policies that stop or keep, their server and a client of it as children of a ``Nursery``."""

from __future__ import annotations

import signal
import sys

from transport_forks import say

from policies.types import ActionChunk, MetaObs
from runtime.client import PolicyClient
from runtime.server import PolicyServer
from tests.runtime.toy_policy import ToyPolicy, observation

STOP = 555.0
"""A state at which the policy stops its own process, in the middle of a request."""


class StoppingPolicy(ToyPolicy):
    """Stops its process where the observation says so."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        if obs.state[0] == STOP:
            signal.raise_signal(signal.SIGSTOP)
        return super().infer(obs)

    def fork(self) -> StoppingPolicy:
        return StoppingPolicy()


class KeepingPolicy(ToyPolicy):
    """Looks at the pictures of the last requests, as many as ``state[1]`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[MetaObs, bytes]] = []

    def infer(self, obs: MetaObs) -> ActionChunk:
        for old, before in self.kept:
            if old.images["top"].tobytes() != before:
                raise RuntimeError("a picture changed under the reader")
        if obs.state[1]:
            self.kept.append((obs, obs.images["top"].tobytes()))
            del self.kept[: -int(obs.state[1])]
        return super().infer(obs)

    def fork(self) -> KeepingPolicy:
        return KeepingPolicy()

    def close(self) -> None:
        self.kept.clear()


def serve_policy(kind: str) -> None:
    policy = {"stopping": StoppingPolicy, "keeping": KeepingPolicy}[kind]()
    with PolicyServer(policy) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.stop("the test is over"))
        say("listening", port=server.port)
        server.serve()


def ask_and_stop(port: int, transport: str, rounds: int) -> None:
    """A client that is stopped with a request in flight that it has given up."""
    with PolicyClient(f"127.0.0.1:{port}", transport=transport) as client:
        client.infer(observation(0.0, timestep=0))
        for number in range(1, rounds + 1):
            client.submit(observation(1.0, timestep=1000 + number))
            client.cancel()
            signal.raise_signal(signal.SIGSTOP)
            chunk = client.infer(observation(2.0, timestep=number), timeout_s=30.0)
            say("went on", asked=number, got=chunk.obs_timestep, value=float(chunk.actions[0, 1]))
        counts = client.statistics()
        say("done", replies=counts.replies, dropped_late=counts.dropped_late)
        sys.stdin.read()
