"""Long conversations, as children of a ``Nursery``: what is asleep wakes, what is sent is whole."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import zlib
from typing import Any

import numpy as np
from transport_forks import say
from transport_sides import HOST, PATIENCE_S

from transport.base import BaseChannel
from transport.channel import Message
from transport.dialer import Dialer
from transport.errors import PeerGone, WouldBlock
from transport.handshake_messages import Welcome
from transport.schema import ArraySpec, Schema
from transport.server.listener import Listener

TINY = Schema((ArraySpec("number", "int64", ()),))
FRAME = Schema((ArraySpec("content", "uint8", (4096,)), ArraySpec("crc", "int64", ())))
MUCH = bytes(65536)


def _only_session(listener: Listener) -> BaseChannel:
    while not listener.sessions:
        listener.wait(0.01)
    (session,) = listener.sessions.values()
    return session.channel


def _served(schema: Schema) -> tuple[Listener, BaseChannel]:
    listener = Listener(
        HOST, 0, describe=dict, accept=lambda hello: Welcome(schema), spin_us=0, transports=["shm"]
    )
    say("listening", port=listener.port)
    return listener, _only_session(listener)


def _dialed(port: int, schema: Schema) -> BaseChannel:
    with Dialer(HOST, port, timeout_s=PATIENCE_S, spin_us=0) as dialer:
        return dialer.open(schema, client="child", transport="shm")[0]


def work(generator: random.Random) -> None:
    """Of a random size: from nothing to some tens of microseconds."""
    size = generator.choice((0, 0, 100, 1000, 10_000, 65_536))
    zlib.crc32(MUCH[:size])


def sleeps() -> int:
    """How often this process has let go of its core by itself."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def _send(channel: BaseChannel, schema: Schema, number: int) -> None:
    while True:
        try:
            loan = channel.loan()
            break
        except WouldBlock:
            os.sched_yield()
    # Some with a warning, of these some with time enough to wake up, fall asleep again, or neither.
    if number % 3:
        loan.announce()
    if number % 7 == 0:
        zlib.crc32(MUCH)
    loan.arrays["number"][...] = number
    loan.publish(number)


def hand_over(port: int, count: int, bursts: int, seed: int) -> None:
    """One end of ``count`` hand-overs; bursts of up to ``bursts``, each answered by one message.

    Both ends draw the same bursts. A wake-up that is lost leaves both asleep until the time-out.
    """
    first = port != 0
    listener, channel = (None, _dialed(port, TINY)) if first else _served(TINY)
    shared, own = random.Random(seed), random.Random(seed + first)
    before, done = sleeps(), 0

    def receive(number: int) -> None:
        with channel.recv(PATIENCE_S) as message:
            got = message.request_id, int(message.arrays["number"])
        if got != (number, number):
            say("wrong", got=got, expected=number)

    while done < count:
        size = shared.randint(1, bursts)
        for number in range(done, done + size):
            if first:
                _send(channel, TINY, number)
            else:
                receive(number)
            if bursts > 1:
                work(own)
        done += size + 1
        if first:
            receive(done)
        else:
            _send(channel, TINY, done)
    say("done", hand_overs=done, timeouts=channel.timeouts, sleeps=sleeps() - before)
    sys.stdin.read()
    channel.close()
    if listener is not None:
        listener.close()


def wait_for_all(spin_us: float) -> None:
    """A listener with sessions; until SIGTERM. A wait that gives nothing is one that timed out."""
    listener = Listener(HOST, 0, describe=dict, accept=lambda hello: Welcome(TINY), spin_us=spin_us)
    stopping: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        listener.wake()

    signal.signal(signal.SIGTERM, stop)
    say("listening", port=listener.port)
    answered = nothing = 0
    before = sleeps()
    while not stopping:
        ready = listener.wait(PATIENCE_S)
        nothing += not ready and not stopping
        for session in ready:
            try:
                while (message := session.channel.poll()) is not None:
                    with message:
                        number = message.request_id
                    _send(session.channel, TINY, number)
                    answered += 1
            except PeerGone:
                continue
    timeouts = sum(session.channel.timeouts for session in listener.sessions.values())
    say("done", answered=answered, nothing=nothing, timeouts=timeouts, sleeps=sleeps() - before)
    listener.close()


