"""The two sides of a session, for a ``ForkServer``; either can kill itself at a given line."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import zlib
from collections import deque
from types import FrameType
from typing import Any

import numpy as np
from contracts.frames import CHUNK, OBSERVATION, observation
from transport_forks import send_event

import transport.shm.channel  # noqa: F401  a client imports both once it has an offer
from transport.base_channel import BaseChannel
from transport.dialer import Dialer
from transport.errors import PeerGone, TransportError
from transport.handshake_messages import Welcome
from transport.server.listener import Listener

"localhost".encode("idna")  # to be imported while this process may read the library
HOST, PATIENCE_S = "127.0.0.1", 20.0


def arm(point: dict[str, Any] | None) -> None:
    """Make this process kill itself at ``point``.

    ``at`` counts the distinct lines of one call of ``function`` in ``module``, from 1; 0 is its
    return. ``call`` says which call of it.
    """
    if point is None:
        return
    code = f"/transport/{point['module'].replace('.', '/')}.py", point["function"]
    calls = 0

    def die() -> None:
        send_event("dying", at_ns=time.monotonic_ns())
        os.kill(os.getpid(), signal.SIGKILL)

    def enter(frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal calls
        if frame.f_code.co_qualname != code[1] or not frame.f_code.co_filename.endswith(code[0]):
            return None
        calls += 1
        if calls < point["call"]:
            return None
        lines: set[int] = set()

        def step(frame: FrameType, event: str, _argument: Any) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            if (event == "line" and len(lines) == point["at"]) or (
                event == "return" and point["at"] == 0
            ):
                die()
            return step

        return step

    sys.settrace(enter)


def serve(
    port: int = 0, point: dict[str, Any] | None = None, uid: int = 0, armed_after: int = 0
) -> None:
    """Answer every observation with its checksum, until SIGTERM.

    ``point`` counts from the answer ``armed_after``: a new session's ring is also read while its
    client still waits for the end of the handshake.
    """
    stopping: list[int] = []
    answers = 0

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        listener.wake()

    if uid:
        os.setuid(uid)
    listener = Listener(
        HOST,
        port,
        describe=dict,
        accept=lambda hello: Welcome(CHUNK),
        max_sessions=10_000,
        spin_us=0,
    )
    signal.signal(signal.SIGTERM, stop)
    send_event("listening", port=listener.port)
    if not armed_after:
        arm(point)
    while not stopping:
        for session in listener.wait(None):
            try:
                while (message := session.channel.poll()) is not None:
                    with message:
                        session.channel.send(answer(message.arrays), message.request_id)
                    answers += 1
                    if answers == armed_after:
                        arm(point)
            except PeerGone:
                if session.ended is not None:  # else it will be handed out once more
                    send_event("ended", reason=session.ended, at_ns=time.monotonic_ns())
    listener.close("the server is shutting down")
    send_event("closed")


def answer(arrays: Any) -> dict[str, Any]:
    total = sum(zlib.crc32(np.ascontiguousarray(array)) for array in arrays.values())
    return {"actions": np.zeros((10, 14), np.float32), "stages": np.full(8, total, np.int64)}


def ask(
    port: int,
    timeout_s: float,
    count: int,
    point: dict[str, Any] | None = None,
    transport: str = "shm",
) -> None:
    """Open a session, send ``count`` requests, close; then three requests at each port it reads."""
    arm(point)
    _ask(port, timeout_s, count, transport)
    for line in sys.stdin:
        _ask(int(line), PATIENCE_S, 3, transport)


def _ask(port: int, timeout_s: float, count: int, transport: str) -> None:
    """Send ``answered``, or ``failed`` with the delay after its deadline (negative: before)."""
    phase, answers = "handshake", 0
    # The handshake waits for three answers: to HELLO, to the proof, to CONFIRM.
    until_ns = time.monotonic_ns() + round(3 * timeout_s * 1e9)
    try:
        with Dialer(HOST, port, timeout_s=timeout_s, spin_us=0) as dialer:
            channel, _ = dialer.open(OBSERVATION, client="asks", transport=transport)
        send_event("open", transport=channel.transport, reason=channel.transport_reason)
        phase = "data"
        sent = observation(0)
        with channel:
            while answers < count:
                until_ns = time.monotonic_ns() + round(timeout_s * 1e9)
                sent["stamp"] = np.array(answers, np.int64)
                channel.send(sent, answers)
                with channel.recv(timeout_s) as message:
                    whole = np.array_equal(message.arrays["stages"], answer(sent)["stages"])
                    if message.request_id != answers or not whole:
                        send_event("wrong", asked=answers, got=message.request_id)
                answers += 1
        send_event("answered", count=answers)
    except TransportError as error:
        now_ns = time.monotonic_ns()
        what = {"type": type(error).__name__, "text": str(error)}
        send_event(
            "failed", **what, phase=phase, answers=answers, at_ns=now_ns, late_ns=now_ns - until_ns
        )


def open_many(port: int, count: int, nofile: int = 0, timeout_s: float = 2.0) -> None:
    """Open up to ``count`` sessions, with one request each; then close them all."""
    if nofile:
        resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
    opened: deque[BaseChannel] = deque()
    how: list[tuple[str, str]] = []
    failure = ""
    try:
        with Dialer(HOST, port, timeout_s=timeout_s) as dialer:
            while len(opened) < count:
                channel, _ = dialer.open(OBSERVATION, client="one of many")
                opened.append(channel)
                how.append((channel.transport, channel.transport_reason))
                sent = observation(len(opened))
                channel.send(sent, 1)
                with channel.recv(PATIENCE_S) as message:
                    if not np.array_equal(message.arrays["stages"], answer(sent)["stages"]):
                        send_event("wrong")
    except TransportError as error:
        failure = f"{type(error).__name__}: {error}"
    send_event("opened", how=how, failure=failure)
    sys.stdin.readline()
    for channel in opened:
        channel.close()
    send_event("closed")
