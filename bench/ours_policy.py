"""What a user calls: ``PolicyClient.infer`` to a ``PolicyServer`` and a policy that is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

from bench.contestant import Exchange
from bench.null_policy import NullPolicy
from bench.payload import Sink, Source
from policies.types import MetaObs
from runtime.client import PolicyClient
from runtime.server import PolicyServer
from transport.zeromq.malloc import keep_freed_memory


class PolicyContestant:
    """Payloads of pictures only: a policy has a camera.

    Args:
        idle: Further sessions that are open, have asked once, and say nothing since.
    """

    busy = False

    def __init__(self, name: str, transport: str, *, idle: int = 0) -> None:
        self.name, self._transport, self._idle = name, transport, idle

    def serve(self, sink: Sink, link: Connection) -> None:
        keep_freed_memory()  # as the server's command does
        with PolicyServer(NullPolicy(sink)) as server:
            link.send(f"127.0.0.1:{server.port}")
            server.serve()

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        address, arrays = link.recv(), source.arrays
        obs = MetaObs(
            images={name: array for name, array in arrays.items() if name != "state"},
            state=arrays["state"],
        )
        with ExitStack() as stack:
            clients = [
                stack.enter_context(PolicyClient(address, transport=self._transport))
                for _ in range(1 + self._idle)
            ]
            for each in clients:
                each.infer(obs)
            infer = clients[0].infer

            def exchange() -> None:
                source.take(infer(obs).actions)

            yield exchange


CONTESTANTS = (
    PolicyContestant("policy shm", "shm"),
    PolicyContestant("policy shm 7 idle", "shm", idle=7),
    PolicyContestant("policy zmq", "zmq"),
)
