"""A LeRobot client without LeRobot: its calls, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from tests.gateway.lerobot_pickles import END, TimedAction, instructions, message, read_actions


class LerobotClient:
    """The four calls, in bytes. Every client has a connection of its own."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", (("grpc.use_local_subchannel_pool", 1),)
        )
        unary, service = self.channel.unary_unary, "/transport.AsyncInference/"
        self._ready, self._instruct = (
            unary(service + "Ready"),
            unary(service + "SendPolicyInstructions"),
        )
        self._observe, self.get_actions = (
            self.channel.stream_unary(service + "SendObservations"),
            unary(service + "GetActions"),
        )

    def ready(self) -> None:
        assert self._ready(b"", timeout=10) == b""

    def instruct(self, content: bytes) -> None:
        assert self._instruct(message(content), timeout=10) == b""

    def start(self, **changes: Any) -> None:
        self.ready()
        self.instruct(instructions(**changes))

    def send_parts(self, parts: Iterable[bytes], timeout: float = 10) -> None:
        assert self._observe(iter(parts), timeout=timeout) == b""

    def send(self, content: bytes) -> None:
        self.send_parts([message(content, END)])

    def act(self) -> list[TimedAction]:
        """The actions; none where the gateway has waited for an observation in vain."""
        reply = self.get_actions(b"", timeout=10)
        if not reply:
            return []
        assert reply[0] == 0x0A
        at = 1
        while reply[at] & 0x80:
            at += 1
        return read_actions(reply[at + 1 :])

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> LerobotClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