def use_some(port: int, sessions: int, busy: int, count: int, seed: int) -> None:
    """Open ``sessions``, use ``busy`` of them in random order and with random pauses of work."""
    channels = [_dialed(port, TINY) for _ in range(sessions)]
    generator, before = random.Random(seed), sleeps()
    for number in range(count):
        channel = channels[generator.randrange(busy)]
        _send(channel, TINY, number)
        with channel.recv(PATIENCE_S) as message:
            if message.request_id != number:
                say("wrong", got=message.request_id, expected=number)
        work(generator)
    timeouts = sum(channel.timeouts for channel in channels)
    say("done", count=count, timeouts=timeouts, sleeps=sleeps() - before)
    sys.stdin.read()
    for channel in channels:
        channel.close()


def send_frames(port: int, count: int, seed: int) -> None:
    """``count`` numbered frames with checksums; one that finds no place is passed over, counted."""
    listener, channel = (None, _dialed(port, FRAME)) if port else _served(FRAME)
    generator = random.Random(seed)
    content = np.frombuffer(random.Random(seed).randbytes(4096), np.uint8).copy()
    lost = 0
    for number in range(count):
        content += np.uint8(number % 7 + 1)
        patient = generator.random() < 0.9  # the others are the newest or nothing
        while True:
            try:
                loan = channel.loan()
            except WouldBlock:
                if patient:
                    os.sched_yield()
                    continue
                lost += 1
                break
            if generator.random() < 0.05:
                loan.arrays["content"][...] = 0
                loan.cancel()
                continue
            views = loan.arrays
            views["content"][...] = content
            views["crc"][...] = zlib.crc32(content)
            loan.publish(number)
            break
        work(generator)
    say("done", lost=lost, sent=channel.statistics().sent)
    sys.stdin.read()
    channel.close("all was sent")
    if listener is not None:
        listener.close()


def receive_frames(port: int, seed: int) -> None:
    """Until the sender closes: check every frame when it comes and again when it is let go.

    Up to three are held while the next is awaited, and let go in random order; but the sender's
    places come back in order, so what is three messages old has to go first.
    """
    listener, channel = (None, _dialed(port, FRAME)) if port else _served(FRAME)
    generator = random.Random(seed)
    held: dict[int, Message] = {}
    last, got, torn, reordered, missing, most = -1, 0, 0, 0, 0, 0

    def whole(message: Message) -> bool:
        return zlib.crc32(message.arrays["content"]) == int(message.arrays["crc"])

    def let_go(position: int) -> bool:
        """Whether it is what it was."""
        with held.pop(position) as message:
            return whole(message)

    try:
        while True:
            most = max(most, len(held))
            message = channel.recv(PATIENCE_S)
            torn += not whole(message)
            reordered += message.request_id <= last
            missing += message.request_id - last - 1
            last = message.request_id
            held[got] = message
            got += 1
            work(generator)
            while held and generator.random() < 0.5:
                torn += not let_go(generator.choice(list(held)))
            for position in [one for one in held if one < got - 3]:
                torn += not let_go(position)
    except PeerGone:
        pass
    for position in list(held):
        torn += not let_go(position)
    seen = {"got": got, "last": last, "torn": torn, "reordered": reordered, "missing": missing}
    counts = channel.statistics()
    dropped = counts.dropped_epoch + counts.dropped_malformed
    say("done", **seen, most=most, dropped=dropped, timeouts=channel.timeouts)
    channel.close()
    if listener is not None:
        listener.close()
