"""Our channels: what comes is copied out of its slot, what goes is written into its slot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.contestant import Exchange
from bench.payload import Sink, Source
from transport.channel import Channel, Loan, Message
from transport.dialer import Dialer
from transport.handshake_messages import Welcome
from transport.server.listener import Listener
from transport.zeromq.malloc import keep_freed_memory

_PATIENCE_S = 3600.0


def _receive(channel: Channel) -> Message:
    return channel.recv(_PATIENCE_S)


def _watch(channel: Channel) -> Message:
    """Never sleep: what a core of one's own is for."""
    while (message := channel.poll()) is None:
        pass
    return message


class ChannelContestant:
    """A session's two channels, without a policy.

    Args:
        spin_us: Of both sides, or None for the default.
        watch: Poll without end instead of waiting.
    """

    def __init__(
        self, name: str, transport: str, *, spin_us: float | None = None, watch: bool = False
    ) -> None:
        self.name, self.busy = name, watch
        self._transport = transport
        self._spin: dict[str, Any] = {} if spin_us is None else {"spin_us": spin_us}
        self._next: Callable[[Channel], Message] = _watch if watch else _receive

    def serve(self, sink: Sink, link: Connection) -> None:
        keep_freed_memory()  # as the server's command does
        reply = sink.payload.reply
        with Listener(
            "127.0.0.1", 0, describe=dict, accept=lambda hello: Welcome(reply), **self._spin
        ) as listener:
            link.send(listener.port)
            sessions = []
            while not sessions:
                sessions = listener.wait(None)
            if self._transport == "zmq":
                self._serve_all(sink, listener)
            else:
                self._serve_one(sink, sessions[0].channel)

    def _serve_one(self, sink: Sink, channel: Channel) -> None:
        receive = self._next
        while True:
            with receive(channel) as message:
                self._answer(sink, channel, message)

    def _serve_all(self, sink: Sink, listener: Listener) -> None:
        """A session's ZMQ messages arrive on the listener's socket."""
        while True:
            for session in listener.wait(None):
                while (message := session.channel.poll()) is not None:
                    with message:
                        self._answer(sink, session.channel, message)

    @staticmethod
    def _answer(sink: Sink, channel: Channel, message: Message) -> None:
        loan = channel.loan()
        loan.announce()
        actions = sink.take(message.arrays)
        np.copyto(loan.arrays["actions"], actions)
        loan.publish(message.request_id)

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        receive = self._next
        with self._open(source, link) as channel:

            def exchange() -> None:
                loan = channel.loan()
                loan.announce()
                for name, view in loan.arrays.items():
                    np.copyto(view, source.arrays[name])
                loan.publish(1)
                with receive(channel) as message:
                    source.take(message.arrays["actions"])

            yield exchange

    def _open(self, source: Source, link: Connection) -> Channel:
        with Dialer("127.0.0.1", link.recv(), **self._spin) as dialer:
            channel, _ = dialer.open(
                source.payload.observation, client="bench", transport=self._transport
            )
        return channel


class LoanedContestant(ChannelContestant):
    """Its caller's arrays are the loan's, as those of ``PolicyClient.loan_images``."""

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        receive = self._next
        with self._open(source, link) as channel:
            loan = _move_to_loan(source, channel)

            def exchange() -> None:
                nonlocal loan
                loan.announce()
                loan.publish(1)
                with receive(channel) as message:
                    source.take(message.arrays["actions"])
                loan = _move_to_loan(source, channel)

            yield exchange


def _move_to_loan(source: Source, channel: Channel) -> Loan:
    """Borrow the next slot. Nothing is copied if it is where ``source.arrays`` are already."""
    loan = channel.loan()
    for name, view in loan.arrays.items():
        if source.arrays[name] is not view:
            np.copyto(view, source.arrays[name])
            source.arrays[name] = view
    return loan


CONTESTANTS = (
    ChannelContestant("shm spin", "shm", watch=True),
    ChannelContestant("shm default", "shm"),
    ChannelContestant("shm block", "shm", spin_us=0),
    ChannelContestant("zmq", "zmq"),
    LoanedContestant("zmq loaned", "zmq"),
)
