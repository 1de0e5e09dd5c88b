"""Long exchanges, for a ``ForkServer``: sleeping readers wake up and frames arrive whole."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import zlib
from typing import Any

import numpy as np
from transport_forks import send_event
from transport_sides import HOST, PATIENCE_S

from transport.base_channel import BaseChannel
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
    send_event("listening", port=listener.port)
    return listener, _only_session(listener)


def _dialed(port: int, schema: Schema) -> BaseChannel:
    with Dialer(HOST, port, timeout_s=PATIENCE_S, spin_us=0) as dialer:
        return dialer.open(schema, client="child", transport="shm")[0]


def work(generator: random.Random) -> None:
    """Compute for a random time, up to some tens of microseconds."""
    size = generator.choice((0, 0, 100, 1000, 10_000, 65_536))
    zlib.crc32(MUCH[:size])


def sleeps() -> int:
    """Number of voluntary context switches of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def _send(channel: BaseChannel, schema: Schema, number: int) -> None:
    while True:
        try:
            loan = channel.loan()
            break
        except WouldBlock:
            os.sched_yield()
    # Some are announced; of these, some leave time to wake up or to sleep again.
    if number % 3:
        loan.announce()
    if number % 7 == 0:
        zlib.crc32(MUCH)
    loan.arrays["number"][...] = number
    loan.publish(number)


def exchange_bursts(port: int, count: int, bursts: int, seed: int) -> None:
    """One end of an exchange of ``count`` messages, in bursts that one message answers.

    Both ends draw the same bursts of up to ``bursts``. A lost wake-up leaves both asleep until the
    timeout.
    """
    first = port != 0
    listener, channel = (None, _dialed(port, TINY)) if first else _served(TINY)
    shared, own = random.Random(seed), random.Random(seed + first)
    before, done = sleeps(), 0

    def receive(number: int) -> None:
        with channel.recv(PATIENCE_S) as message:
            got = message.request_id, int(message.arrays["number"])
        if got != (number, number):
            send_event("wrong", got=got, expected=number)

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
    send_event("done", messages=done, timeouts=channel.timeouts, sleeps=sleeps() - before)
    sys.stdin.read()
    channel.close()
    if listener is not None:
        listener.close()


def wait_for_all(spin_us: float) -> None:
    """A listener that serves until SIGTERM. A wait without a session has timed out."""
    listener = Listener(HOST, 0, describe=dict, accept=lambda hello: Welcome(TINY), spin_us=spin_us)
    stopping: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        listener.wake()

    signal.signal(signal.SIGTERM, stop)
    send_event("listening", port=listener.port)
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
    send_event(
        "done", answered=answered, nothing=nothing, timeouts=timeouts, sleeps=sleeps() - before
    )
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
                send_event("wrong", got=message.request_id, expected=number)
        work(generator)
    timeouts = sum(channel.timeouts for channel in channels)
    send_event("done", count=count, timeouts=timeouts, sleeps=sleeps() - before)
    sys.stdin.read()
    for channel in channels:
        channel.close()


def send_frames(port: int, count: int, seed: int) -> None:
    """Send ``count`` numbered frames with checksums; one that finds no place is counted as lost."""
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
    send_event("done", lost=lost, sent=channel.statistics().sent)
    sys.stdin.read()
    channel.close("all was sent")
    if listener is not None:
        listener.close()


def receive_frames(port: int, seed: int) -> None:
    """Until the sender closes, check every frame when it arrives and when it is released.

    Up to three are held while the next is awaited, and released in random order. The sender's
    places come back in order, so messages that are three messages old are released first.
    """
    listener, channel = (None, _dialed(port, FRAME)) if port else _served(FRAME)
    generator = random.Random(seed)
    held: dict[int, Message] = {}
    last, got, torn, reordered, missing, max_held = -1, 0, 0, 0, 0, 0

    def whole(message: Message) -> bool:
        return zlib.crc32(message.arrays["content"]) == int(message.arrays["crc"])

    def release(position: int) -> bool:
        """Release a message; whether it is unchanged."""
        with held.pop(position) as message:
            return whole(message)

    try:
        while True:
            max_held = max(max_held, len(held))
            message = channel.recv(PATIENCE_S)
            torn += not whole(message)
            reordered += message.request_id <= last
            missing += message.request_id - last - 1
            last = message.request_id
            held[got] = message
            got += 1
            work(generator)
            while held and generator.random() < 0.5:
                torn += not release(generator.choice(list(held)))
            for position in [one for one in held if one < got - 3]:
                torn += not release(position)
    except PeerGone:
        pass
    for position in list(held):
        torn += not release(position)
    seen = {"got": got, "last": last, "torn": torn, "reordered": reordered, "missing": missing}
    counts = channel.statistics()
    dropped = counts.dropped_epoch + counts.dropped_malformed
    send_event("done", **seen, max_held=max_held, dropped=dropped, timeouts=channel.timeouts)
    channel.close()
    if listener is not None:
        listener.close()
