"""Policies that stop their process or keep observations, with a server and a client."""

from __future__ import annotations

import signal
import sys

from transport_forks import send_event

from policies.types import ActionChunk, MetaObs
from runtime.client import PolicyClient
from runtime.server import PolicyServer
from tests.runtime.toy_policy import ToyPolicy, observation

STOP = 555.0
"""A state for which the policy stops its own process, in the middle of a request."""


class StoppingPolicy(ToyPolicy):
    """Stops its process if the observation has the state ``STOP``."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        if obs.state[0] == STOP:
            signal.raise_signal(signal.SIGSTOP)
        return super().infer(obs)

    def fork(self) -> StoppingPolicy:
        return StoppingPolicy()


class KeepingPolicy(ToyPolicy):
    """Keeps the images of the last ``state[1]`` requests, and checks that they do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[MetaObs, bytes]] = []

    def infer(self, obs: MetaObs) -> ActionChunk:
        for old, before in self.kept:
            if old.images["top"].tobytes() != before:
                raise RuntimeError("an image changed while it was kept")
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
        send_event("listening", port=server.port)
        server.serve()


def request_and_stop(port: int, transport: str, rounds: int) -> None:
    """A client that is stopped while a cancelled request is in flight."""
    with PolicyClient(f"127.0.0.1:{port}", transport=transport) as client:
        client.infer(observation(0.0, timestep=0))
        for number in range(1, rounds + 1):
            client.submit(observation(1.0, timestep=1000 + number))
            client.cancel()
            signal.raise_signal(signal.SIGSTOP)
            chunk = client.infer(observation(2.0, timestep=number), timeout_s=30.0)
            send_event(
                "went on", asked=number, got=chunk.obs_timestep, value=float(chunk.actions[0, 1])
            )
        counts = client.statistics()
        send_event("done", replies=counts.replies, dropped_late=counts.dropped_late)
        sys.stdin.read()
